"""Checkpoint files: written whole or not at all, and read without running any code in them."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from experiment.folders import LAST, PREVIOUS

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


def check_checkpoint(path: Path, resume: bool, sharded: bool = False) -> None:
    """Check that ``path`` is a checkpoint that can be loaded, a file without running any code in it.

    A folder, of one part a process, is only checked for what a write that was cut short leaves out; torch reads parts
    of it by pickle, so that loading one of unknown origin can run code.

    Args:
        path: of the file or folder.
        resume: whether training goes on from it, which needs more than the weights.
        sharded: whether it is loaded by the strategy that writes such folders.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, not a checkpoint of Lightning, without what resuming needs, or a folder that is loaded by
            another strategy. Where the checkpoint before it is whole, the message offers that one.
    """
    if not path.exists():
        if resume and str(path) == "best":
            raise ValueError("best.ckpt holds weights alone, no state to resume from: say --ckpt_path last")
        raise FileNotFoundError(f"there is no checkpoint {path}{_offer(path, resume, sharded)}")
    parts = path.is_dir()
    if parts and not sharded:
        raise ValueError(
            f"{path} is in parts, one a process: lay configs/overlays/fsdp.yaml over the config, or make one file of"
            f" it: python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    try:
        # torch writes .metadata last of the tensors' files, and Lightning what is left after it.
        if parts and not (path / ".metadata").is_file():
            raise FileNotFoundError(path / ".metadata")
        checkpoint = torch.load(path / "meta.pt" if parts else path, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, or another program's{_offer(path, resume, sharded)}"
        ) from error
    needed = {"pytorch-lightning_version", *(() if parts else ("state_dict",))}
    if not isinstance(checkpoint, dict) or not needed <= set(checkpoint):
        raise ValueError(f"{path} holds no training run: give a .ckpt file from a run's checkpoints folder")
    # The optimizers' states are beside meta.pt, not in it; it has the schedulers, if only an empty list of them.
    if resume and not ("lr_schedulers" in checkpoint if parts else checkpoint.get("optimizer_states")):
        raise ValueError(f"{path} holds weights alone, no state to resume from: give the last.ckpt of a run")


def _offer(path: Path, resume: bool, sharded: bool) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name != LAST or not previous.exists():
        return ""
    try:
        check_checkpoint(previous, resume, sharded)
    except ValueError:
        return ""
    return f"; the one before it is whole: give {previous}, or delete the last one and say --ckpt_path last"
