"""Check that a checkpoint was trained on the split that a run uses."""

from collections.abc import Mapping
from typing import Any


def check_same_split(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that the options of the split are those that a checkpoint was trained with.

    With others, its training examples may be among those that it is evaluated on, or a resumed epoch has other ones.

    Args:
        saved: options that the checkpoint was trained with. Checkpoints of older versions lack some.
        own: options of this run, by their names under ``data``.

    Raises:
        ValueError: one of them differs.
    """
    for name, value in own.items():
        if saved.get(name, value) != value:
            trained = "null" if saved[name] is None else saved[name]
            raise ValueError(
                f"the checkpoint was trained with data.{name} {trained}, which chooses other training examples than"
                f" {'null' if value is None else value}: set --data.{name} {trained}"
            )
