"""Crop, flip and Cutout of whole batches of images: drawn on the host, applied where the batch is."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.batches import TensorBatches


class Draws(NamedTuple):
    """What was drawn for a batch, int64 each: where to crop, whether to flip, where to cut out.

    ``corners`` (batch, 2): row and column of the crop's corner in the padded image, 0 to 2 * padding; ``flips``
    (batch,): 0 or 1; ``centres`` (batch, 2): row and column of the Cutout square's centre in the cropped image.
    """

    corners: Tensor
    flips: Tensor
    centres: Tensor


class TrainingImages(NamedTuple):
    """A batch on its way: ``images`` (batch, channels, height, width) uint8, ``labels`` (batch,) int64, ``draws``."""

    images: Tensor
    labels: Tensor
    draws: Draws


@functools.cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``values`` of channels in [0, 1] as a tensor (channels, 1, 1) for bytes; made once a device.

    Making a tensor from Python numbers on a GPU waits until the GPU has finished its queue.
    """
    return torch.tensor(values, device=device).view(-1, 1, 1) * 255


class Augmentation(NamedTuple):
    """A random crop after padding with black, a horizontal flip, normalisation, and one Cutout square.

    Cutout (DeVries and Taylor 2017) fills a square with zeros after normalisation; its centre is uniform over the
    image, and what of it lies outside is lost.

    Args:
        mean, std: of each channel, for images in [0, 1].
        padding: pixels on each side before the crop; 0 does not move the image.
        flip: whether every second image, on average, is mirrored.
        cutout: side of the square in pixels, even; 0 cuts nothing out.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 4
    flip: bool = True
    cutout: int = 16

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        """Draw for ``count`` images of ``size`` (height, width)."""
        corners = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        flips = torch.randint(2 if self.flip else 1, (count,), generator=generator)
        rows, columns = (torch.randint(length, (count,), generator=generator) for length in size)
        return Draws(corners, flips, torch.stack([rows, columns], dim=1))

    def normalise(self, images: Tensor) -> Tensor:
        """Map ``images`` uint8 to float32 of zero mean and unit deviation; nothing random."""
        mean, std = (_of_channels(tuple(values), images.device) for values in (self.mean, self.std))
        return images.float().sub_(mean).div_(std)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Return ``images`` (batch, channels, height, width) uint8 as float32: cropped, flipped, normalised, cut."""
        height, width = images.shape[-2:]
        corners, flips, centres = draws
        if self.padding:
            padded = F.pad(images, [self.padding] * 4)
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)
            images = windows[torch.arange(len(images), device=images.device), :, corners[:, 0], corners[:, 1]]
        if self.flip:
            images = torch.where(flips.bool().view(-1, 1, 1, 1), images.flip(3), images)
        normalised = self.normalise(images)
        if self.cutout:
            inside = [
                (torch.arange(length, device=images.device) - centre.unsqueeze(1) + self.cutout // 2) // self.cutout
                == 0
                for length, centre in ((height, centres[:, 0]), (width, centres[:, 1]))
            ]
            square = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
            normalised.masked_fill_(square.unsqueeze(1), 0.0)
        return normalised


class ImageBatches(TensorBatches):
    """A loader over images and labels.

    With an augmentation, every batch comes with what was drawn for it: from the seed, the epoch and the number of the
    batch alone, so that a run resumed in the middle of an epoch, and one on more processes, trains on the same images.

    Args:
        images: (examples, channels, height, width) uint8.
        labels: (examples,) int64.
        batch_size: examples to a batch, of all processes together; the last short batch is kept.
        seed: of the order and the augmentation; ``None`` keeps the given order and augments nothing.
        augmentation: what to draw for.
        shared: whether several processes share every batch; if not, each is given all of it.

    Raises:
        ValueError: as for :class:`datamodules.batches.TensorBatches`, or an augmentation without a seed.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int | None,
        augmentation: Augmentation | None = None,
        shared: bool = True,
    ) -> None:
        super().__init__((images, labels), batch_size, seed, shared=shared)
        if augmentation is not None and seed is None:
            raise ValueError("an augmentation needs a seed")
        self.augmentation = augmentation

    def _batch(self, examples: Tensor, mine: slice) -> tuple[Tensor, ...]:
        images, labels = super()._batch(examples, mine)
        if self.augmentation is None or self.seed is None:
            return images, labels
        # Mixed as the order's seed is; drawn for all processes, so that their number changes nothing.
        number = (self.seed * 1_000_003 + self.epoch) * 1_000_003 + self.done
        generator = torch.Generator().manual_seed(number % 2**63)
        size = (images.shape[2], images.shape[3])
        draws = self.augmentation.draw(len(examples), size, generator)
        return TrainingImages(images, labels, Draws(*(drawn[mine] for drawn in draws)))  # type: ignore[return-value]
