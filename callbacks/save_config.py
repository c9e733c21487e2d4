"""Save a run's config and the protocol under which its numbers are made."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from callbacks.lookup import folder_of
from experiment.identity import CONTENTS, RunIdentity, contents_of, flatten, resolve_config

# The digest of a larger folder has only the names and sizes of its files.
_MOST_BYTES = 4 << 30


class SaveConfig(SaveConfigCallback):
    """Write ``config.yaml`` as Lightning does, and ``protocol.yaml`` beside it.

    The protocol file has a digest and what the digest is made of: the options of data, network and evaluation, and the
    contents of the data. The contents are what the data module's ``description()`` returns. For a data module without
    it, they are digests of the files and folders that its options name.

    The location of the data is not part of the protocol. A data module with a ``description()`` may list the options
    that locate data in ``places``, and the entries of its description that are only for readers in ``words``.

    The options could be computed from the config. They are stored so that an edited config is detected.
    """

    _found: RunIdentity | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check on every rank that a resumed run keeps its protocol, model and optimizer.

        Raises:
            ValueError: the checkpoint is of a run with others.
        """
        if stage == "fit" and not self.already_saved and self.config.get("ckpt_path"):
            _check_resumed(Path(str(self.config["ckpt_path"])), self._identity(trainer))
        super().setup(trainer, pl_module, stage)

    def _identity(self, trainer: L.Trainer) -> RunIdentity:
        if self._found is None:  # A resumed run needs it twice, and reading the data takes time.
            config = resolve_config(self.parser, self.config)
            self._found = RunIdentity(config, *recorded_data(vars(trainer).get("datamodule"), config))
        return self._found

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write ``protocol.yaml`` to the run folder, on rank zero alone."""
        identity = self._identity(trainer)
        content = {"digest": identity.protocol_digest, "places": sorted(identity.places or ()), **identity.protocol}
        folder = folder_of(trainer)
        assert folder is not None  # Lightning refuses to save a config without a folder.
        (folder / "protocol.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def recorded_data(data: Any, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the contents of the data by dotted key, and the options that locate it.

    Args:
        data: the data module after its ``setup()``; ``None`` if there is none.
        config: the resolved config.
    """
    options = dict(flatten({"data": config.get("data") or {}}))
    paths = {key: value for key, value in options.items() if key != "data" and _are_paths(value)}
    description = getattr(data, "description", None)
    if callable(description):
        named = [f"data.{name}" for name in getattr(data, "places", ())]
        return contents_of(description(), getattr(data, "words", ())), [*named, *paths]
    return {key.removeprefix("data."): _digest(value) for key, value in paths.items()}, list(paths)


def _are_paths(value: Any) -> bool:
    """Return whether an option is an existing path, or a list of them.

    A plain word may happen to be the name of a folder, and does not count.
    """
    if isinstance(value, list):
        return len(value) > 0 and all(map(_are_paths, value))
    if not isinstance(value, str) or not (os.sep in value or Path(value).suffix):
        return False
    return Path(value).expanduser().exists()


def _digest(value: str | list[str]) -> str:
    digest = hashlib.sha256()
    for path in [value] if isinstance(value, str) else value:
        root = Path(path).expanduser()
        files = [(file.relative_to(root).as_posix(), file) for file in _files(root)]
        small = sum(file.stat().st_size for _, file in files) <= _MOST_BYTES
        for name, file in files:
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            if small:
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
    else:
        yield from sorted(path for path in root.rglob("*") if path.is_file())


def _check_resumed(checkpoint: Path, here: RunIdentity) -> None:
    folder = checkpoint.parent.parent
    if not (folder / "config.yaml").is_file():
        return
    path = folder / "protocol.yaml"
    stored = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    there = RunIdentity.recorded(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")), stored)
    now, before = _fixed_options(here), _fixed_options(there)
    # An older run may not have recorded the contents of its data.
    known = [key for key in {**before, **now} if key in before or not key.startswith(CONTENTS)]
    changed = [key for key in known if before.get(key) != now.get(key)]
    if changed:
        listed = ", ".join(f"{key} ({before.get(key)} there, {now.get(key)} here)" for key in changed[:3])
        raise ValueError(
            f"{checkpoint} is of a run with other options: {listed}; resume it with its original options, or start a"
            " new run"
        )


def _fixed_options(identity: RunIdentity) -> dict[str, Any]:
    """Return the options that a resumed run must keep.

    These are the protocol, the training step, and the optimizer, whose options are in its state.
    """
    model = {key: value for key, value in identity.setting.items() if key.startswith("model")}
    return {**identity.protocol, **model, "data.seed": identity.options.get("data.seed")}
