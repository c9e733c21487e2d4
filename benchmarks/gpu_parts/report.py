"""Write the results of a part as lines and as JSON, and isolate failures."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.gpu_parts import NUMBER

T = TypeVar("T")
NEEDS_GPU = "needs a GPU"


def one_line(error: BaseException) -> str:
    """Return the type and first line of an error; CUDA's later lines are advice."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def shown(value: Any, form: str = ".3f") -> str:
    """Return the text of a cell: a formatted number, a text, or "failed" for ``None``."""
    return "failed" if value is None else value if isinstance(value, str) else format(value, form)


def seconds_file(job: str) -> Path:
    """Return the file, in the shared cache, that gets the seconds of a compilation."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ".")) / f"{job.replace(' ', '-')}.seconds"


class Report:
    """Write the results of one part and keep its deadline.

    Args:
        part: name of the part.
        device: ``"cuda"`` or ``"cpu"``.
        small: whether this is a rehearsal at a tiny size.
        seconds: until the part is stopped.
    """

    def __init__(self, part: str, device: str, small: bool, seconds: float) -> None:
        self.part, self.device, self.small = part, device, small
        self.end = time.monotonic() + seconds
        self.failed = False

    @property
    def remaining(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def seconds(self, wanted: float) -> float:
        """Return how long to measure; a rehearsal makes the fewest repeats."""
        return 0.0 if self.small else wanted

    def line(self, text: str = "") -> None:
        """Write one line, unbuffered, so that a stopped part has written it."""
        print(text, flush=True)

    def row(self, label: str, cells: Sequence[str], width: int = 12) -> None:
        """Write one line of a table: a label and right-aligned cells."""
        self.line(f"  {label:<34}" + "".join(f" {cell:>{width}}" for cell in cells))

    def number(self, what: str, value: Any, **labels: Any) -> None:
        """Write one measured number to the JSON lines; leave out text and ``None``."""
        if isinstance(value, int | float):
            self.line(NUMBER + json.dumps({"part": self.part, "what": what, "value": value, **labels}))

    def check(self, label: str, passed: bool, found: str) -> None:
        """Write the result of a check; the part has failed if one does not pass."""
        self.failed = self.failed or not passed
        self.line(f"  {'pass' if passed else 'FAIL'}  {label}: {found}")

    def compiled_ahead(self, job: str) -> float | None:
        """Write and return the seconds of a cold compilation; ``None`` if it is not done."""
        file = seconds_file(job)
        seconds = float(file.read_text()) if file.exists() else None
        done = "not done" if seconds is None else f"{seconds:.1f} s"
        self.line(f"  {job}, compiled cold beside other parts: {done}")
        self.number("cold compilation s", seconds, job=job)
        return seconds

    def attempt(self, label: str, function: Callable[[], T], needs: float = 0.0, gpu: bool = False) -> T | str | None:
        """Return the result of ``function``, or ``None`` if it raises.

        Args:
            label: names the measurement in the line about its failure.
            function: makes the measurement.
            needs: seconds that must remain for it to start; the result is ``"no time"`` otherwise.
            gpu: whether it needs a GPU; without one the result is a text that says so.

        Raises:
            RuntimeError: the device does not respond any more, as after an illegal memory access.
        """
        if gpu and self.device != "cuda":
            return NEEDS_GPU
        if self.remaining < needs:
            return "no time"
        try:
            return function()
        except Exception as error:
            self.failed = True
            self.line(f"  {label}: failed: {one_line(error)}")
            traceback.print_exc(file=sys.stderr)
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as error:
                raise RuntimeError(f"the GPU does not respond any more ({one_line(error)})") from None
        return None
