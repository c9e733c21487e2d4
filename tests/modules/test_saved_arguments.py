"""A checkpoint rebuilds its module without running code.

It needs no Trainer, no optimizer and no data.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from datamodules.cifar10 import CLASSES, CIFAR10Data
from datamodules.modular_addition import ModularAdditionData
from modules.image_classifier import ImageClassifier
from modules.language_model import LanguageModel
from modules.modular_addition import ModularAddition
from modules.saved_arguments import is_plain
from modules.two_pass import TwoPassModule
from tests.callbacks import fits
from tests.datamodules.tiny_cifar10 import tiny_cifar10, tiny_files  # noqa: F401
from tests.helpers.commands import AGA, TINY, metrics
from tests.helpers.commands import fit as fit_by_command
from tests.modules import language
from tests.modules.small_task import SmallTask, batches, fit, make_optimizer

ADAMW = make_optimizer("adamw")


def save(trainer: L.Trainer, path: Path) -> Path:
    trainer.save_checkpoint(path, weights_only=True)  # as the best one is saved
    torch.load(path, weights_only=True)  # loading it runs no code
    return path


def assert_same_weights(actual: TwoPassModule, expected: TwoPassModule) -> None:
    assert actual.network.state_dict().keys() == expected.network.state_dict().keys()
    for name, value in expected.network.state_dict().items():
        assert torch.equal(actual.network.state_dict()[name], value), name


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the best checkpoint of a run by the command."""
    return fit_by_command(tmp_path_factory.mktemp("runs"), *AGA, *TINY) / "checkpoints/best.ckpt"


def test_the_best_checkpoint_of_a_command_predicts(best: Path) -> None:
    module = ModularAddition.load_from_checkpoint(best).eval()
    weights = torch.load(best, weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    (answer,) = module.predict_step((torch.tensor([[3, 5, 7]]), torch.tensor([1])), 0)
    assert answer.startswith("3 + 5 = ") and "(mod 7)" in answer
    # It has the plain arguments of training; the others, and the optimizer, are in the config.
    assert (module.policy, module.vector) == ("all", {"betas": [0.9, 0.999], "weight_decay": 0.01})
    assert module.gradient_evaluations == 0


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("options", [{}, {"optimizer": ADAMW}], ids=["without", "with an optimizer"])
def test_a_loaded_module_is_evaluated_by_a_plain_trainer(name: str, options: Any, best: Path) -> None:
    module = ModularAddition.load_from_checkpoint(best.with_name(f"{name}.ckpt"), **options)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    (values,) = trainer.validate(module, ModularAdditionData(p=7, batch_size=8), verbose=False)
    logged = [row["val/loss"] for row in metrics(best.parent.parent) if "val/loss" in row]
    assert values["val/loss"] == pytest.approx(float(logged[0 if name == "best" else -1]), rel=1e-5)
    (answers,) = trainer.predict(module, ModularAdditionData(p=7, questions=["3+5"])) or []
    assert str(answers[0]).startswith("3 + 5 = ")
    if options:  # training after an evaluation
        trainer.fit(module, fits.data())
        assert trainer.global_step == 4


def test_a_checkpoint_of_another_class_is_refused(best: Path) -> None:
    with pytest.raises(ValueError, match=r"SmallTask has no argument 'p', .* with the class that wrote it"):
        SmallTask.load_from_checkpoint(best)


def test_a_loaded_module_can_be_trained_once_it_has_an_optimizer(best: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer.*load_from_checkpoint"):
        fits.fit(ModularAddition.load_from_checkpoint(best), fits.data(), [], None, 1)
    module = ModularAddition.load_from_checkpoint(best, optimizer=ADAMW)
    assert fits.fit(module, fits.data(), [], None, 1).global_step == 4
    assert module.gradient_evaluations == 4


@pytest.mark.usefixtures("tiny_cifar10")
def test_an_image_classifier_names_classes_without_the_data(tmp_path: Path) -> None:
    trained = ImageClassifier(width=2, optimizer=ADAMW, channels_last=True)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, num_sanity_val_steps=0, **quiet)
    trainer.fit(trained, CIFAR10Data(batch_size=16, train_examples=60))
    module = ImageClassifier.load_from_checkpoint(save(trainer, tmp_path / "run.ckpt")).eval()
    assert_same_weights(module, trained)
    lines = module.predict_step((torch.rand(3, 3, 32, 32), torch.tensor([-1, 0, 1])), 2)
    assert [line.partition(":")[0] for line in lines] == ["image 6", "image 7", "image 8"]
    assert all(any(f": {name} (" in line for name in CLASSES) for line in lines)


def test_a_language_model_continues_texts_without_the_data(tmp_path: Path) -> None:
    trained, data = language.model(projections="per_head"), language.data(tmp_path)
    trainer = language.trainer(max_steps=2)
    trainer.fit(trained, data)
    path = save(trainer, tmp_path / "run.ckpt")
    module = LanguageModel.load_from_checkpoint(path)
    assert_same_weights(module, trained)
    (prompt, *_) = data.prompt_tokens()
    assert module.continue_text(prompt) == trained.continue_text(prompt)
    assert module.tokenizer.encode("the").ids == data.tokens.tokenizer.encode("the").ids
    older = torch.load(path, weights_only=True)
    del older["WikiText2Data"]["tokenizer"]
    torch.save(older, path)
    with pytest.raises(ValueError, match="tokenizer"):
        LanguageModel.load_from_checkpoint(path).continue_text(prompt)


def test_an_older_checkpoint_takes_its_arguments_from_the_call(best: Path, tmp_path: Path) -> None:
    older = torch.load(best, weights_only=True)
    del older["hyper_parameters"]
    torch.save(older, path := tmp_path / "older.ckpt")
    with pytest.raises(ValueError, match=r"ModularAddition .*optimizer=None"):
        ModularAddition.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=r"\(2, 4, 8\) .*load_from_checkpoint\(\)"):
        ModularAddition.load_from_checkpoint(path, optimizer=None)
    module = ModularAddition.load_from_checkpoint(path, optimizer=None, p=7, width=8, heads=2, mlp_width=16)
    assert all(torch.equal(value, older["state_dict"][name]) for name, value in module.state_dict().items())


class Custom(SmallTask):
    """Have an argument that is not plain, and fix one of the base class."""

    def __init__(self, layer: nn.Module, sizes: tuple[int, ...] = (1,), **options: Any) -> None:
        super().__init__(dropout=0.5, **options)
        self.sizes = sizes


class Fixed(SmallTask):
    """Have no argument for the optimizer."""

    def __init__(self, lr: float) -> None:
        super().__init__(optimizer=make_optimizer("adamw", lr=lr))


class Tutorial(SmallTask):
    """Save its arguments by itself, as Lightning's tutorials do."""

    def __init__(self, width: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.save_hyperparameters()


class Around(nn.Module):
    def __init__(self, dropout: float, inner: float) -> None:
        super().__init__()
        self.inner = SmallTask(dropout=inner, optimizer=ADAMW)


def test_arguments_are_those_of_the_outermost_class_and_plain(tmp_path: Path) -> None:
    custom = Custom(nn.Linear(1, 1), (2, 3), optimizer=ADAMW, clip_first_pass=True)
    path = save(fit(custom), tmp_path / "custom.ckpt")
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved == {"sizes": (2, 3), "clip_first_pass": True, "optimizer": None}
    loaded = Custom.load_from_checkpoint(path, layer=nn.Linear(1, 1))
    assert (loaded.sizes, loaded.clip_first_pass, loaded.network.dropout.p) == ((2, 3), True, 0.5)
    fixed = Fixed.load_from_checkpoint(save(fit(Fixed(0.125)), tmp_path / "fixed.ckpt"))
    assert fixed.make_optimizer([torch.zeros(1, requires_grad=True)]).defaults["lr"] == 0.125
    tutorial = Tutorial.load_from_checkpoint(save(fit(Tutorial(5, optimizer=ADAMW)), tmp_path / "tutorial.ckpt"))
    assert tutorial.hparams["width"] == 5
    around = Around(0.25, inner=0.75)
    assert around.inner._arguments == {"dropout": 0.75, "optimizer": None}


class Saving(ModularAddition):
    """Save the options of the optimizer too, for Lightning's CLI to read."""

    def __init__(self, p: int = 7, width: int = 8, **options: Any) -> None:
        super().__init__(p=p, width=width, **options)
        self.save_hyperparameters()


def test_a_plain_lightning_cli_tests_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = ["--model.heads", "2", "--model.mlp_width", "16", "--data.p", "7", "--data.batch_size", "8"]
    sync = ["--model.optimizer", "ars2.ARS2Neo", "--model.optimizer.lr", "1e-3", "--model.optimizer.mode", "sync"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    options = [*network, *sync, *quiet, "--trainer.accelerator", "cpu", "--trainer.max_epochs"]
    LightningCLI(Saving, ModularAdditionData, args=["fit", *options, "1"])
    (path,) = map(str, tmp_path.glob("lightning_logs/*/checkpoints/*.ckpt"))
    tested = LightningCLI(Saving, ModularAdditionData, args=["test", *options, "1", "--ckpt_path", path])
    assert "test/loss" in tested.trainer.callback_metrics
    resumed = LightningCLI(Saving, ModularAdditionData, args=["fit", *options, "2", "--ckpt_path", path])
    assert (resumed.trainer.global_step, resumed.model.gradient_evaluations) == (4, 8)


def test_saved_arguments_do_not_affect_resuming(tmp_path: Path) -> None:
    trainer = fit(SmallTask(optimizer=ADAMW), epochs=1)
    again = SmallTask(optimizer=ADAMW, dropout=0.5)
    trainer.save_checkpoint(path := tmp_path / "run.ckpt")
    fit(again, epochs=2, ckpt_path=path)
    assert again.network.dropout.p == 0.5
    assert again.gradient_evaluations == 2 * len(batches())


@pytest.mark.parametrize("value", [None, True, 1.5, "a", [1, ("b", None)], {"a": [0.5]}])
def test_plain_values_consist_of_builtin_types(value: Any) -> None:
    assert is_plain(value)


@pytest.mark.parametrize("value", [torch.float32, Tensor(), Path("a"), {"a": make_optimizer}, [print], nn.ReLU])
def test_other_values_are_not_for_a_checkpoint(value: Any) -> None:
    assert not is_plain(value)
