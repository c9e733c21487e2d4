"""Define the levels that a metric should reach, for milestones and reports."""

import math
import re
from dataclasses import dataclass

_TARGET = re.compile(r"([^\s<>=]+)\s*(>=|<)\s*(\S+)")


@dataclass(frozen=True)
class Target:
    """Describe a level that a metric should reach.

    Args:
        name: in the report.
        metric: column of the log.
        level: to be met or exceeded, or to fall below if ``lower`` is better.
        lower: whether less is better.
    """

    name: str
    metric: str
    level: float
    lower: bool = False

    @classmethod
    def parse(cls, text: str, name: str | None = None) -> "Target":
        """Read a target such as ``val/accuracy >= 0.9``, which is also its default name.

        Raises:
            ValueError: the text is not of this form.
        """
        match = _TARGET.fullmatch(str(text).strip())
        try:
            if match is not None and math.isfinite(level := float(match[3])):
                return cls(name or match[0], match[1], level, lower=match[2] == "<")
        except ValueError:
            pass  # such as 1e
        example = "a metric, >= or <, and a number, such as 'val/loss < 0.2'"
        raise ValueError(f"a target is {example}; got {text!r}")

    def __str__(self) -> str:
        return f"{self.metric} {'<' if self.lower else '>='} {self.level:g}"
