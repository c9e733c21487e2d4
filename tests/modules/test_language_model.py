"""Check Qwen3 as a task.

The tests cover its loss, its tracks, complete texts, resuming, and data that does not fit.
"""

import functools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.text import Perplexity as PerplexityOfLogits

from ars2 import ARS2Neo, param_groups
from ars2.param_groups import assign
from callbacks.text_samples import TextSamples
from modules.language_model import LanguageModel
from modules.metrics import BitsPerByte, Perplexity, WordPerplexity
from tests.modules.language import SIZES, data, model, trainer
from tests.modules.small_task import assert_equal_states, make_optimizer, state_of


def rows(batch: int = 4, vocabulary: int = 320) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, 17), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.mark.parametrize("vocabulary", [320, 5000])
def test_the_first_loss_is_near_that_of_guessing(vocabulary: int) -> None:
    loss = model(vocabulary=vocabulary, width=64).compute_loss((rows(64, vocabulary),), None)
    assert abs(loss.item() - math.log(vocabulary)) < 0.2


def test_the_loss_is_the_mean_over_all_predicted_tokens_of_the_networks_logits() -> None:
    module = model()
    logits = module.network(input_ids=rows()[:, :-1].long()).logits
    expected = F.cross_entropy(logits.flatten(0, 1), rows()[:, 1:].flatten().long())
    torch.testing.assert_close(module.compute_loss((rows(),), None), expected)
    assert module.batch_size((rows(),)) == 4 * 16


def test_no_token_is_predicted_from_itself_or_a_later_one() -> None:
    module, tokens = model(), rows()[:, :-1].long()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 320
    before, after = (module.network.model(input_ids=x).last_hidden_state for x in (tokens, changed))
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_the_stated_mask_is_the_one_that_transformers_would_find() -> None:
    module, tokens = model(), rows()[:, :-1].long()
    hidden = module.network.model(input_ids=tokens).last_hidden_state.flatten(0, 1)
    expected = F.cross_entropy(hidden @ module.network.get_output_embeddings().weight.T, rows()[:, 1:].flatten().long())
    expected.backward()
    gradients = [param.grad for param in module.parameters()]
    module.zero_grad()
    module.compute_loss((rows(),), None).backward()
    for param, gradient in zip(module.parameters(), gradients, strict=True):
        torch.testing.assert_close(param.grad, gradient)


@pytest.mark.slow
def test_compiled_it_learns_and_draws_texts_without_compiling_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = model("sync", compile=True)
    names = set(module.state_dict())
    fit = trainer(max_epochs=2, precision="bf16-mixed", callbacks=[TextSamples()])
    fit.fit(module, datamodule=data(tmp_path, protocol="packed", val_batch_size=8))
    assert module.network.model._compiled_call_impl is not None
    assert set(module.state_dict()) == names
    assert fit.callback_metrics["train/loss"] < 0.95 * math.log(320)
    # One graph to train with and one to evaluate with; the texts, each token longer, are drawn without any.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_attention_is_that_of_torch_without_dropout() -> None:
    module = model()
    assert module.network.config._attn_implementation == "sdpa"
    assert module.network.config.attention_dropout == 0.0
    assert not [part for part in module.modules() if isinstance(part, torch.nn.Dropout)]


def test_perplexity_equals_that_of_torchmetrics_without_the_logits() -> None:
    module, metric, reference = model(), Perplexity(), PerplexityOfLogits()
    for batch in (4, 3):
        tokens = rows(batch)
        logits = module.network(input_ids=tokens[:, :-1].long()).logits.detach()
        reference.update(logits, tokens[:, 1:].long())
        metric.update(module.compute_loss((tokens,), None).detach(), tokens[:, 1:].numel())
    torch.testing.assert_close(metric.compute(), reference.compute())


def test_a_tied_weight_is_on_one_track_once() -> None:
    for policy, track in (("all", "matrix"), ("hidden", "vector")):
        found = [item for item in assign(model().network, policy) if "embed" in item.role or "head" in item.role]  # type: ignore[arg-type]
        assert [(item.role, item.track) for item in found] == [("tied embedding", track)]
    groups = param_groups(model().network, "all")
    assert sum(len(group["params"]) for group in groups) == len(list(model().network.parameters()))


def test_an_embedding_of_40479_rows_is_a_vector_even_of_policy_all() -> None:
    tracks = {item.role: item.track for item in assign(model(vocabulary=40_479).network, "all")}
    assert tracks == {"tied embedding": "vector", "hidden": "matrix", "bias or gain": "vector"}


def test_an_untied_unembedding_is_an_output_head() -> None:
    roles = [item.role for item in assign(model(tied_embeddings=False).network, "hidden")]
    assert roles.count("embedding") == roles.count("output head") == 1


def test_projections_per_head_compute_the_same_and_are_stacks() -> None:
    joint, per_head = model(), model(projections="per_head")
    torch.testing.assert_close(joint.compute_loss((rows(),), None), per_head.compute_loss((rows(),), None))
    stacks = {item.name: tuple(item.param.shape) for item in assign(per_head.network) if item.role == "stack"}
    assert len(stacks) == 3 * SIZES["layers"] and set(stacks.values()) == {(2, 8, 16)}
    assert not [item for item in assign(joint.network) if item.role == "stack"]


def test_each_head_is_orthogonalised_for_itself_only_per_head() -> None:
    """Only per head are the rows of the update orthogonal in each head.

    One step without decay moves by the energy times the orthogonal factor.
    """
    for projections, by_head in (("whole", False), ("per_head", True)):
        module = model(projections=projections, width=12)
        options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "mode": "base", "ns_steps": 20}
        optimizer = ARS2Neo(
            param_groups(module.network), **options, ns_coefficients="polar_express", ns_dtype="float32"
        )
        weight = module.network.model.layers[0].self_attn.q_proj.weight
        before = weight.detach().clone()
        module.compute_loss((rows(),), None).backward()
        optimizer.step()
        update = (weight.detach() - before).reshape(2, 8, 12)
        gram = update @ update.mT
        off_diagonal = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
        # 16 rows cannot be at right angles in 12 dimensions, 8 can.
        assert (off_diagonal.norm() < 1e-2 * gram.norm()) == by_head


@pytest.mark.parametrize("name", ["adamw", "muon", "aga"])
def test_every_optimizer_lowers_the_loss_of_the_text(name: str, tmp_path: Path) -> None:
    module = model(name)
    fit = trainer(max_epochs=2)
    fit.fit(module, data(tmp_path))
    assert fit.callback_metrics["val/loss"] < math.log(320) - 0.5


def test_mixed_precision_trains_as_well(tmp_path: Path) -> None:
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        fit = trainer(max_epochs=1, limit_train_batches=3, precision=precision)
        fit.fit(model("sync"), data(tmp_path))
        losses.append(fit.callback_metrics["val/loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def nats_by_hand(module: LanguageModel, stream: torch.Tensor) -> float:
    """Sum the losses of all tokens of a text but the first.

    The text is read in rows of 16 that share a token.
    """
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 16):
            row = stream[start : start + 17].long()
            logits = module.network(input_ids=row[None, :-1]).logits[0].double()
            total += F.cross_entropy(logits, row[1:], reduction="sum").item()
    return total


def test_perplexity_per_word_and_bits_per_byte_are_of_the_full_text(tmp_path: Path) -> None:
    module, corpus = model(), data(tmp_path, val_batch_size=5)
    corpus.setup("fit")
    metrics = trainer().validate(module, corpus, verbose=False)[0]
    text = (tmp_path / "text/wiki.valid.tokens").read_bytes()
    split = torch.from_numpy(corpus.tokens.splits["validation"].tokens)
    assert (len(split) - 1) % 16 and len(corpus.val_dataloader()) > 2, "the text must end in a row cut short"
    nats = nats_by_hand(module, split)
    words = len(text.split()) + text.count(b"\n")
    assert metrics["val/loss"] == pytest.approx(nats / (len(split) - 1), rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(nats / (len(split) - 1)), rel=1e-5)
    assert metrics["val/word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert metrics["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


@pytest.mark.parametrize("limit", [1, 2, 0.5])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_part_of_the_text_has_no_perplexity_per_word(tmp_path: Path, split: str, limit: float) -> None:
    limited, module, corpus = trainer(**{f"limit_{split}_batches": limit}), model(), data(tmp_path)
    part, complete = {"loss", "perplexity"}, {"loss", "perplexity", "word_perplexity", "bits_per_byte"}
    for stage, evaluate in (("val", limited.validate), ("test", limited.test)):
        metrics = evaluate(module, corpus, verbose=False)[0]
        assert metrics.keys() == {f"{stage}/{name}" for name in (part if stage == split else complete)}
        assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("tokens", [9, 11])
def test_a_text_seen_in_part_or_twice_has_no_perplexity_per_word(tokens: int) -> None:
    for metric in (WordPerplexity(tokens=10, units=5), BitsPerByte(tokens=10, units=50)):
        metric.update(torch.tensor(2.0), tokens)
        assert math.isnan(metric.compute())


def test_packed_rows_have_a_perplexity_per_token_only(tmp_path: Path) -> None:
    metrics = trainer().validate(model(), data(tmp_path, protocol="packed", batch_size=2), verbose=False)[0]
    assert set(metrics) == {"val/loss", "val/perplexity"}


class StopInMidEpoch(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_resuming_in_mid_epoch_changes_nothing(tmp_path: Path) -> None:
    name = "aga"
    uninterrupted = model(name)
    trainer(max_epochs=2).fit(uninterrupted, data(tmp_path))
    stop = StopInMidEpoch(5, tmp_path / "stopped.ckpt")
    trainer(max_epochs=2, callbacks=[stop]).fit(model(name), data(tmp_path))
    resumed = model(name)
    torch.manual_seed(9)
    trainer(max_epochs=2).fit(resumed, data(tmp_path), ckpt_path=stop.path, weights_only=True)
    assert_equal_states(state_of(resumed), state_of(uninterrupted))
    assert resumed.gradient_evaluations == uninterrupted.gradient_evaluations


def functional_by_hand(module: LanguageModel, optimizer: Any, members: list[torch.Tensor], window: int) -> None:
    """Make one step whose second pass has the gradient of the first with respect to the logits."""

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        return module.network(input_ids=tokens[:, :-1].long()).logits.flatten(0, 1)  # type: ignore[no-any-return]

    optimizer.zero_grad()
    slopes = []
    for tokens in members:
        logits = logits_of(tokens)
        logits.retain_grad()
        (F.cross_entropy(logits, tokens[:, 1:].flatten().long()) / window).backward()
        slopes.append(logits.grad)
    if not optimizer.never_two_pass and optimizer.wants_second_pass():
        optimizer.perturb()
        for tokens, slope in zip(members, slopes, strict=True):
            (logits_of(tokens) * slope).sum().backward()
        optimizer.restore()
    optimizer.step()


class Probe(L.Callback):
    """Probe the loss in training mode, as callbacks do, and record how many first passes are stored."""

    def __init__(self) -> None:
        self.stored: set[int] = set()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_index: int) -> None:
        before = len(pl_module._first_passes)
        pl_module.compute_loss(batch, None)
        assert len(pl_module._first_passes) == before

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.stored.add(len(pl_module._first_passes))


@pytest.mark.parametrize(
    ("name", "window", "tied"), [("sync", 1, True), ("sync", 3, False), ("periodic", 2, True), ("base", 3, True)]
)
def test_a_functional_second_pass_is_that_of_its_definition(name: str, window: int, tied: bool, tmp_path: Path) -> None:
    def double(second_loss: str) -> LanguageModel:
        module = model(tied_embeddings=tied, accumulate_grad_batches=window, second_loss=second_loss)
        module.make_optimizer = make_optimizer(name, ns_dtype="float32")
        return module.double()

    corpus = data(tmp_path)
    corpus.setup("fit")
    fits = {}
    for second_loss in ("functional", "same"):
        probe = Probe()
        fits[second_loss] = double(second_loss)
        fit = trainer(max_epochs=1, limit_train_batches=9, limit_val_batches=1, precision="64-true", callbacks=[probe])
        fit.fit(fits[second_loss], data(tmp_path))
        assert probe.stored == {0}
    module = double("functional")
    module.network.train()
    optimizer: Any = module.make_optimizer(param_groups(module.network, "all"))  # type: ignore[misc]
    batches = [tokens for (tokens,) in corpus.train_dataloader()][:9]
    for start in range(0, 9, window):
        functional_by_hand(module, optimizer, batches[start : start + window], window)
    for (label, found), expected in zip(
        fits["functional"].network.named_parameters(), module.network.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=label)
    functional, same = (torch.cat([p.flatten() for p in fits[kind].network.parameters()]) for kind in fits)
    assert torch.equal(functional, same) if name == "base" else (functional - same).abs().max() > 1e-3


def test_a_second_pass_without_its_first_is_refused() -> None:
    module = model("sync", second_loss="functional")
    module._is_second_pass = True
    with pytest.raises(RuntimeError, match="needs the first pass of the batch, which was not stored"):
        module.compute_loss((rows(),), None)


@pytest.mark.parametrize("name", ["vocabulary", "context"])
def test_data_for_another_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model.{name} and data.{name}"):
        trainer().validate(model(**{name: SIZES[name] - 1}), data(tmp_path), verbose=False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        *(({name: 0}, f"{name} must be at least 1") for name in ("vocabulary", "context", "layers", "width", "heads")),
        *(({name: 0}, f"{name} must be at least 1") for name in ("key_value_heads", "mlp_width", "sample_tokens")),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"heads": 3, "key_value_heads": 2}, "key_value_heads must divide heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"second_loss": "other"}, "second_loss must be 'same' or 'functional'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LanguageModel(optimizer=make_optimizer("adamw"), **{**SIZES, **options})
