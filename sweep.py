"""Search each optimizer's settings, then run the winners on fresh seeds.

    python sweep.py configs/sweeps/grok.yaml --folder runs/grok --workers 2
    python sweep.py configs/sweeps/grok.yaml --wandb-files runs/grok/wandb

Repeat the command to resume a sweep that was stopped. launch/sweep_specification.py documents the sweep's file. Every
trial is an ordinary run with its own folder; `python compare.py runs/grok` makes the tables.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path


def main() -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the sweep's YAML file")
    parser.add_argument("--folder", type=Path, help="folder of the sweep (default: runs/sweeps/<name>)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="concurrent runs (default: all cores)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--wandb-files", type=Path, help="write W&B sweep files to this folder, and run nothing")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error before its line")
    options = parser.parse_args()
    if min(options.workers, options.threads) < 1:
        parser.error("--workers and --threads must be at least 1")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported
    try:
        from launch import sweep_progress, sweep_specification, wandb_sweep
        from launch.errors import one_line
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        print(f"error: a sweep needs the package {package}: install it (pip install {package})", file=sys.stderr)
        return 1
    try:
        sweep = sweep_specification.read(options.sweep)
        if options.wandb_files:
            wandb_sweep.write(sweep, options.wandb_files)
        else:
            sweep_progress.run(sweep, options.folder or Path("runs/sweeps") / sweep.name, options.workers)
    except (ValueError, OSError, KeyError) as error:
        if options.debug:
            traceback.print_exception(error)
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; resume with: python {' '.join(sys.argv)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # Do not wait for running trials, whose processes exit with this one.
    sys.stdout.flush()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
