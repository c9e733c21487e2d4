"""Augment batches of images by crop, flip and Cutout.

Parameters are drawn on the host and applied on the device of the batch.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.batches import TensorBatches


class Draws(NamedTuple):
    """Collect the random parameters of a batch, each int64.

    ``corners`` (batch, 2) are row and column of the crop's corner in the padded image, 0 to 2 * padding. ``flips``
    (batch,) are 0 or 1. ``centres`` (batch, 2) are row and column of the Cutout square's centre in the cropped image.
    """

    corners: Tensor
    flips: Tensor
    centres: Tensor


class TrainingImages(NamedTuple):
    """Describe a batch before its augmentation.

    ``images`` (batch, channels, height, width) are uint8, ``labels`` (batch,) int64, and ``draws`` the parameters.
    """

    images: Tensor
    labels: Tensor
    draws: Draws


@functools.cache
def _channel_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``values`` of channels in [0, 1] as a tensor (channels, 1, 1) for bytes.

    It is cached, because making a tensor from Python numbers synchronises with a GPU.
    """
    return torch.tensor(values, device=device).view(-1, 1, 1) * 255


class Augmentation(NamedTuple):
    """Apply a random crop, a horizontal flip, normalisation, and Cutout.

    The crop is taken after padding with black. Cutout (DeVries and Taylor 2017) fills one square with zeros after
    normalisation. Its centre is uniform over the image, and any part outside is ignored.

    Args:
        mean, std: of each channel, for images in [0, 1].
        padding: pixels on each side before the crop; 0 disables the crop.
        flip: whether to mirror half of the images on average.
        cutout: side of the square in pixels, even; 0 disables Cutout.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 4
    flip: bool = True
    cutout: int = 16

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Draws:
        """Draw the parameters for ``count`` images of ``size`` (height, width)."""
        corners = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        flips = torch.randint(2 if self.flip else 1, (count,), generator=generator)
        rows, columns = (torch.randint(length, (count,), generator=generator) for length in size)
        return Draws(corners, flips, torch.stack([rows, columns], dim=1))

    def normalise(self, images: Tensor) -> Tensor:
        """Map ``images`` uint8 to float32 of zero mean and unit deviation."""
        mean, std = (_channel_tensor(tuple(values), images.device) for values in (self.mean, self.std))
        return images.float().sub_(mean).div_(std)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Return ``images`` after crop, flip, normalisation and Cutout.

        They are (batch, channels, height, width), in uint8 before and in float32 after.
        """
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
    """Load batches of images and labels.

    With an augmentation, every batch includes its random parameters. They depend only on the seed, the epoch and the
    number of the batch. So a run resumed in the middle of an epoch, or run on more processes, trains on the same
    images.

    Args:
        images: (examples, channels, height, width) uint8.
        labels: (examples,) int64.
        batch_size: examples in a batch, over all processes. The last short batch is used too.
        seed: of the order and the augmentation. ``None`` keeps the given order and does not augment.
        augmentation: the augmentation, if any.
        shared: whether several processes share every batch. If not, each gets all of it.

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
            raise ValueError("an augmentation needs a seed: set one")
        self.augmentation = augmentation

    def _batch(self, examples: Tensor, local: slice) -> tuple[Tensor, ...]:
        images, labels = super()._batch(examples, local)
        if self.augmentation is None or self.seed is None:
            return images, labels
        # Mixed like the seed of the order. Drawn for the batch of all processes, so that their number has no effect.
        number = (self.seed * 1_000_003 + self.epoch) * 1_000_003 + self.done
        generator = torch.Generator().manual_seed(number % 2**63)
        size = (images.shape[2], images.shape[3])
        draws = self.augmentation.draw(len(examples), size, generator)
        return TrainingImages(images, labels, Draws(*(drawn[local] for drawn in draws)))  # type: ignore[return-value]
