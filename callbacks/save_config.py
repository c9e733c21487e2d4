"""Beside a run's config: the protocol under which its numbers were made, the data's contents included."""

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

# Larger folders are told by the names and sizes of their files.
_MOST_BYTES = 4 << 30


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` as Lightning does, and ``protocol.yaml``: a digest and what it is made of.

    That is the options of data, network and evaluation, and the contents of the data: what the data module's
    ``description()`` returns, or for one without it the digest of every file and folder that its options name. The
    places themselves do not count: a data module with a ``description()`` may name these options in ``places``, and in
    ``words`` the entries of its description that are for people alone.

    The options follow from the config; they are kept so that an edited config is noticed.
    """

    _found: RunIdentity | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check, on every process, that a run that goes on from a checkpoint is of the protocol of its former part.

        Raises:
            ValueError: it is of another one.
        """
        if stage == "fit" and not self.already_saved and self.config.get("ckpt_path"):
            _check_resumed(Path(str(self.config["ckpt_path"])), self._identity(trainer))
        super().setup(trainer, pl_module, stage)

    def _identity(self, trainer: L.Trainer) -> RunIdentity:
        if self._found is None:  # asked for twice by a run that goes on, and reading the data takes time
            config = resolve_config(self.parser, self.config)
            self._found = RunIdentity(config, *recorded_data(vars(trainer).get("datamodule"), config))
        return self._found

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write ``protocol.yaml`` to the run folder; called on the first process alone."""
        identity = self._identity(trainer)
        content = {"digest": identity.protocol_digest, "places": sorted(identity.places or ()), **identity.protocol}
        folder = folder_of(trainer)
        assert folder is not None  # else Lightning would have refused to save the config
        (folder / "protocol.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def recorded_data(data: Any, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the contents of the data, by dotted key, and the options that say where it is.

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
    """Tell a path, or a list of them, from a word that happens to be the name of a folder here."""
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
    mine, theirs = (_not_to_change(identity) for identity in (here, there))
    # What an older run did not record is not known to be another.
    known = [key for key in {**theirs, **mine} if key in theirs or not key.startswith(CONTENTS)]
    others = [key for key in known if theirs.get(key) != mine.get(key)]
    if others:
        told = ", ".join(f"{key} ({theirs.get(key)} there, {mine.get(key)} here)" for key in others[:3])
        raise ValueError(
            f"the run of {checkpoint} was another one: {told}; go on with its own options, or start a new run"
        )


def _not_to_change(identity: RunIdentity) -> dict[str, Any]:
    """Return what a run keeps when it goes on: protocol, training step and optimizer, whose state has its options."""
    model = {key: value for key, value in identity.setting.items() if key.startswith("model")}
    return {**identity.protocol, **model, "data.seed": identity.options.get("data.seed")}
