"""How a run appears on Weights & Biases: its name, group and tags, and its config as keys to filter and group by."""

from collections.abc import Mapping
from typing import Any

from experiment.identity import RunIdentity


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` without its ``init_args`` levels: a class is ``class``, its options stand beside that.

    So the learning rate is ``model.optimizer.lr`` there, and not a part of a text.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key == "class_path":
            flat["class"] = value
        elif isinstance(value, Mapping):
            flat |= nested(value) if key == "init_args" else {key: nested(value)}
        else:
            flat[key] = value
    return flat


def init_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``wandb.init`` is told of a run with this resolved config.

    The name is task, optimizer and seed, such as ``cifar-ars2_sync-s0``; the group everything but the seed, with a
    digest of the settings; tags are task, optimizer, protocol, and the search that the run is a trial of. The config
    has these by themselves too: ``task``, ``optimizer``, ``group``, ``seed``, ``protocol``.
    """
    identity = RunIdentity(config)
    about = {
        "task": identity.task,
        "optimizer": identity.optimizer,
        "group": identity.group,
        "seed": identity.seed,
        "protocol": identity.protocol_digest,
    }
    tags = [identity.task, identity.optimizer, f"protocol {identity.protocol_digest}"]
    if identity.sweep is not None:
        tags.append(f"sweep {identity.sweep.name}"[:64])  # the longest that W&B takes
    return {"name": identity.name, "group": identity.group, "tags": tags, "config": {**nested(config), **about}}
