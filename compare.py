"""Put finished runs side by side: tables, statistics and curves, in Markdown, HTML and LaTeX.

    python compare.py runs
    python compare.py results/grok --baseline grok_adamw --output report --title "Grokking, as published"
    python compare.py runs/mine --target "val/accuracy >= 0.94" --target "val/loss < 0.2"
    python compare.py tables/runs.zip --unfinished

Reads config.yaml and metrics.csv of every run at or below the folders, or in archives of runs; how is in analysis/.
Folders that are no finished run are listed in the report with the reason.
"""

import argparse
import functools
import re
import sys
from pathlib import Path

EPILOG = "Runs are rows by their setting and tables by their protocol; seeds of one setting are repeats."
_TARGET = re.compile(r"([\w/.-]+)\s*(>=|<)\s*(\d[\d.eE+-]*)")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__, epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, folders that hold some, or archives")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder to write to (default: report)")
    parser.add_argument("--title", default="Comparison of optimizers", help="heading of the report")
    parser.add_argument("--baseline", help="row, or optimizer, that the others are compared with (default: adamw)")
    parser.add_argument("--target", action="append", default=[], help='level to reach, such as "val/accuracy >= 0.9"')
    parser.add_argument("--unfinished", action="store_true", help="include runs that did not finish")
    parser.add_argument("--wandb", metavar="PROJECT", help="also send the report to this project")
    return parser.parse_args()


def main() -> int:
    """Write the report; returns the exit code."""
    options = arguments()
    matches = [_TARGET.fullmatch(text.strip()) for text in options.target]
    for text, match in zip(options.target, matches, strict=True):
        if match is None:
            example = "a metric, >= or <, and a number, such as 'val/loss < 0.2'"
            print(f"error: a target is {example}; got {text!r}", file=sys.stderr)
            return 2
    # Here, because these imports take seconds, and a wrong option should not.
    from rich.console import Console
    from rich.progress import track

    from analysis.archive import unpacked
    from analysis.report import check_folder, summary, write
    from analysis.rows import check_names, group
    from analysis.runs import Target, read
    from launch.errors import one_line

    # On a terminal a bar with the time left; elsewhere one line when it is done.
    progress = functools.partial(track, console=Console(stderr=True))
    targets = [Target(m[0], m[1], float(m[3]), lower=m[2] == "<") for m in matches if m is not None]
    try:
        check_folder(options.output)
        with unpacked(options.folders) as (folders, shown):
            runs, problems = read(
                folders,
                shown,
                options.unfinished,
                progress=functools.partial(progress, description="reading runs"),
            )
        groups = group(runs, problems, targets)
        if not groups:
            reasons = f", such as {problems[0].folder}: {problems[0].reason}" if problems else ""
            raise ValueError(f"there is no finished run in {', '.join(map(str, options.folders))}{reasons}")
        check_names(groups, options.baseline, targets)
        write(
            options.output,
            groups,
            problems,
            options.title,
            options.baseline,
            progress=functools.partial(progress, description="writing tables and pictures"),
        )
        print(summary(groups, problems))
        print(f"report: {options.output / 'report.html'}")
        if options.wandb:
            from analysis.upload import upload

            print(upload(options.output, options.wandb, options.title))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
