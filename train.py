"""Train, evaluate and query a model, with every number of the run in its configs.

    python train.py fit --config configs/grok_aga.yaml
    python train.py fit --config configs/grok_base.yaml --seed_everything 7 --trainer.max_epochs 300
    python train.py test --config configs/grok_aga.yaml --ckpt_path runs/grok_aga/<run>/checkpoints/last.ckpt
    python train.py predict --config configs/grok_aga.yaml --ckpt_path <checkpoint> --data.questions "[3+5, 100+40]"

A batch takes this path to the parameter update: modules/two_pass.py (training_step), the task's module (compute_loss),
ars2/ars2_neo.py (step). The command line is in launch/cli.py.
"""

import signal
import sys


def run() -> int:
    """Run the command line and return the exit code."""
    try:
        # Imported here because it takes seconds, during which Ctrl-C should exit quietly.
        from launch.cli import main

        return main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = run()
    # Everything is saved; a further Ctrl-C during Python's shutdown would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
