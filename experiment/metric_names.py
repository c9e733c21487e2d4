"""Read the names of metrics."""

import re


def with_slash(metric: str) -> str:
    """Return a metric's name with a slash, such as ``val/loss`` for ``val_loss``."""
    return re.sub(r"^(train|val|test)_(?=\w)", r"\1/", metric)
