"""Whatever the options or configs, there is a run or one readable line.

An error has a non-zero exit code, and there is never a traceback.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.commands import AGA, ROOT, TINY, Result, call

BASE = (
    *AGA,
    *TINY,
    "--trainer.max_epochs",
    "1",
    "--trainer.limit_train_batches",
    "1",
    "--trainer.limit_val_batches",
    "1",
)
FEW = settings(
    max_examples=3,
    derandomize=True,
    database=None,
    deadline=60_000,  # milliseconds: nothing hangs
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=100)
# Without trainer.devices: two would start the command of the tests as the other process of a run.
OPTIONS = (
    *("data.p", "data.train_fraction", "data.seed", "data.batch_size", "data.val_batch_size"),
    *("model.width", "model.heads", "model.mlp_width", "model.policy", "model.matrix", "model.vector"),
    *("model.gradient_clip_val", "model.gradient_clip_algorithm", "model.accumulate_grad_batches", "model.nonfinite"),
    *("model.clip_first_pass", "model.scheduler", "model.scheduler_interval", "model.optimizer"),
    *(f"model.optimizer.{name}" for name in ("lr", "betas", "eps", "weight_decay", "rho", "mode", "k", "alpha")),
    *(f"model.optimizer.{name}" for name in ("phi_beta", "phi_lambda", "phi_gamma", "ns_steps", "ns_dtype")),
    *("trainer.max_steps", "trainer.precision", "trainer.gradient_clip_val", "trainer.overfit_batches"),
    *("trainer.accelerator", "trainer.max_time", "trainer.val_check_interval", "trainer.callbacks"),
    *("checkpoint.monitor", "checkpoint.mode", "last_checkpoint.every_n_epochs", "last_checkpoint.every_n_steps"),
    *("internals.every_n_steps", "seed_everything", "experiment", "ckpt_path", "wandb"),
)
# Numbers stay small enough for a short run; values out of range are refused whatever their size.
VALUES = st.one_of(
    st.integers(-3, 40).map(str),
    st.floats(-2, 2).map(str),
    st.sampled_from(
        ["nan", "inf", "-inf", "1e400", "1e-400", "null", "true", "", " ", "[]", "{}", "[1, 2", "{a: ", "~"]
    ),
    st.sampled_from(["../x", "a/b", "\\", "'", '"', "%", "{0}", "!!python/object:os.system x", "&a [*a]", "1:2", "@"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0/", exclude_categories=["Cs"]), max_size=8),
)


def check(result: Result) -> None:
    """Check for a good run, or one line that a person can read."""
    assert "Traceback" not in result.out + result.err
    if result.code != 0:
        line = result.error
        assert 8 < len(line) < 1000
        assert "object at 0x" not in line


def any_value_of_an_option(option: str, value: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(call("fit", *BASE, "--runs", f"{folder}/runs", f"--{option}={value}"))


def any_name_of_an_option(name: str, value: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(call("fit", *BASE, "--runs", f"{folder}/runs", f"--{name}={value}"))


def damaged(text: str, draw: Any) -> str:
    """Damage a config as editors and people do.

    Lines are lost, doubled, moved or indented, and characters are changed.
    """
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        kind = draw(st.sampled_from(["drop", "double", "swap", "indent", "cut", "replace", "tab"]))
        if kind == "drop" and len(lines) > 1:
            del lines[at]
        elif kind == "double":
            lines.insert(at, lines[at])
        elif kind == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "indent":
            lines[at] = draw(st.sampled_from(["  ", " ", "- ", "      "])) + lines[at].strip()
        elif kind == "cut":
            lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
        elif kind == "replace":
            lines[at] = lines[at].split(":")[0] + ": " + draw(VALUES)
        else:
            lines[at] = "\t" + lines[at]
    return "\n".join(lines)


def any_damage_to_a_config(data: st.DataObject) -> None:
    text = damaged((ROOT / "configs/grok_aga.yaml").read_text(), data.draw)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(text, encoding="utf-8")
        # --config=, for otherwise TINY would be lost with the base config's.
        check(call("fit", "--config", config, *BASE[len(AGA) :], "--runs", f"{folder}/runs"))


DAMAGES = {
    any_value_of_an_option: {"option": st.sampled_from(OPTIONS), "value": VALUES},
    any_name_of_an_option: {"name": st.text("abcdefghijklmnop_.-=[]{}:+ ", max_size=20), "value": VALUES},
    any_damage_to_a_config: {"data": st.data()},
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_the_answer_is_a_run_or_one_line(examples: settings, damage: Callable[[], None]) -> None:
    # Settings and strategies decorate a function once.
    examples(given(**DAMAGES[damage])(damage))()


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"\x00" * 100, b"%PDF-1.4", b"- 1\n- 2\n", b"text", b"a: &a [*a]"]
)
def test_a_config_that_is_none(content: bytes, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(content)
    assert call("fit", *AGA, "--config", config, *TINY, "--runs", tmp_path / "runs").error
