"""Read the names of metrics."""

import re

_STAGE = re.compile(r"(train|val|test)_(?=\w)")


def with_slash(metric: str) -> str:
    """Return a metric's name with a slash, such as ``val/loss`` for ``val_loss``."""
    return _STAGE.sub(r"\1/", metric, count=1) if _STAGE.match(metric) else metric
