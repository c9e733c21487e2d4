"""Errors of the parser, torch and Lightning become one line.

It names the place and the remedy.
"""

from pathlib import Path

import pytest
from torch import nn

from launch.errors import one_line, option_names
from tests.helpers.commands import AGA, TINY, call
from tests.helpers.marks import slow


def refused(*arguments: str) -> str:
    """Return the complete line for a command that the parser refuses."""
    result = call("fit", *AGA, *TINY, *arguments)
    assert result.code == 2
    return result.error


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--trainer.max_epochs", "many"], "trainer.max_epochs: expected int; got many"),
        slow(["--model.width", "wide"], "width: expected int; got wide"),
        (["--model.optimizer.betas", "[0.9]"], "betas: Expected a tuple with 2 elements; got [0.9]"),
        (["--seed_everything", "x"], "seed_everything: expected bool or int; got x"),
        (
            ["--model.policy", "hiden"],
            "policy: expected one of 'all', 'hidden'; got hiden; did you mean hidden?",
        ),
        slow(["--model.widht", "8"], "Option 'widht' is not accepted; did you mean width?"),
        (
            ["--model.optimiser.lr", "1"],
            "unrecognized arguments: --optimiser.lr=1; did you mean optimizer.lr?",
        ),
        (
            ["--model.init_args.optimiser.init_args.lr", "1"],
            "unrecognized arguments: --optimiser.init_args.lr=1; did you mean optimizer.init_args.lr?",
        ),
        (
            ["--modle.optimizer.lr", "1"],
            "unrecognized arguments: --modle.optimizer.lr 1; did you mean model.optimizer.lr?",
        ),
        slow(["--foo", "3"], "unrecognized arguments: --foo 3"),
        (
            ["--trainer.max_epoch", "3"],
            "unrecognized arguments: --trainer.max_epoch 3; did you mean trainer.max_epochs?",
        ),
        (
            ["--config", "{trainer: {max_epoch: 3}}"],
            "Subcommand 'fit' does not accept option 'trainer.max_epoch'; did you mean trainer.max_epochs?",
        ),
        (
            ["--config", "{data: {init_argz: {p: 7}}}"],
            "Option 'init_argz.p' is not accepted; did you mean init_args.p?",
        ),
        (
            ["--trainer.callbacks+=callbacks.milestones.GrokingMilestones"],
            "trainer.callbacks: module 'callbacks.milestones' has no attribute 'GrokingMilestones'; "
            "got callbacks.milestones.GrokingMilestones; did you mean GrokkingMilestones?",
        ),
        (["--model", "Transformer"], "model: there is no class Transformer (a class is given by its full path)"),
        (
            ["--model.scheduler", "torch.optim.lr_scheduler.CosineAnnealingLR"],
            "the following arguments are required: T_max",
        ),
    ],
)
def test_the_parser_is_brief(arguments: list[str], line: str) -> None:
    assert refused(*arguments) == f"error: {line}"


def test_a_missing_config_is_asked_for() -> None:
    assert call("fit").error.endswith("name a config, such as --config configs/grok_aga.yaml")
    # Before the config there is no model that the option could belong to.
    assert "first name a config" in call("fit", "--model.p", "7", *AGA).error


def test_a_subcommand_gets_a_hint() -> None:
    assert call("fitt", *AGA).error.endswith("did you mean fit?")


class Network(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 4, bias=bias), nn.Linear(4, width, bias=False)


def difference(of: nn.Module, to: nn.Module) -> str:
    with pytest.raises(RuntimeError) as error:
        to.load_state_dict(of.state_dict())
    return one_line(error.value)


def test_another_network_is_identified_by_its_first_tensor() -> None:
    line = difference(of=Network(8, bias=False), to=Network(16, bias=False))
    assert line == (
        "the checkpoint is from a different network than the configs: first.weight is [4, 8] in the"
        " checkpoint and [4, 16] in the model (2 tensors differ)"
    )
    assert "it lacks first.bias" in difference(of=Network(8, bias=False), to=Network(8, bias=True))
    assert "it also has first.bias" in difference(of=Network(8, bias=True), to=Network(8, bias=False))


def test_a_metric_that_is_not_logged_is_answered_with_the_nearest(tmp_path: Path) -> None:
    result = call("fit", *AGA, *TINY, "--runs", tmp_path, "--checkpoint.monitor", "val/accuraci")
    assert "checkpoint.monitor is val/accuraci, which is not logged; did you mean val/accuracy?" in result.error


def test_other_errors_are_named_by_their_type() -> None:
    assert one_line(ValueError("too\n  small")) == "too small"
    assert one_line(KeyError("width")) == "KeyError: 'width'"
    assert one_line(KeyError("there is no such thing")) == "there is no such thing"
    assert one_line(TypeError("wrong type")) == "TypeError: wrong type"
    assert one_line(RuntimeError()) == "RuntimeError"
    assert one_line(FileNotFoundError(2, "No such file or directory", "x.yaml")) == "x.yaml: No such file or directory"
    assert len(one_line(ValueError("long " * 1000))) < 600


def test_option_names_include_the_base_classes() -> None:
    assert {"p", "width", "optimizer", "scheduler_interval"} <= option_names("modules.modular_addition.ModularAddition")
    assert {"lr", "betas", "weight_decay"} <= option_names("torch.optim.AdamW")
    assert option_names("torch.optim.NoSuchThing") == option_names("nothing.of.the.kind") == option_names("x") == set()


def test_a_good_command_prints_nothing_on_standard_error(tmp_path: Path) -> None:
    assert call("fit", *AGA, *TINY, "--runs", tmp_path).err == ""


def test_a_full_disk_is_reported_with_the_file_that_failed_first() -> None:
    full = OSError(28, "No space left on device")
    assert one_line(full, folder="runs/mine") == "runs/mine: No space left on device"
    try:
        try:
            raise OSError(28, "No space left on device", "last.ckpt")
        except OSError:
            raise full  # noqa: B904
    except OSError as error:
        assert one_line(error) == "last.ckpt: No space left on device"
