"""Checkpoint files: written whole or not at all, and read without running any code in them."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

LAST, PREVIOUS = "last.ckpt", "last-previous.ckpt"
PARTIAL = ".partial"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file's place, brings it to the disk, and then renames: there is never half a checkpoint.

    Lightning's own writes to the system's temporary folder and moves the file from there, which is a plain copy where
    that is another file system, and leaves the file to the system's cache.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            OSError: it could not be written (a full disk, a folder without permission); what was at ``path`` is as it
                was, and nothing else is left behind.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        partial = place.with_name(place.name + PARTIAL)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, place)
            bring_to_disk(place.parent)
        except BaseException as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            if (cause := _os_error(error)) is not None:
                said = f"the checkpoint could not be written ({cause.strerror}); earlier ones are as they were"
                raise OSError(cause.errno, said, str(place)) from error
            raise


def bring_to_disk(folder: Path) -> None:
    """Make sure that the names in ``folder`` outlast a power failure, where the system can promise that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the system's error behind what torch raises when a write fails."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def last_checkpoint(folder: Path) -> Path | None:
    """Return what a run in ``folder`` goes on from: its last checkpoint, or the one before where that is missing."""
    paths = (folder / "checkpoints" / name for name in (LAST, PREVIOUS))
    return next((path for path in paths if path.exists()), None)


def check_checkpoint(path: Path, resume: bool) -> None:
    """Check that ``path`` is a checkpoint that can be loaded without running any code in it.

    Args:
        path: of the file.
        resume: whether training goes on from it, which needs more than the weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, not a checkpoint of Lightning, or without what resuming needs. Where the checkpoint before
            it is whole, the message offers that one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}{_offer(path, resume)}")
    try:
        checkpoint = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, or another program's{_offer(path, resume)}"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(checkpoint):
        raise ValueError(f"{path} holds no training run: give a .ckpt file from a run's checkpoints folder")
    if resume and not checkpoint.get("optimizer_states"):
        raise ValueError(f"{path} holds weights alone, no state to resume from: give the last.ckpt of a run")


def _offer(path: Path, resume: bool) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name != LAST or not previous.is_file():
        return ""
    try:
        check_checkpoint(previous, resume)
    except ValueError:
        return ""
    return f"; the one before it is whole: give {previous}, or delete the last one and say --ckpt_path last"
