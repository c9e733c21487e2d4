import csv
import random
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from callbacks.loss_surface import LossSurface, plane_around
from datamodules.batches import TensorBatches
from tests.callbacks.fits import data, fit, module
from tests.helpers.commands import AGA, TINY, call, folders, train_py
from tests.helpers.commands import fit as fit_by_command
from tests.modules import small_task
from tests.modules.small_task import SmallTask, make_optimizer

PNG = b"\x89PNG\r\n\x1a\n"


def trained(folder: Path, seeds: tuple[int, ...] = (0,)) -> list[str]:
    """Return checkpoints of short runs from different starts."""
    paths = []
    for seed in seeds:
        model = module()
        torch.manual_seed(seed)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1 * torch.randn_like(param))
        trainer = fit(model, data(), [], None, epochs=3)
        paths.append(str(folder / f"{seed}.ckpt"))
        trainer.save_checkpoint(paths[-1])
    return paths


def trainer_with(folder: Path, callbacks: list[Any]) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=CSVLogger(str(folder.parent), name="", version=folder.name),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def surface(folder: Path) -> list[tuple[float, float, float]]:
    with (folder / "loss_surface.csv").open(encoding="utf-8") as file:
        return [(float(row["x"]), float(row["y"]), float(row["loss"])) for row in csv.DictReader(file)]


def loss_at(model: Any, tensors: list[Tensor], batch: Any) -> float:
    named = dict(zip([name for name, _ in model.network.named_parameters()], tensors, strict=True))
    with torch.no_grad():
        return F.cross_entropy(torch.func.functional_call(model.network, named, (batch[0],)), batch[1]).item()


def first_batch() -> Any:
    return next(iter(data().train_dataloader()))


def weights(path: str) -> list[Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return [state[f"network.{name}"] for name, _ in module().network.named_parameters()]


def test_around_a_checkpoint_the_losses_are_those_at_the_points(tmp_path: Path) -> None:
    (path,) = trained(tmp_path)
    model = module()
    trainer_with(tmp_path / "run", [LossSurface(radius=0.5, points=5, seed=3)]).test(model, data(), ckpt_path=path)
    points = surface(tmp_path / "run")
    grid = [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert [(x, y) for x, y, _ in points] == [(x, y) for y in grid for x in grid]
    start = weights(path)
    first, second = plane_around(start, module_of(start), "", 0.5, 3).directions
    for x, y, loss in points:
        moved = [p + x * a + y * b for p, a, b in zip(start, first, second, strict=True)]
        assert loss == pytest.approx(loss_at(model, moved, first_batch()), rel=1e-4)
    assert points[12][2] == pytest.approx(loss_at(model, start, first_batch()), rel=1e-6)


def module_of(tensors: list[Tensor]) -> Any:
    """Return the module whose parameters are ``tensors`` themselves.

    It is used for its assignment of tracks.
    """
    model = module()
    owners = {id(param): owner for owner in model.network.modules() for param in owner.parameters(recurse=False)}
    for i, (name, param) in enumerate(list(model.network.named_parameters())):
        tensors[i] = torch.nn.Parameter(tensors[i])
        setattr(owners[id(param)], name.rpartition(".")[2], tensors[i])
    return model


def test_through_three_checkpoints_the_losses_are_those_in_their_plane(tmp_path: Path) -> None:
    paths = trained(tmp_path, (0, 1, 2))
    model, callback = module(), LossSurface(paths[1:], points=4, batches=3)
    trainer_with(tmp_path / "run", [callback]).test(model, data(), ckpt_path=paths[0])
    flat = [torch.cat([w.flatten() for w in weights(path)]).double() for path in paths]
    e1 = flat[1] - flat[0]
    width, e1 = e1.norm().item(), e1 / e1.norm()
    e2 = flat[2] - flat[0] - ((flat[2] - flat[0]) @ e1) * e1
    height, e2 = e2.norm().item(), e2 / e2.norm()
    points = surface(tmp_path / "run")
    assert len(points) == 16
    assert points[0][1] == pytest.approx(-0.25 * height, rel=1e-4)
    assert points[-1][1] == pytest.approx(1.25 * height, rel=1e-4)
    assert points[-1][0] > width > 0 > points[0][0]
    batches = [batch for _, batch in zip(range(3), data().train_dataloader(), strict=False)]
    together = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    sizes = [w.numel() for w in weights(paths[0])]
    for x, y, loss in points:
        parts = (flat[0] + x * e1 + y * e2).float().split(sizes)
        moved = [part.view_as(w) for part, w in zip(parts, weights(paths[0]), strict=True)]
        assert loss == pytest.approx(loss_at(model, moved, together), rel=1e-4)


def test_the_picture_is_one(tmp_path: Path) -> None:
    paths = trained(tmp_path, (0, 1, 2))
    for name, callback in {"around": LossSurface(points=3), "plane": LossSurface(paths[1:], points=3)}.items():
        trainer_with(tmp_path / name, [callback]).test(module(), data(), ckpt_path=paths[0])
        content = (tmp_path / name / "loss_surface.png").read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Compare parameters, BatchNorm, modes, random states and test metrics.

    They are the same as without the callback.
    """
    seen: list[Any] = []
    model = SmallTask(0.3, optimizer=make_optimizer("adamw"))
    small_task.fit(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for callbacks in ([], [LossSurface(split="test", points=3)]):
        L.seed_everything(1)
        trainer = trainer_with(tmp_path / str(len(callbacks)), callbacks)
        (result,) = trainer.test(model, TensorBatches(small_task.data(), 8, None), verbose=False)
        modes = [part.training for part in model.modules()]
        seen.append((result, torch.get_rng_state().tolist(), random.getstate(), modes))
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
    assert seen[0] == seen[1]


def test_batchnorm_uses_the_batch_and_dropout_is_off(tmp_path: Path) -> None:
    model = SmallTask(0.3, optimizer=make_optimizer("adamw"))
    small_task.fit(model)
    images, classes = small_task.data()
    trainer_with(tmp_path / "run", [LossSurface(split="test", points=3)]).test(
        model, TensorBatches((images, classes), 8, None)
    )
    model.network.train()
    model.network.dropout.eval()
    here = {x: loss for x, y, loss in surface(tmp_path / "run") if y == 0}[0.0]
    assert here == pytest.approx(F.cross_entropy(model.network(images[:8]), classes[:8]).item(), rel=1e-5)
    model.network.eval()
    assert here != pytest.approx(F.cross_entropy(model.network(images[:8]), classes[:8]).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": ["one"]}, "two paths besides the tested one, got 1"),
        ({"radius": 0.0}, "radius must be above 0, got 0"),
        ({"points": 1}, "points must be at least 2, got 1"),
        ({"batches": 0}, "batches must be at least 1, got 0"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSurface(**options)


def test_training_batches_need_a_data_module(tmp_path: Path) -> None:
    model = SmallTask(optimizer=make_optimizer("adamw"))
    with pytest.raises(ValueError, match="needs a data module"):
        trainer_with(tmp_path / "run", [LossSurface()]).test(model, small_task.batches())


@pytest.mark.slow
def test_as_a_person_uses_it(tmp_path: Path) -> None:
    last = [
        fit_by_command(tmp_path, *AGA, *TINY, "--seed_everything", seed) / "checkpoints/last.ckpt" for seed in (1, 2)
    ]
    use = (*AGA, *TINY, "--runs", tmp_path / "tests", "--trainer.callbacks+=callbacks.loss_surface.LossSurface")
    use = (*use, "--trainer.callbacks.points", 3)
    result = call("test", *use, "--ckpt_path", last[0])
    assert result.code == 0, result.err
    (folder,) = folders(tmp_path / "tests")
    assert f"loss surface: {folder / 'loss_surface.png'}" in result.out
    assert {"loss_surface.csv", "loss_surface.png"} <= {path.name for path in folder.iterdir()}
    # Reported before anything is tested, and no folder is left.
    others = f"[{last[1]}, {last[1]}x]"
    result = call("test", *use, "--ckpt_path", last[0], "--trainer.callbacks.checkpoints", others)
    assert result.error == f"error: there is no checkpoint {last[1]}x"
    result = call("fit", *use)
    assert result.error == "error: LossSurface draws around a tested checkpoint: use it with python train.py test"
    assert folders(tmp_path / "tests") == [folder]


@pytest.mark.slow
def test_the_picture_is_logged_to_wandb(tmp_path: Path) -> None:
    folder = fit_by_command(tmp_path, *AGA, *TINY)
    use = (*AGA, *TINY[: TINY.index("--wandb")], "--wandb", "true", "--runs", tmp_path / "tests")
    use = (*use, "--trainer.callbacks+=callbacks.loss_surface.LossSurface", "--trainer.callbacks.points", 3)
    result = train_py("test", *use, "--ckpt_path", folder / "checkpoints/last.ckpt", home=tmp_path)
    assert result.code == 0, result.err
    (run,) = folders(tmp_path / "tests")
    deadline = time.monotonic() + 10
    while not (found := list(run.glob("wandb/offline-run-*/files/media/images/loss_surface_*.png"))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert found[0].read_bytes() == (run / "loss_surface.png").read_bytes()
