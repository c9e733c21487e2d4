"""Train, evaluate and question a model; every number of a run comes from its configs.

    python train.py fit --config configs/grok_aga.yaml
    python train.py fit --config configs/grok_base.yaml --seed_everything 7 --trainer.max_epochs 300
    python train.py test --config configs/grok_aga.yaml --ckpt_path runs/grok_aga/<run>/checkpoints/last.ckpt
    python train.py predict --config configs/grok_aga.yaml --ckpt_path <checkpoint> --data.questions "[3+5, 100+40]"

One batch, from here to the parameter update: modules/two_pass.py (training_step), the task's module (compute_loss),
ars2/ars2_neo.py (step). The command line itself is in launch/cli.py.
"""

import signal
import sys


def run() -> int:
    """Run the command line; returns the exit code."""
    try:
        # Here, because this import takes seconds, in which people may change their mind.
        from launch.cli import main

        return main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = run()
    # All is saved and said; a further Ctrl-C while Python takes itself down would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
