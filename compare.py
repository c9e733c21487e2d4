"""Compare finished runs in tables, statistics and curves.

    python compare.py runs
    python compare.py results/grok_tuned
    python compare.py results                                    # all studies, into docs/results
    python compare.py runs/first --baseline adamw --target "val/accuracy >= 0.94" --target "val/loss < 0.2"
    python compare.py tables/runs.zip --unfinished --output report --title "The published rows"

The report is a folder with HTML, Markdown and LaTeX. It is made from config.yaml and metrics.csv of every run at or
below the folders and in archives there, see analysis/. A folder's study.yaml has the title, the baseline, the targets
and the names of the rows, see analysis/study.py. A project.yaml says which studies are reported together, see
analysis/project.py. The report lists folders without a finished run, with the reason.
"""

import argparse
import functools
import sys
import traceback
from pathlib import Path

from analysis.study import Study
from experiment.target import Target

EPILOG = "Runs that differ only in their seeds form a row. Rows with the same protocol form a table."


def target(text: str) -> Target:
    """Read a target, and give the parser a readable error."""
    try:
        return Target.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, folders that contain them, or archives")
    parser.add_argument("--output", type=Path, help="folder to write to (default: report, or as project.yaml says)")
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument("--baseline", help="row or optimizer to compare the others with (default: adamw)")
    parser.add_argument(
        "--target", type=target, action="append", default=[], help='such as "val/accuracy >= 0.9"; repeatable'
    )
    parser.add_argument("--unfinished", action="store_true", help="include runs that did not finish")
    parser.add_argument("--wandb", metavar="PROJECT", help="also send the report to this Weights & Biases project")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error before its line")
    return parser.parse_args()


def main() -> int:
    """Write the report; returns the exit code."""
    options = arguments()
    # Here, because these imports take seconds, and a wrong option should not.
    from rich.console import Console
    from rich.progress import track

    from analysis import project
    from analysis.report import compare

    # On a terminal a bar with the time left; elsewhere one line when it is done.
    progress = functools.partial(track, console=Console(stderr=True))
    output = options.output or Path("report")
    try:
        if (found := project.Project.of(options.folders)) is not None:
            stated = [name for name in ("title", "baseline", "target", "unfinished", "wandb") if getattr(options, name)]
            if stated:
                example = found.folder / found.studies[0]
                raise ValueError(f"--{stated[0]} is for a single report: name the folder of a study, such as {example}")
            output = options.output or found.output
            print(project.report(found, output, progress))
            print(f"report: {output / 'report.html'}")
            return 0
        study = Study.of(options.folders).overridden(options.title, options.baseline, options.target)
        print(compare(options.folders, output, study, options.unfinished, progress))
        print(f"report: {output / 'report.html'}")
        if options.wandb:
            from analysis.upload import upload

            print(upload(output, options.wandb, study.title))
    except (ValueError, OSError) as error:
        from launch.errors import one_line  # imports torch

        if options.debug:
            traceback.print_exception(error)
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
