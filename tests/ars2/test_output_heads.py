"""Find the output heads of a model.

They are named by the user, declared by the model, or guessed and reported as guessed.
"""

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ars2 import param_groups, report
from ars2.output_heads import find_heads
from ars2.param_groups import assign


def heads(model: nn.Module, head: Any = None) -> set[str]:
    """Return the names of the parameters that are output heads."""
    return {item.name for item in assign(model, "hidden", head) if item.role == "output head"}


class HeadFirst(nn.Module):
    """Register the head before the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"animals": nn.Linear(8, 3), "plants": nn.Linear(8, 5)})


# --- named ---


def test_a_named_head_is_taken() -> None:
    model = HeadFirst()
    assert heads(model, "head") == heads(model, model.head) == {"head.weight"}
    assert heads(model, ["head", model.down]) == {"head.weight", "down.weight"}
    assert heads(model, []) == set()
    groups = param_groups(model, "hidden", head="head")
    matrices = next(group for group in groups if group["track"] == "matrix")["params"]
    assert [name for name, _ in matrices] == ["up.weight", "down.weight"]
    assert heads(TwoHeads(), "heads") == {"heads.animals.weight", "heads.plants.weight"}


def test_a_wrong_head_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'haed'.*'head'"):
        param_groups(HeadFirst(), head="haed")
    with pytest.raises(ValueError, match="Linear"):
        param_groups(HeadFirst(), head=nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"head .*got int"):
        param_groups(HeadFirst(), head=[1])  # type: ignore[list-item]


# --- guessed ---


def test_a_guessed_head_is_reported_as_guessed() -> None:
    guess = report(HeadFirst(), "hidden").splitlines()[-2]
    assert "'down' is a guess" in guess and "head='down'" in guess
    assert "guess" not in report(HeadFirst(), "hidden", head="head")
    with pytest.warns(UserWarning, match="'down'") as caught:
        param_groups(HeadFirst(), "hidden")
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize(
    "model_of",
    [
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 5)), nn.BatchNorm1d(5)),
        lambda: nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Linear(4, 5)]),
        lambda: nn.Linear(3, 4),
    ],
)
def test_unambiguous_heads_are_not_reported_as_guessed(model_of: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model_of(), "hidden")
        param_groups(HeadFirst(), "all")
        param_groups(HeadFirst(), "hidden", head="head")


def test_a_linear_layer_tied_to_an_embedding_is_the_head() -> None:
    model = HeadFirst()
    model.tokens = nn.Embedding(3, 8)
    model.head.weight = model.tokens.weight
    assert find_heads(model) == (frozenset({model.head}), None)
    assert "down.weight" not in heads(model)


def test_heads_beside_each_other_are_all_found() -> None:
    assert heads(TwoHeads()) == {"heads.animals.weight", "heads.plants.weight"}


# --- transformers ---

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(name: str, **options: Any) -> Any:
    config = transformers.BertConfig(vocab_size=50, **SIZES, **options)
    return getattr(transformers, name)(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BertForSequenceClassification", {"classifier.weight"}),
        ("BertForTokenClassification", {"classifier.weight"}),
        ("BertForMultipleChoice", {"classifier.weight"}),
        ("BertForQuestionAnswering", {"qa_outputs.weight"}),
        ("BertForPreTraining", {"cls.seq_relationship.weight"}),  # its decoder is tied to the embedding
        ("BertModel", set()),
    ],
)
def test_a_classifier_of_transformers_has_its_head_outside_of_its_base(name: str, expected: set[str]) -> None:
    model = bert(name)
    assert heads(model) == expected and find_heads(model).guessed is None


DISTILBERT = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}
GPT2 = {
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 8,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA, VIT = {"vocab_size": 50, **SIZES}, {"image_size": 8, "patch_size": 4, **SIZES}


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("DistilBertForSequenceClassification", ("DistilBertConfig", DISTILBERT), {"classifier.weight"}),
        ("GPT2ForSequenceClassification", ("GPT2Config", GPT2), {"score.weight"}),
        ("GPT2LMHeadModel", ("GPT2Config", GPT2), {"transformer.wte.weight"}),
        ("LlamaForCausalLM", ("LlamaConfig", LLAMA | {"tie_word_embeddings": True}), {"model.embed_tokens.weight"}),
        ("LlamaForCausalLM", ("LlamaConfig", LLAMA), {"lm_head.weight"}),
        ("ViTForImageClassification", ("ViTConfig", VIT | {"num_labels": 3}), {"classifier.weight"}),
    ],
)
def test_heads_and_embeddings_of_transformers_are_vectors_and_hidden_layers_matrices(
    name: str, config: tuple[str, dict[str, Any]], expected: set[str]
) -> None:
    model = getattr(transformers, name)(getattr(transformers, config[0])(**config[1]))
    items = assign(model, "hidden")
    assert {item.name for item in items if item.role in ("output head", "tied embedding")} == expected
    assert {item.role for item in items if item.track == "matrix"} <= {"hidden", "convolution"}
    vectors = {item.role for item in items if item.track == "vector" and item.param.ndim > 1}
    assert vectors <= {"output head", "tied embedding", "embedding", "token or position"}
    assert find_heads(model).guessed is None


class WithPart(nn.Module):
    """Declare its head, which is registered before a part that declares others."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(16, 3)
        self.parts = nn.ModuleList([part])


class HeadlessWrapper(nn.Module):
    """Declare no head, around a model that declares one.

    A subclass of PreTrainedModel may do so.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = self.base_model = model

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize(
    ("name", "expected"),
    [("BertModel", {"own.weight"}), ("BertForSequenceClassification", {"parts.0.classifier.weight"})],
)
def test_heads_declared_by_submodules_are_found(name: str, expected: set[str]) -> None:
    model = WithPart(bert(name))
    assert heads(model) == expected and find_heads(model).guessed is None


def test_a_head_inside_of_a_model_that_declares_none_is_found() -> None:
    outer = HeadlessWrapper(bert("BertForMaskedLM", tie_word_embeddings=False))
    assert heads(outer) == {"model.cls.predictions.decoder.weight"} and find_heads(outer).guessed is None


def test_a_classifier_of_two_layers_has_its_last_as_head() -> None:
    config = transformers.RobertaConfig(vocab_size=50, num_labels=3, **SIZES)
    assert heads(transformers.RobertaForSequenceClassification(config)) == {"classifier.out_proj.weight"}


# --- wrappers ---


class Lightning(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "own": Lightning,
    "two": lambda model: nn.DataParallel(torch.compile(model)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_has_the_same_tracks(wrapper: str) -> None:
    model = bert("BertForMaskedLM" if wrapper == "compiled" else "BertForSequenceClassification")
    wrapped: Any = WRAPPERS[wrapper](model)
    found = assign(wrapped, "hidden")
    assert [(i.role, i.track) for i in found] == [(i.role, i.track) for i in assign(model, "hidden")]
    assert all(dict(wrapped.named_parameters())[i.name] is i.param for i in found)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_takes_the_same_name_of_its_head(wrapper: str) -> None:
    wrapped: Any = WRAPPERS[wrapper](HeadFirst())
    (name,) = heads(wrapped, "head")
    assert name.endswith("head.weight") and heads(wrapped, name.removesuffix(".weight")) == {name}


# --- adapters: the modules that peft puts into a model ---


class LoraLinear(nn.Module):
    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})


class ModulesToSave(nn.Module):
    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        sizes = original.in_features, original.out_features
        self.original_module = original.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({name: nn.Linear(*sizes) for name in ("default", "other")})


class Peft(nn.Module):
    """Stand for peft.PeftModel around peft.LoraModel; ``model`` answers for both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Lightning(model)

    def get_base_model(self) -> nn.Module:
        return self.base_model.network

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.network, name)


def adapters(model: nn.Module) -> set[str]:
    """Return the names of LoRA's layers that are not taken for heads."""
    layers = {name: module for name, module in model.named_modules() if "lora_" in name}
    return {name for name, layer in layers.items() if isinstance(layer, nn.Linear)} - {
        name for name, layer in layers.items() if layer in find_heads(model).modules
    }


def test_lora_matrices_are_no_heads() -> None:
    model = HeadFirst().requires_grad_(False)
    model.up, model.down = LoraLinear(model.up), LoraLinear(model.down)  # type: ignore[assignment]
    assert heads(model) == set() and len(adapters(model)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, "hidden")
    last = HeadFirst()
    last.down = LoraLinear(last.down)  # type: ignore[assignment]
    assert len(adapters(last)) == 2


def test_a_head_that_is_trained_anew_is_the_head() -> None:
    model = HeadFirst().requires_grad_(False)
    model.down = LoraLinear(model.down)  # type: ignore[assignment]
    model.head = ModulesToSave(model.head)  # type: ignore[assignment]
    names = {"head.modules_to_save.default.weight", "head.modules_to_save.other.weight"}
    assert heads(model) == names and len(adapters(model)) == 2


def test_an_adapted_classifier_of_transformers_has_its_head() -> None:
    model = bert("BertForSequenceClassification", num_labels=3).requires_grad_(False)
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = LoraLinear(attention.query)
    model.classifier = ModulesToSave(model.classifier)
    for wrapped, prefix in ((model, ""), (Peft(model), "base_model.network.")):
        saved = f"{prefix}classifier.modules_to_save"
        assert heads(wrapped) == {f"{saved}.default.weight", f"{saved}.other.weight"}
        assert len(adapters(wrapped)) == 2 and find_heads(wrapped).guessed is None
    masked = bert("BertForMaskedLM", tie_word_embeddings=False)
    masked.cls.predictions.decoder = LoraLinear(masked.cls.predictions.decoder)
    assert heads(masked) == set() and len(adapters(masked)) == 2
