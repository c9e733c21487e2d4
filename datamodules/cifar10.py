"""Load CIFAR-10, which torchvision downloads and verifies.

Images stay in memory as bytes. Batches are augmented on the device.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor

from datamodules.augmentation import Augmentation, ImageBatches, TrainingImages
from datamodules.batches import device_of
from datamodules.saved_split import check_same_split
from datamodules.token_cache import default_cache

ROOT_VARIABLE = "ARS2_CIFAR10_ROOT"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SIZE = 32


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Return a seeded order in which every prefix is stratified.

    The counts of the classes in a prefix differ by at most one.

    Args:
        labels: (examples,) int64. A class without further examples is left out from there on.
        seed: of the order within each class.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    among_its_class = F.one_hot(labels[shuffled]).cumsum(0).gather(1, labels[shuffled].unsqueeze(1)).squeeze(1)
    return shuffled[among_its_class.argsort(stable=True)]


class CIFAR10Data(L.LightningDataModule):
    """Provide batches of CIFAR-10.

    On their device they are (images (batch, 3, 32, 32) float32, labels (batch,) int64). Training images are augmented
    there, see :class:`datamodules.augmentation.Augmentation`, once for each batch, so that both passes of a step use
    the same images. All other images are only normalised.

    Args:
        root: folder for torchvision's ``cifar-10-batches-py``. ``None`` is the environment variable
            ``ARS2_CIFAR10_ROOT``, or else ``data/cifar10``.
        download: whether to download a missing data set.
        validation: ``"test"``, the 10,000 test images, as published, or ``"holdout"``, stratified images from the
            training set. ``test`` evaluates on the test images in both cases.
        holdout_examples: number of held-out images, at least 1.
        train_examples: number of stratified training images. ``None`` is all that are left.
        seed: of the hold-out, the choice of training images, the order and the augmentation.
        batch_size: images in a training batch, over all processes. The last short batch is used too.
        val_batch_size: images in any other batch.
        padding, flip, cutout: of the augmentation.
        on_device: store the images on the training device (184 MB) instead of copying every batch to it.
        images: image files for ``predict``, resized to 32 x 32. ``None`` is the first ten test images.

    Raises:
        ValueError: a value is out of range, or a file is damaged or not an image.
        FileNotFoundError: the data set is missing and cannot be downloaded.
    """

    task = "cifar"
    classes = CLASSES
    places = ("root",)
    words = ("train", "val", "test")

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        validation: Literal["test", "holdout"] = "test",
        holdout_examples: int = 5000,
        train_examples: int | None = None,
        seed: int = 42,
        batch_size: int = 256,
        val_batch_size: int = 1000,
        padding: int = 4,
        flip: bool = True,
        cutout: int = 16,
        on_device: bool = False,
        images: list[str] | None = None,
    ) -> None:
        super().__init__()
        if validation not in ("test", "holdout"):
            raise ValueError(f"validation must be 'test' or 'holdout', got {validation!r}")
        if holdout_examples < 1:
            raise ValueError(f"holdout_examples must be at least 1, got {holdout_examples}")
        if train_examples is not None and train_examples < 1:
            raise ValueError(f"train_examples must be at least 1, or null for all, got {train_examples}")
        if padding < 0:
            raise ValueError(f"padding must not be negative, got {padding}")
        if cutout < 0 or cutout % 2:
            raise ValueError(f"cutout must be an even number of pixels, or 0, got {cutout}")
        self.root = Path(root or os.environ.get(ROOT_VARIABLE) or "data/cifar10")
        self.download, self.validation, self.holdout_examples = download, validation, holdout_examples
        self.train_examples, self.seed = train_examples, seed
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.augmentation = Augmentation(MEAN, STD, padding, flip, cutout)
        self.on_device, self.images = on_device, images
        self.train_set: tuple[Tensor, Tensor]
        self.val_set: tuple[Tensor, Tensor]
        self.test_set: tuple[Tensor, Tensor]
        self._splits: dict[str, str] = {}

    def description(self) -> dict[str, Any]:
        """Return the images of the training and validation sets, in words."""
        return dict(self._splits)

    def state_dict(self) -> dict[str, Any]:
        """Return the options of the split for a checkpoint."""
        names = ("validation", "holdout_examples", "train_examples", "seed")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint was trained on this split.

        Without training, only validation on a hold-out depends on it.

        Raises:
            ValueError: it was trained on another one.
        """
        own = self.state_dict()
        stage = "fit" if self.trainer is None else self.trainer.state.fn
        if self.validation == "test":  # nothing is held out
            del own["holdout_examples"]
        if stage == "validate":
            del own["train_examples"]
        if stage == "fit" or (stage == "validate" and self.validation == "holdout"):
            check_same_split(state_dict, own)

    @property
    def _asks_about_files(self) -> bool:
        return self.images is not None and self.trainer is not None and self.trainer.predicting

    def prepare_data(self) -> None:
        """Download the data set if it is missing, and check its files.

        Raises:
            FileNotFoundError, ValueError: see the class.
        """
        if self._asks_about_files:
            return
        # Two runs that start at the same time download it once.
        cache = default_cache()
        cache.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(self.root.absolute()).encode()).hexdigest()[:16]
        with FileLock(cache / f"cifar10-{name}.lock"):
            self._prepare()

    def _prepare(self) -> None:
        folder = self.root / CIFAR10.base_folder
        files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        missing = [name for name, _ in files if not (folder / name).is_file()]
        for name, checksum in files:
            if name not in missing and not check_integrity(folder / name, checksum):
                raise ValueError(
                    f"{folder / name} is damaged (its MD5 sum is not the official one): delete it, and the next run"
                    " downloads it again"
                )
        if not missing:
            return
        reason = "data.download is false"
        if self.download:
            made = [path for path in (self.root, *self.root.parents) if not path.exists()]
            try:
                CIFAR10(self.root, download=True)
                return
            except (OSError, RuntimeError) as error:
                reason = f"it cannot be downloaded ({getattr(error, 'reason', error)})"
                for path in made:
                    with contextlib.suppress(OSError):
                        path.rmdir()
        raise FileNotFoundError(
            f"CIFAR-10 is not complete in {self.root} ({CIFAR10.base_folder}/{missing[0]} is missing) and {reason}:"
            f" run once with network access, or set --data.root or {ROOT_VARIABLE} to a folder that has it"
        )

    def setup(self, stage: str) -> None:
        """Read the images into memory (154 MB for the training set) and split them.

        Raises:
            ValueError: the options need more training images.
        """
        if self._asks_about_files:
            return
        self.val_set = self.test_set = self._read(train=False)
        validated = f"test set, as published ({len(self.test_set[0]):,} images)"
        if stage == "fit" or (stage == "validate" and self.validation == "holdout"):
            images, labels = self._read(train=True)
            val, train, _ = self._split(labels)
            wanted, held_out = len(train), len(val)
            self.train_set = images[train], labels[train]
            if held_out:
                self.val_set = images[val], labels[val]
                validated = f"hold-out from the training set, stratified, seed {self.seed} ({held_out:,} images)"
            self._splits["train"] = f"training set ({wanted:,} of {len(labels):,} images)"
        self._splits["val"] = validated

    def _split(self, labels: Tensor) -> list[Tensor]:
        """Return the numbers of the images to validate on, to train on, and of the others.

        They are sorted, so that images are in the order of the files.
        """
        order = stratified_order(labels, self.seed)
        held_out = self.holdout_examples if self.validation == "holdout" else 0
        wanted = len(order) - held_out if self.train_examples is None else self.train_examples
        if not 0 < wanted <= len(order) - held_out:
            left = max(0, len(order) - held_out)
            advice = f"at most {left} train_examples, got {wanted}" if left else "fewer holdout_examples"
            raise ValueError(
                f"{held_out} held-out images leave {left} of the {len(order)} training images: choose {advice}"
            )
        return [part.sort().values for part in order.tensor_split([held_out, held_out + wanted])]

    def unused(self) -> tuple[Tensor, Tensor]:
        """Return the training images that are neither trained on nor held out."""
        images, labels = self._read(train=True)
        *_, rest = self._split(labels)
        return images[rest], labels[rest]

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        source = CIFAR10(self.root, train=train)
        # Channels first and contiguous, because crops and normalisation work on planes.
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(source.targets)

    def batches(self, images: Tensor, labels: Tensor, training: bool = False, shared: bool = True) -> ImageBatches:
        """Return images in batches, with ``training`` shuffled and augmented."""
        device = device_of(self, self.on_device)
        return ImageBatches(
            images.to(device),
            labels.to(device),
            self.batch_size if training else self.val_batch_size,
            self.seed if training else None,
            self.augmentation if training else None,
            shared,
        )

    def train_dataloader(self) -> ImageBatches:
        """Return the training images, shuffled and augmented in each epoch."""
        return self.batches(*self.train_set, training=True)

    def val_dataloader(self) -> ImageBatches:
        """Return the test images or the hold-out, in a fixed order."""
        return self.batches(*self.val_set)

    def test_dataloader(self) -> ImageBatches:
        """Return the test images, in a fixed order."""
        return self.batches(*self.test_set)

    def predict_dataloader(self) -> ImageBatches:
        """Return the image files in their order, with label -1.

        By default, return the first ten test images with their labels. Every process gets all images.
        """
        if self.images is None:
            images, labels = self.test_set
            return self.batches(images[:10], labels[:10], shared=False)
        pixels = torch.stack([self._open(path) for path in self.images])
        return self.batches(pixels, torch.full((len(pixels),), -1), shared=False)

    def _open(self, path: str) -> Tensor:
        """Return an image file as (3, 32, 32) uint8.

        An image that is not square is cropped to its middle.
        """
        try:
            with Image.open(path) as file:
                image = ImageOps.fit(file.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        return pil_to_tensor(image)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment or only normalise the images on their device."""
        if isinstance(batch, TrainingImages):
            return self.augmentation.apply(batch.images, batch.draws), batch.labels
        images, labels = batch
        return self.augmentation.normalise(images), labels
