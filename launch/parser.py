"""Parse the command line, with errors in one line."""

import sys
from argparse import SUPPRESS
from enum import Enum
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from experiment.library_internals import actions_of
from launch.error_report import locate
from launch.errors import explain, one_line

DEBUG = "--debug"


class Parser(LightningArgumentParser):
    """Report errors in one line, and refuse abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        # main() removes this option, so that it may come anywhere and is no part of the config.
        kwargs["epilog"] = f"{DEBUG} anywhere in the command prints the traceback of an error before its line."
        super().__init__(*args, **kwargs)

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """Add the options of a class, without defaults that no config can contain."""
        added = super().add_class_arguments(*args, **kwargs)
        for action in actions_of(self):
            # heavyball has a bare object for "not given". pytorch-optimizer has lambdas, whose address would make each
            # run a setting of its own, and enums for numbers.
            number = isinstance(action.default, Enum) and isinstance(action.default, int)
            if number or type(action.default) is object or getattr(action.default, "__name__", "") == "<lambda>":
                action.default = SUPPRESS
        return added

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Print the error and exit with code 2."""
        source, place = (None, "") if ex is None else locate(ex)
        # The parser would describe what it tried with an exception of the user's code.
        text = one_line(source) if source and place else explain(message, self)
        print(f"error: {text}{place}", file=sys.stderr)
        raise SystemExit(2)
