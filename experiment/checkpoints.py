"""Write checkpoint files atomically, and check them without running code in them."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from experiment.folders import LAST, PREVIOUS

PARTIAL = ".partial"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary file, flush and rename it, so that none is incomplete.

    Lightning's own plugin writes to the system's temporary folder and moves the file, which is a plain copy across file
    systems, and does not flush it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            OSError: it could not be written (full disk, no permission); ``path`` keeps its former content, and no
                temporary file is left.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        partial = target.with_name(target.name + PARTIAL)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            sync_folder(target.parent)
        except BaseException as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            if (cause := _os_error(error)) is not None:
                message = f"the checkpoint could not be written ({cause.strerror}); earlier ones are unchanged"
                raise OSError(cause.errno, message, str(target)) from error
            raise


def sync_folder(folder: Path) -> None:
    """Flush the directory entries of ``folder``, where the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the system error behind torch's exception about a failed write."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def check_checkpoint(path: Path, resume: bool, sharded: bool = False) -> None:
    """Check that a checkpoint can be loaded, without running code in it.

    A sharded checkpoint is a folder with one part for each process. Only its completeness is checked. torch reads
    parts of it by pickle, so loading one of unknown origin can run code.

    Args:
        path: of the file or folder.
        resume: whether to resume training from it, which needs more than weights.
        sharded: whether the strategy loads sharded checkpoints.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not Lightning's, lacks what resuming needs, or is a folder for another strategy. If
            the previous checkpoint is intact, the message names it.
    """
    if not path.exists():
        if resume and str(path) == "best":
            raise ValueError("training resumes from the last checkpoint, not the best one: give --ckpt_path last")
        raise FileNotFoundError(f"there is no checkpoint {path}{_offer(path, resume, sharded)}")
    parts = path.is_dir()
    if (path / "checkpoints").is_dir():
        raise ValueError(f"{path} is the folder of a run: give a file in {path / 'checkpoints'}")
    if parts and not sharded:
        raise ValueError(
            f"{path} is a sharded checkpoint: add --config configs/overlays/fsdp.yaml, or make one file of it with"
            f" python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    try:
        # torch writes .metadata after the tensors, and Lightning writes meta.pt after that.
        if parts and not (path / ".metadata").is_file():
            raise FileNotFoundError(path / ".metadata")
        checkpoint = torch.load(path / "meta.pt" if parts else path, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, or from another program"
            f"{_offer(path, resume, sharded)}"
        ) from error
    needed = {"pytorch-lightning_version", *(() if parts else ("state_dict",))}
    if not isinstance(checkpoint, dict) or not needed <= set(checkpoint):
        raise ValueError(
            f"{path} is not a checkpoint of a training run: give a .ckpt file from a run's checkpoints folder"
        )
    # meta.pt has the schedulers, perhaps an empty list; the optimizers' states are in other files.
    if resume and not ("lr_schedulers" in checkpoint if parts else checkpoint.get("optimizer_states")):
        raise ValueError(f"{path} contains only weights and no state to resume from: give the last.ckpt of a run")


def _offer(path: Path, resume: bool, sharded: bool) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name != LAST or not previous.exists():
        return ""
    try:
        check_checkpoint(previous, resume, sharded)
    except ValueError:
        return ""
    return f"; the previous one is intact: give {previous}, or delete the last one and give --ckpt_path last"
