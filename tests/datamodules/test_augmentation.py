"""Compare every transform with torchvision.transforms.v2.

They are compared image by image and in distribution. Batches do not depend on the process that makes them.
"""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2

from datamodules.augmentation import Augmentation, Draws, ImageBatches, TrainingImages
from datamodules.cifar10 import MEAN, STD
from tests.helpers.dispatched import Dispatched

AUGMENTATION = Augmentation(MEAN, STD)
NORMALISE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
# Chi-squared is below its degrees of freedom plus five of its deviations, sqrt(2 * freedom), all but never by chance.
DEVIATIONS = 5


def draw(count: int, augmentation: Augmentation = AUGMENTATION) -> Draws:
    return augmentation.draw(count, (32, 32), torch.Generator().manual_seed(3))


def images(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def places(count: int) -> torch.Tensor:
    """Return images whose first two channels number each pixel's row and column.

    They count from 1.
    """
    rows, columns = torch.meshgrid(torch.arange(1, 33), torch.arange(1, 33), indexing="ij")
    return torch.stack([rows, columns, rows]).to(torch.uint8).expand(count, -1, -1, -1)


def assert_same_distribution(actual: torch.Tensor, expected: torch.Tensor, cells: int) -> None:
    """Compare two samples of cell numbers by a chi-squared test.

    ``expected`` may have any size.
    """
    counts, others = (sample.bincount(minlength=cells).double() for sample in (actual, expected))
    ratio = len(actual) / len(expected)
    seen = counts + others > 0
    statistic = ((counts - others * ratio)[seen] ** 2 / ((counts + others * ratio**2)[seen])).sum()
    freedom = int(seen.sum()) - 1
    assert statistic < freedom + DEVIATIONS * (2 * freedom) ** 0.5


def test_a_batch_equals_the_v2_transforms_of_each_image() -> None:
    batch, (corners, flips, centres) = images(64), draw(64)
    augmented = AUGMENTATION.apply(batch, Draws(corners, flips, centres))
    for i, image in enumerate(batch):
        top, left = corners[i].tolist()
        expected = v2.functional.crop(v2.functional.pad(image, [4, 4, 4, 4]), top, left, 32, 32)
        expected = NORMALISE(v2.functional.horizontal_flip(expected) if flips[i] else expected)
        row, column = centres[i].tolist()
        rows, columns = range(max(row - 8, 0), min(row + 8, 32)), range(max(column - 8, 0), min(column + 8, 32))
        expected = v2.functional.erase(expected, rows[0], columns[0], len(rows), len(columns), torch.zeros(3, 1, 1))
        torch.testing.assert_close(augmented[i], expected, rtol=0, atol=2e-6)


def test_shifts_are_uniform_and_those_of_random_crop() -> None:
    torch.manual_seed(0)
    crop, cells = v2.RandomCrop(32, padding=4), []
    only_crop = Augmentation((0.0,) * 3, (1 / 255,) * 3, flip=False, cutout=0)
    for cropped in (
        only_crop.apply(places(8100), draw(8100, only_crop)),
        torch.stack([crop(image) for image in places(8100)]),
    ):
        shifts = cropped[:, :2, 16, 16].round().long() - 13
        assert shifts.min() == 0 and shifts.max() == 8
        cells.append(9 * shifts[:, 0] + shifts[:, 1])
    assert_same_distribution(cells[0], cells[1], 81)
    assert_same_distribution(cells[0], torch.arange(81).repeat(100_000), 81)


def test_half_of_the_images_are_flipped_as_by_random_horizontal_flip() -> None:
    torch.manual_seed(0)
    flip, cells = v2.RandomHorizontalFlip(), []
    only_flip = Augmentation((0.0,) * 3, (1 / 255,) * 3, padding=0, cutout=0)
    for flipped in (
        only_flip.apply(places(4000), draw(4000, only_flip)),
        torch.stack([flip(image) for image in places(4000)]),
    ):
        assert set(flipped[:, 1, 0, 0].round().long().tolist()) == {1, 32}
        cells.append((flipped[:, 1, 0, 0].round() == 32).long())
    assert_same_distribution(cells[0], cells[1], 2)
    assert_same_distribution(cells[0], torch.arange(2).repeat(1_000_000), 2)


def test_cutout_centres_are_uniform_over_the_image() -> None:
    _, _, centres = draw(102_400)
    assert_same_distribution(32 * centres[:, 0] + centres[:, 1], torch.arange(1024).repeat(10_000), 1024)


def test_cutout_is_clipped_at_the_border_and_filled_with_zero_after_normalisation() -> None:
    only_cutout = Augmentation(MEAN, STD, padding=0, flip=False)
    batch = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    centres = torch.tensor([[0, 0], [31, 16], [8, 24]])
    cut = only_cutout.apply(batch, Draws(torch.zeros(3, 2).long(), torch.zeros(3).long(), centres))
    expected = only_cutout.normalise(batch)
    assert (expected > 1).all()
    expected[0, :, :8, :8] = 0
    expected[1, :, 23:, 8:24] = 0
    expected[2, :, :16, 16:] = 0
    assert torch.equal(cut, expected)


def test_draws_do_not_depend_on_each_other() -> None:
    corners, flips, centres = draw(20_000)
    columns = torch.cat([corners, flips.unsqueeze(1), centres], dim=1).double().T
    correlation = columns.corrcoef() - torch.eye(5)
    assert correlation.abs().max() < DEVIATIONS / 20_000**0.5


def test_with_everything_off_an_image_is_only_normalised() -> None:
    off, batch = Augmentation(MEAN, STD, padding=0, flip=False, cutout=0), images(5)
    assert torch.equal(off.apply(batch, draw(5, off)), off.normalise(batch))
    torch.testing.assert_close(off.normalise(batch), NORMALISE(batch), rtol=0, atol=2e-6)


def loader(seed: int = 1) -> ImageBatches:
    """Load 22 images as two batches of 8 and one of 6."""
    return ImageBatches(images(22), torch.arange(22), 8, seed, AUGMENTATION)


def flat(batch: TrainingImages) -> torch.Tensor:
    """Return a batch as it trains.

    Its shape is (batch, 3 * 32 * 32 + 1), pixels and label.
    """
    return torch.cat([AUGMENTATION.apply(batch.images, batch.draws).flatten(1), batch.labels.unsqueeze(1)], dim=1)


def epoch(batches: ImageBatches) -> list[torch.Tensor]:
    return [flat(batch) for batch in batches]  # type: ignore[arg-type]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_images_depend_on_seed_epoch_and_batch_only() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = loader()
    epochs = [epoch(first), epoch(first)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again = loader()
    for seen in epochs:
        assert_equal(seen, epoch(again))


def test_the_draws_of_every_epoch_batch_and_seed_differ() -> None:
    batches = loader()
    drawn = [str(batch.draws) for _ in range(3) for batch in batches]  # type: ignore[attr-defined]
    drawn += [str(batch.draws) for batch in loader(seed=2)]  # type: ignore[attr-defined]
    assert len(set(drawn)) == 12


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_resuming_in_the_middle_of_an_epoch_gives_the_same_images(done: int) -> None:
    uninterrupted = loader()
    expected = [*epoch(uninterrupted), *epoch(uninterrupted)]
    stopped, seen = loader(), []
    while len(seen) < done:
        for batch in stopped:
            seen.append(flat(batch))  # type: ignore[arg-type]
            if len(seen) == done:
                break
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    while len(seen) < len(expected):
        seen += epoch(resumed)
    assert_equal(seen, expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one_process(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shares = epoch(loader()), []
    for rank in range(world_size):
        monkeypatch.setattr("datamodules.batches.world", lambda rank=rank: (rank, world_size))
        shares.append(epoch(loader()))
    assert_equal([torch.cat(parts) for parts in zip(*shares, strict=True)], alone)


class InAWorker(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(epoch(loader()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_process_makes_the_same_batches(workers: int) -> None:
    assert_equal(list(DataLoader(InAWorker(), batch_size=None, num_workers=workers)), epoch(loader()))


def test_a_batch_makes_no_tensor_from_python_numbers() -> None:
    """Such a tensor would wait for a GPU."""
    first, second, *_ = loader()
    AUGMENTATION.apply(first.images, first.draws)  # type: ignore[attr-defined]
    with Dispatched() as operations:
        torch.tensor([1.0])
        assert operations.count("lift_fresh") == 1
        AUGMENTATION.apply(second.images, second.draws)  # type: ignore[attr-defined]
        AUGMENTATION.normalise(second.images)  # type: ignore[attr-defined]
    assert operations.count("lift_fresh") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_images() -> None:
    batch: TrainingImages = next(iter(loader()))  # type: ignore[assignment]
    there = AUGMENTATION.apply(batch.images.cuda(), Draws(*(drawn.cuda() for drawn in batch.draws)))
    torch.testing.assert_close(there.cpu(), AUGMENTATION.apply(batch.images, batch.draws), rtol=0, atol=2e-6)


def test_without_a_seed_images_come_as_they_are() -> None:
    batches = ImageBatches(images(5), torch.arange(5), 3, None)
    pixels, labels = zip(*batches, strict=True)
    assert torch.equal(torch.cat(pixels), images(5)) and torch.cat(labels).tolist() == list(range(5))


def test_an_augmentation_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a seed"):
        ImageBatches(images(5), torch.arange(5), 3, None, AUGMENTATION)
