"""The Trainer makes the steps of a loop over ``passes``, bit for bit."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset
from transformers import BertConfig, BertForSequenceClassification, Seq2SeqTrainer, Trainer
from transformers import Seq2SeqTrainingArguments as Arguments
from transformers import TrainerCallback as Callback

from ars2 import ARS2Neo, Muon, param_groups
from ars2.transformers import TwoPassTrainer
from tests.helpers.launching import become, launch

STEPS, SIZE = 6, 4
MODES: dict[str, dict[str, Any]] = {
    "base": {"mode": "base"},
    "sync": {"mode": "sync", "rho": 0.1},
    "aga": {"mode": "aga", "rho": 0.1, "k": 3},
    "momentum": {"mode": "momentum", "rho": -0.1},
}


class Network(nn.Module):
    """Classify three tokens, with dropout and running statistics."""

    accepts_loss_kwargs = False

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(24, 16)
        self.statistics, self.dropout, self.classifier = nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4)
        for param in self.parameters():
            nn.init.normal_(param, std=0.5, generator=generator)

    def forward(self, tokens: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.statistics(self.hidden(self.embedding(tokens).flatten(1)))
        logits = self.classifier(self.dropout(hidden))
        if num_items_in_batch is None:
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        return {"loss": loss, "logits": logits}


class CountingNetwork(Network):
    """Divide the loss by the number of labels of the update."""

    accepts_loss_kwargs = True


class Examples(IterableDataset[dict[str, Tensor]]):
    """Give random tokens, of which some have no label."""

    number = 1000

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(self.number):
            tokens = torch.randint(0, 20, (3,), generator=generator)
            unlabelled = torch.rand((), generator=generator) < 0.2
            yield {"tokens": tokens, "labels": torch.tensor(-100) if unlabelled else tokens.sum() % 4}


def batches() -> Iterator[dict[str, Tensor]]:
    examples = iter(Examples())
    while True:
        rows = [next(examples) for _ in range(SIZE)]
        yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class SeedAtStart(Callback):
    """Seed when the first batch was loaded, because loaders draw a number too."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            torch.manual_seed(0)


def arguments(folder: Path, **options: Any) -> Arguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": SIZE,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return Arguments(**{**defaults, **options})


def optimizer_of(model: nn.Module, **options: Any) -> ARS2Neo:
    return ARS2Neo(param_groups(model, "hidden", head="classifier"), lr=0.01, ns_dtype="float32", **options)


def trainer_of(
    folder: Path, model: nn.Module, optimizer: Optimizer, trainer_class: type[Trainer] = TwoPassTrainer, **options: Any
) -> Any:
    return trainer_class(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Examples(),
        optimizers=(optimizer, None),
        callbacks=[SeedAtStart()],
    )


def train_by_hand(
    model: nn.Module,
    optimizer: ARS2Neo,
    micro_batches: int = 1,
    clip: float = 1.0,
    half: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """Return the loss of each step."""
    source, losses = batches(), []
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    torch.manual_seed(0)
    model.train()
    for _ in range(STEPS):
        window = [next(source) for _ in range(micro_batches)]
        items = torch.stack([batch["labels"].ne(-100).sum() for batch in window]).sum()
        optimizer.zero_grad()
        for number in optimizer.passes(model):
            total = torch.tensor(0.0)
            for batch in window:
                with nullcontext() if half is None else torch.autocast("cpu", half):
                    if model.accepts_loss_kwargs:
                        loss = model(**batch, num_items_in_batch=items)["loss"].float()
                    else:
                        loss = model(**batch)["loss"].float() / micro_batches
                scaler.scale(loss).backward()
                total += loss.detach()
            if number == 1:
                losses.append(total.item())
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    return losses


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    ("mode", "micro_batches"), [("base", 2), ("sync", 1), ("sync", 3), ("aga", 2), ("momentum", 2)]
)
@pytest.mark.parametrize("network", [Network, CountingNetwork])
def test_the_trainer_makes_the_steps_of_a_plain_loop(
    mode: str, micro_batches: int, network: type[nn.Module], tmp_path: Path
) -> None:
    model, expected = network(), network()
    optimizer, by_hand = optimizer_of(model, **MODES[mode]), optimizer_of(expected, **MODES[mode])
    trainer = trainer_of(tmp_path, model, optimizer, max_grad_norm=0.5, gradient_accumulation_steps=micro_batches)
    trainer.train()
    losses = train_by_hand(expected, by_hand, micro_batches, 0.5)
    assert_same(model, expected)
    assert optimizer.diagnostics() == by_hand.diagnostics()
    assert model.statistics.num_batches_tracked == STEPS * micro_batches
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-6)
    assert trainer.state.global_step == STEPS
    if not optimizer.never_two_pass:
        assert 0 < optimizer.diagnostics()["sync_steps"] <= STEPS


def test_autocast_to_bfloat16_equals_a_plain_loop(tmp_path: Path) -> None:
    model, expected = CountingNetwork(), CountingNetwork()
    trainer_of(tmp_path, model, optimizer_of(model, **MODES["sync"]), bf16=True).train()
    train_by_hand(expected, optimizer_of(expected, **MODES["sync"]), half=torch.bfloat16)
    assert_same(model, expected)


class ScalingTrainer(TwoPassTrainer):
    """Scale the loss on the host, which accelerate allows only on devices."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**16)
        self.accelerator.state._mixed_precision = "fp16"


def test_gradient_scaling_equals_a_plain_loop_and_skips_its_steps(tmp_path: Path) -> None:
    model, expected = CountingNetwork(), CountingNetwork()
    optimizer, by_hand = optimizer_of(model, **MODES["aga"]), optimizer_of(expected, **MODES["aga"])
    trainer = trainer_of(tmp_path, model, optimizer, ScalingTrainer)
    trainer.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    train_by_hand(expected, by_hand, half=torch.float16, scaler=scaler)
    assert_same(model, expected)
    assert 0 < optimizer.diagnostics()["steps"] == by_hand.diagnostics()["steps"] < STEPS
    assert trainer.accelerator.scaler.get_scale() == scaler.get_scale() < 2.0**16


def test_a_resumed_run_ends_as_one_without_interruption(tmp_path: Path) -> None:
    ends = []
    for resume in (False, True):
        model = CountingNetwork()
        options = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
        trainer = trainer_of(tmp_path, model, optimizer_of(model, **MODES["aga"]), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        ends.append((model, losses_of(trainer), trainer.optimizer.optimizer.diagnostics()))
    (model, losses, counters), (resumed, resumed_losses, resumed_counters) = ends
    assert_same(model, resumed)
    assert losses == resumed_losses and len(losses) == STEPS
    assert counters == resumed_counters


@pytest.mark.parametrize("network", [Network, CountingNetwork])
def test_an_update_may_begin_in_one_epoch_and_end_in_the_next(network: type[nn.Module], tmp_path: Path) -> None:
    # Trainer cannot know the length of the data. The second pass at the same point repeats the first gradient.
    models = network(), network()
    for model, options in zip(models, (MODES["base"], {"mode": "sync", "rho": 0.0}), strict=True):
        trainer = trainer_of(tmp_path, model, optimizer_of(model, **options), gradient_accumulation_steps=2)
        trainer.train_dataset.number = 3 * SIZE
        trainer.train()
    assert trainer.state.epoch > 5 and trainer.optimizer.optimizer.diagnostics()["sync_steps"] == STEPS
    assert_same(*models)


class Failing(CountingNetwork):
    """Fail at one of the calls."""

    calls, fail_at = 0, 0

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("fail_at", [2, 4])
def test_training_may_go_on_after_an_error_in_either_pass(fail_at: int, tmp_path: Path) -> None:
    model, expected = Failing(), CountingNetwork()
    model.fail_at, before = fail_at, [param.clone() for param in model.parameters()]
    trainer = trainer_of(tmp_path, model, optimizer_of(model, **MODES["sync"]), gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(map(torch.equal, before, model.parameters())) and not trainer.is_second_pass
    model.load_state_dict(expected.state_dict())  # the failed step updated running statistics
    trainer.train()
    train_by_hand(expected, optimizer_of(expected, **MODES["sync"]), 2)
    assert_same(model, expected)


class Recording(Seq2SeqTrainer):
    """Log in compute_loss, and record when gradients are exchanged."""

    exchanges: list[bool]

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.exchanges = [*getattr(self, "exchanges", []), getattr(model, "require_backward_grad_sync", True)]
        return super().training_step(model, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.log({"computed": 1.0})
        return super().compute_loss(*args, **kwargs)


class TwoPassRecording(TwoPassTrainer, Recording):
    """Make two passes in a subclass of Trainer."""


def test_a_subclass_of_trainer_repeats_its_step_but_logs_once(tmp_path: Path) -> None:
    model, expected = CountingNetwork(), CountingNetwork()
    trainer = trainer_of(tmp_path, model, optimizer_of(model, **MODES["sync"]), TwoPassRecording)
    trainer.train()
    assert sum("computed" in entry for entry in trainer.state.log_history) == STEPS
    assert len(trainer.exchanges) == 2 * STEPS
    train_by_hand(expected, optimizer_of(expected, **MODES["sync"]))
    assert_same(model, expected)


class DrawingTrainer(TwoPassTrainer):
    """Draw another number in second passes."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_second_pass:
            torch.rand(())
        return super().compute_loss(*args, **kwargs)


def test_later_draws_do_not_depend_on_the_second_pass(tmp_path: Path) -> None:
    following = []
    for mode in ("base", "sync"):
        model = CountingNetwork()
        trainer_of(tmp_path, model, optimizer_of(model, **MODES[mode]), DrawingTrainer).train()
        following.append(torch.rand(()))
    assert torch.equal(*following)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda params: Muon([{"params": params, "track": "vector"}])])
def test_an_optimizer_without_second_passes_trains_as_in_trainer(make: Any, tmp_path: Path) -> None:
    model, expected = CountingNetwork(), CountingNetwork()
    for network, trainer_class in ((model, TwoPassTrainer), (expected, Trainer)):
        trainer_of(tmp_path, network, make(network.parameters()), trainer_class).train()
    assert_same(model, expected)


@pytest.mark.parametrize("change", ["another model", "frozen"])
def test_an_optimizer_that_would_train_nothing_is_refused(change: str, tmp_path: Path) -> None:
    model = Network()
    optimizer = optimizer_of(Network() if change == "another model" else model)
    if change == "frozen":
        model.requires_grad_(False)
        model.extra = nn.Linear(2, 2)  # as a library that adapts a model does
    with pytest.raises(ValueError, match=r"no trainable parameter of the model: make its groups"):
        trainer_of(tmp_path, model, optimizer).train()


def test_trainer_itself_names_the_subclass_for_second_passes(tmp_path: Path) -> None:
    model = CountingNetwork()
    with pytest.raises(RuntimeError, match=r"ars2\.transformers\.TwoPassTrainer"):
        trainer_of(tmp_path, model, optimizer_of(model, **MODES["sync"]), Trainer).train()


def test_what_is_not_supported_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    model = CountingNetwork()
    trainer = trainer_of(tmp_path, model, optimizer_of(model, **MODES["sync"]))
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="not with DataParallel"):
        trainer.train()
    trainer = trainer_of(tmp_path, model, optimizer_of(model, **MODES["base"]))
    trainer.args._n_gpu = 2
    trainer.train()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "XLA"])
def test_sharded_models_are_an_error(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("sync", "momentum"):
        model = CountingNetwork()
        trainer = trainer_of(tmp_path, model, optimizer_of(model, **MODES[mode]))
        monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType[kind])
        with pytest.raises(ValueError, match=f"not with {kind}: .* torchrun"):
            trainer.training_step(model, next(batches()))


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=4, **sizes))


@pytest.mark.parametrize("optimizer_class", [ARS2Neo, Muon])
def test_groups_are_made_by_role_with_the_arguments_of_the_trainer(
    optimizer_class: type[Optimizer], tmp_path: Path
) -> None:
    args = arguments(tmp_path, weight_decay=0.03, lr_scheduler_type="linear", warmup_steps=2)
    trainer = TwoPassTrainer(bert(), args, optimizer_cls_and_kwargs=(optimizer_class, {"eps": 1e-7}))
    trainer.create_optimizer_and_scheduler(10)
    found = {
        name: (group["track"], group["weight_decay"], group["initial_lr"], group["eps"])
        for group in trainer.optimizer.param_groups
        for name in group["param_names"]
    }
    assert len(found) == len([*trainer.model.named_parameters()])
    assert found["bert.encoder.layer.0.output.dense.weight"] == ("matrix", 0.03, 0.01, 1e-7)
    assert found["bert.embeddings.word_embeddings.weight"] == ("vector", 0.03, 0.01, 1e-7)
    assert found["classifier.weight"] == ("vector", 0.03, 0.01, 1e-7)
    assert found["classifier.bias"] == found["bert.embeddings.LayerNorm.weight"] == ("vector", 0.0, 0.01, 1e-7)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0  # the warm-up begins


def test_options_of_the_optimizer_and_groups_of_its_user_come_first(tmp_path: Path) -> None:
    options = {"lr": 0.5, "weight_decay": 0.0}
    trainer = TwoPassTrainer(bert(), arguments(tmp_path), optimizer_cls_and_kwargs=(ARS2Neo, options))
    groups = trainer.create_optimizer().param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.5, 0.0)}
    model = bert()
    options = {"params": param_groups(model, "all", vector={"lr": 0.25}), "lr": 0.5}
    trainer = TwoPassTrainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(ARS2Neo, options))
    groups = trainer.create_optimizer().param_groups
    assert [(group["track"], group["lr"]) for group in groups] == [("matrix", 0.5), ("vector", 0.25)]
    assert "classifier.weight" in groups[0]["param_names"]


def test_trainer_itself_groups_by_shape_and_makes_the_schedule_of_an_optimizer(tmp_path: Path) -> None:
    args, model = arguments(tmp_path, weight_decay=0.03, lr_scheduler_type="linear", warmup_steps=2), bert()
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=(ARS2Neo, {"lr": 0.5}))
    with pytest.warns(UserWarning, match="their shapes decide"):
        groups = trainer.create_optimizer().param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.5, 0.03), (0.5, 0.0)}
    assert any(model.classifier.weight is param for param in groups[0]["params"]) and groups[0]["track"] == "matrix"
    optimizer = ARS2Neo(param_groups(model, "hidden"), lr=0.5)
    trainer = Trainer(model, args, optimizers=(optimizer, None))
    trainer.create_optimizer_and_scheduler(10)
    assert trainer.optimizer is optimizer
    assert {(group["lr"], group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        (0.0, 0.5, 0.1)
    }


def without_noise() -> CountingNetwork:
    model = CountingNetwork()
    model.dropout.p, model.statistics = 0.0, nn.Identity()
    return model


def train_rank(rank: int, ranks: int, port: int, folder: Path, mode: str) -> None:
    become(rank, ranks, port)
    model = without_noise()
    optimizer = optimizer_of(model, **MODES[mode])
    options = {"gradient_accumulation_steps": 2, "ddp_backend": "gloo", "seed": rank}
    trainer = trainer_of(folder, model, optimizer, TwoPassRecording, **options)
    trainer.train()
    assert optimizer.decides_alike
    results = {"parameters": [*model.parameters()], "losses": losses_of(trainer), "exchanges": trainer.exchanges}
    torch.save({**results, "counters": optimizer.diagnostics()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_with_their_batches(tmp_path: Path) -> None:
    first, second = launch(train_rank, 2, tmp_path, "aga")
    assert all(map(torch.equal, first["parameters"], second["parameters"]))
    expected = without_noise()
    optimizer = optimizer_of(expected, **MODES["aga"])
    losses = train_by_hand(expected, optimizer, micro_batches=4)
    for param, value in zip(first["parameters"], expected.parameters(), strict=True):
        torch.testing.assert_close(param, value, rtol=0.0, atol=5e-6)
    assert first["losses"] == pytest.approx(losses, rel=1e-5)
    passes = optimizer.diagnostics()["gradient_evaluations"]
    assert first["counters"]["gradient_evaluations"] == second["counters"]["gradient_evaluations"] == passes > STEPS
    assert first["exchanges"] == [False, True] * int(passes)


def test_without_transformers_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "ars2.transformers")
    with pytest.raises(ImportError, match=r"pip install 'ars2\[transformers\]'"):
        importlib.import_module("ars2.transformers")
