"""Parameters are assigned to tracks by role, never by name, with a reason."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from ars2 import ARS2Neo, Muon, param_groups, report
from ars2.param_groups import assign


class Network(nn.Module):
    """Name its modules misleadingly; subclasses declare a head, or that none is."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.lm_head = nn.Embedding(11, 8)  # an embedding
        self.norm = nn.Linear(8, 8)  # a hidden matrix
        self.embed = nn.LayerNorm(8)
        self.grid = nn.LayerNorm((4, 8))
        self.wave = nn.Conv1d(8, 6, 3)
        self.image = nn.Conv2d(3, 4, 3)
        self.volume = nn.Conv3d(1, 2, 2)
        self.heads = nn.Parameter(torch.zeros(2, 5, 8))
        self.scale = nn.Parameter(torch.ones(()))
        self.word_embeddings = nn.Linear(8, 11, bias=False)  # the output head
        if tied:
            self.word_embeddings.weight = self.lm_head.weight


class DeclaringNetwork(Network):
    """Declare a head that is not the last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.word_embeddings


class HeadlessNetwork(Network):
    def get_output_embeddings(self) -> None:
        return None


def roles(model: nn.Module, policy: Any = "all") -> dict[str, tuple[str, str]]:
    return {item.name: (item.role, item.track) for item in assign(model, policy)}


EXPECTED = {
    "lm_head.weight": ("embedding", "vector"),
    "norm.weight": ("hidden", "matrix"),
    "norm.bias": ("bias or gain", "vector"),
    "embed.weight": ("norm", "vector"),
    "embed.bias": ("norm", "vector"),
    "grid.weight": ("norm", "vector"),
    "grid.bias": ("norm", "vector"),
    "wave.weight": ("convolution", "matrix"),
    "wave.bias": ("bias or gain", "vector"),
    "image.weight": ("convolution", "matrix"),
    "image.bias": ("bias or gain", "vector"),
    "volume.weight": ("convolution", "matrix"),
    "volume.bias": ("bias or gain", "vector"),
    "heads": ("stack", "matrix"),
    "scale": ("bias or gain", "vector"),
    "word_embeddings.weight": ("output head", "vector"),
}
MATRIX_ONLY_IN_ALL = {"lm_head.weight", "grid.weight", "grid.bias", "word_embeddings.weight"}


def test_hidden_leaves_out_embeddings_heads_and_norms() -> None:
    assert roles(Network(), "hidden") == EXPECTED


def test_all_takes_everything_of_two_dimensions() -> None:
    expected = {n: (role, "matrix" if n in MATRIX_ONLY_IN_ALL else track) for n, (role, track) in EXPECTED.items()}
    assert roles(Network(), "all") == expected


def test_a_model_may_declare_its_head() -> None:
    expected = {**EXPECTED, "projection.weight": ("hidden", "matrix")}
    assert roles(DeclaringNetwork(), "hidden") == expected


def test_a_model_may_declare_that_it_has_no_head() -> None:
    assert roles(HeadlessNetwork(), "hidden")["word_embeddings.weight"] == ("hidden", "matrix")


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.register_tokens = nn.Parameter(torch.zeros(1, 8))
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
        self.attention = nn.Parameter(torch.zeros(2, 4, 8))
        self.gate = nn.Linear(8, 1, bias=False)
        self.mask = nn.Conv2d(8, 1, 3, bias=False)
        self.head = nn.Linear(8, 3, bias=False)


def test_hidden_leaves_out_parameters_that_are_broadcast() -> None:
    tracks = {name: track for name, (_, track) in roles(VisionTransformer(), "hidden").items()}
    vectors = {"pos_embed", "cls_token", "register_tokens", "layer_scale", "head.weight"}
    assert {name for name, track in tracks.items() if track == "vector"} == vectors
    assert {track for _, track in roles(VisionTransformer(), "all").values()} == {"matrix"}


class Adapted(nn.Module):
    """Have LoRA's factors as peft stores them, and one pair as bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Module()
        self.linear.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.linear.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})
        self.convolution = nn.Module()
        self.convolution.lora_A = nn.ModuleDict({"default": nn.Conv2d(3, 2, 3, bias=False)})
        self.convolution.lora_B = nn.ModuleDict({"default": nn.Conv2d(2, 4, 1, bias=False)})
        self.tokens = nn.Module()
        self.tokens.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(1, 50))})
        self.tokens.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.zeros(8, 1))})
        self.bare = nn.Linear(8, 8)
        self.bare.lora_A = nn.Parameter(torch.zeros(2, 8))
        self.bare.lora_B = nn.Parameter(torch.zeros(8, 2))


def test_only_b_of_the_factors_of_lora_is_hidden() -> None:
    found = {name: factor for name, factor in roles(Adapted(), "hidden").items() if "lora" in name}
    expected = {"A": ("LoRA A", "vector"), "B": ("LoRA B", "matrix")}
    assert found == {
        name: expected[name.removesuffix(".default.weight").removesuffix(".default")[-1]] for name in found
    }
    assert len(found) == 8
    reason = next(item.reason for item in assign(Adapted(), "hidden") if item.role == "LoRA A")
    assert reason == "policy hidden leaves out every LoRA A"
    assert {track for name, (_, track) in roles(Adapted(), "all").items() if "lora" in name} == {"matrix"}


def test_without_a_declaration_the_last_linear_layer_is_the_head() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.BatchNorm1d(5))
    assert {name: role for name, (role, _) in roles(model).items()} == {
        "0.weight": "hidden",
        "0.bias": "bias or gain",
        "2.weight": "output head",
        "2.bias": "bias or gain",
        "3.weight": "norm",
        "3.bias": "norm",
    }


@pytest.mark.parametrize(("policy", "track"), [("all", "matrix"), ("hidden", "vector")])
def test_a_tied_embedding_appears_once_under_its_first_name(policy: str, track: str) -> None:
    found = roles(Network(tied=True), policy)
    assert found["lm_head.weight"] == ("tied embedding", track) and "word_embeddings.weight" not in found


def test_an_embedding_tied_the_other_way_round_is_known_too() -> None:
    model = nn.Module()
    model.head = nn.Linear(8, 11, bias=False)
    model.tokens = nn.Embedding(11, 8)
    model.tokens.weight = model.head.weight
    assert roles(model, "hidden") == {"head.weight": ("tied embedding", "vector")}


@pytest.mark.parametrize(
    ("policy", "rows", "track"), [("all", 9_999, "matrix"), ("all", 10_000, "vector"), ("hidden", 40_000, "vector")]
)
def test_large_dimensions_are_vectors(policy: str, rows: int, track: str) -> None:
    model = nn.Sequential(nn.Linear(2, rows, bias=False), nn.Linear(rows, 2, bias=False), nn.Linear(2, 2))
    found = roles(model, policy)
    assert found["0.weight"][1] == found["1.weight"][1] == track
    reason = next(item.reason for item in assign(model, policy) if item.name == "0.weight")
    assert ("10000" in reason) == (track == "vector")


@pytest.mark.parametrize(
    ("model_of", "policy"), [(Network, "all"), (DeclaringNetwork, "hidden"), (lambda: Network(tied=True), "hidden")]
)
def test_every_trainable_parameter_is_in_exactly_one_group(model_of: Any, policy: str) -> None:
    model = model_of()
    model.norm.weight.requires_grad_(False)
    model.scale.requires_grad_(False)
    placed = [p for group in param_groups(model, policy) for _, p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(placed) == len(trainable) and set(placed) == set(trainable)
    names = dict(model.named_parameters())
    assert all(names[name] is p for group in param_groups(model, policy) for name, p in group["params"])


def test_kernels_of_one_dimension_have_a_group_that_is_flattened() -> None:
    groups = param_groups(Network())
    flattened = [group for group in groups if group.get("flatten")]
    assert [[name for name, _ in group["params"]] for group in flattened] == [["wave.weight"]]
    assert flattened[0]["track"] == "matrix"
    stacked = next(group for group in groups if any(name == "heads" for name, _ in group["params"]))
    assert stacked["track"] == "matrix" and "flatten" not in stacked


@pytest.mark.parametrize(
    "kernel", [nn.Conv2d(1, 1, 3), nn.Conv3d(1, 1, 2), nn.ConvTranspose2d(1, 1, 3), nn.Conv1d(1, 1, 5)]
)
def test_kernels_of_a_single_channel_are_flattened(kernel: nn.Module) -> None:
    model = nn.ModuleList([kernel, nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3)])
    flattened = [group for group in param_groups(model) if group.get("flatten")]
    assert [[name for name, _ in group["params"]] for group in flattened] == [["0.weight"]]
    model = nn.ParameterList([torch.zeros(1, 1, 4, 6)])  # may be the matrix (4, 6)
    assert not any("flatten" in group for group in param_groups(model))


class Attention(nn.Module):
    """Have fused weights: equal blocks, grouped queries, a stack and a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2)
        self.second = nn.MultiheadAttention(8, 2)
        self.grouped = nn.Linear(8, 16)
        self.experts = nn.Parameter(torch.zeros(2, 6, 8))
        self.kernel = nn.Conv1d(2, 6, 3)
        self.plain = nn.Linear(8, 9)


SPLITS = {"*.in_proj_weight": 3, "grouped.weight": [8, 4, 4]}


@pytest.mark.parametrize("wrapper", [lambda model: model, nn.DataParallel, torch.compile])
def test_fused_weights_have_groups_with_their_blocks(wrapper: Any) -> None:
    model = wrapper(Attention())
    options = {"splits": SPLITS, "head": [], "matrix": {"lr": 0.1}}
    groups = {group["splits"]: group for group in param_groups(model, "hidden", **options) if "splits" in group}
    names = {splits: [name for name, _ in group["params"]] for splits, group in groups.items()}
    prefix = next(iter(names[(8, 4, 4)])).removesuffix("grouped.weight")
    assert names == {
        3: [f"{prefix}first.in_proj_weight", f"{prefix}second.in_proj_weight"],
        (8, 4, 4): [f"{prefix}grouped.weight"],
    }
    assert all(group["track"] == "matrix" and group["lr"] == 0.1 for group in groups.values())
    reasons = {item.name: item.reason for item in assign(model, splits=SPLITS)}
    assert reasons[f"{prefix}grouped.weight"].endswith("split into 3 blocks")
    assert "split" not in reasons[f"{prefix}plain.weight"]
    assert report(model, splits=SPLITS).count("split into 3 blocks") == 3


def test_the_documented_example_splits_its_fused_weights() -> None:
    page = (Path(__file__).parents[2] / "docs/choosing_settings.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(code, names)
    assert [group["splits"] for group in names["groups"] if "splits" in group] == [3, (64, 32, 32)]


def test_fused_weights_leave_the_other_groups_as_they_are() -> None:
    def names(splits: Any) -> list[list[str]]:
        groups = param_groups(Attention(), splits=splits)
        fused = {"first.in_proj_weight", "second.in_proj_weight", "grouped.weight"}
        found = [[name for name, _ in group["params"] if name not in fused] for group in groups]
        return [group for group in found if group]

    assert names(SPLITS) == names(None) and len(names(None)) == 3
    assert not any("splits" in group for group in param_groups(Attention()))


def test_the_first_pattern_that_matches_decides() -> None:
    splits = {"first.*weight": 2, "*.in_proj_weight": 3}
    found = {item.name: item.splits for item in assign(Attention(), splits=splits)}
    assert found["first.in_proj_weight"] == 2 and found["second.in_proj_weight"] == 3


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"*.qkv.weight": 3}, r"no parameter matches \['\*\.qkv\.weight'\]"),
        ({"grouped.*": 2}, r"grouped\.bias of shape \(16,\) .*vector track \(fewer than two dimensions\)"),
        ({"plain.weight": 2}, r"plain\.weight of shape \(9, 8\) .*into 2: .*divisor of 9"),
        ({"plain.weight": 0}, "into 0"),
        ({"grouped.weight": (8, 4)}, r"into \(8, 4\): .*16, or row counts of this sum"),
        ({"grouped.weight": (17, -1)}, r"into \(17, -1\)"),
        ({"grouped.weight": []}, r"into \[\]"),
        ({"grouped.weight": 2.0}, r"into 2\.0"),
        ({"grouped.weight": "2"}, "into 2"),
        ({"grouped.weight": None}, "into None"),
        ({"experts": 2}, r"experts of shape \(2, 6, 8\) .*two dimensions"),
        ({"kernel.weight": 3}, r"kernel\.weight .*two dimensions"),
    ],
)
@pytest.mark.parametrize("function", [param_groups, report])
def test_splits_that_do_not_fit_are_errors(splits: Any, message: str, function: Any) -> None:
    with pytest.raises(ValueError, match=f"splits: .*{message}"):
        function(Attention(), splits=splits)


def test_a_fused_output_head_is_not_split_under_policy_hidden() -> None:
    with pytest.raises(ValueError, match=r"plain\.weight .*policy hidden leaves out every output head"):
        param_groups(Attention(), "hidden", head="plain", splits={"plain.weight": 3})


def test_options_go_to_the_groups_of_their_track() -> None:
    groups = param_groups(Network(), "hidden", matrix={"lr": 0.1, "betas": (0.8, 0.9)}, vector={"weight_decay": 0.0})
    assert len(groups) == 3
    for group in groups:
        options = {name: value for name, value in group.items() if name not in ("params", "track", "flatten")}
        expected = {"lr": 0.1, "betas": (0.8, 0.9)} if group["track"] == "matrix" else {"weight_decay": 0.0}
        assert options == expected
    optimizer = ARS2Neo(groups, lr=0.5, weight_decay=0.3)
    seen = {(g["track"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert seen == {("matrix", 0.1, 0.3), ("vector", 0.5, 0.0)}


@pytest.mark.parametrize(
    ("track", "name"), [("matrix", "params"), ("vector", "track"), ("matrix", "flatten"), ("matrix", "splits")]
)
def test_options_may_not_undo_the_policy(track: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{track} .*'{name}'"):
        param_groups(Network(), **{track: {name: "vector"}})


@pytest.mark.parametrize("cls", [ARS2Neo, Muon, torch.optim.SGD])
def test_any_optimizer_takes_the_groups(cls: Any) -> None:
    model = Network()
    optimizer = cls(param_groups(model, "hidden"), lr=0.01)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {group["track"] for group in optimizer.param_groups} == {"matrix", "vector"}


def test_groups_without_names_suit_an_optimizer_that_takes_no_pairs(tmp_path: Path) -> None:
    model = Network()
    with_names, without = (param_groups(model, "hidden", named=named, vector={"lr": 0.5}) for named in (True, False))
    assert [{**group, "params": [p for _, p in group["params"]]} for group in with_names] == without
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        optimizer = ZeroRedundancyOptimizer(without, ARS2Neo, mode="base")
        assert [group["track"] for group in optimizer.optim.param_groups] == [group["track"] for group in without]
    finally:
        dist.destroy_process_group()


def test_a_lazy_parameter_is_named() -> None:
    with pytest.raises(ValueError, match=r"parameter 0\.(weight|bias) .*forward pass"):
        param_groups(nn.Sequential(nn.LazyLinear(3)))


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"policy .*got 'muon'"):
        param_groups(Network(), "muon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("function", [param_groups, report, assign])
def test_parameters_in_the_place_of_the_model_are_an_error(function: Any) -> None:
    for wrong in (Network().parameters(), Network().named_parameters(), list(Network().parameters()), Network):
        with pytest.raises(TypeError, match=r"got (generator|list|type).*model.parameters\(\)"):
            function(wrong, "hidden")


@pytest.mark.parametrize("policy", ["all", "hidden"])
def test_the_report_has_a_line_a_parameter_and_right_totals(policy: Any) -> None:
    model = Network()
    header, *lines, guess, totals = report(model, policy).splitlines()
    assert "'word_embeddings' is a guess" in guess
    assert header.split() == ["track", "role", "shape", "parameter", "reason"]
    items = assign(model, policy)
    assert len(lines) == len(items)
    for line, item in zip(lines, items, strict=True):
        track, role, shape, name, reason = (
            re.split(r"\s{2,}", line)
            if item.param.ndim
            else re.split(r"\s{2,}", line.replace(item.name, "() " + " " + item.name, 1))
        )
        assert (track, role, name, reason) == (item.track, item.role, item.name, item.reason)
        assert item.param.ndim == 0 or tuple(map(int, shape.split("x"))) == item.param.shape
    for track in ("matrix", "vector"):
        params = [item.param for item in items if item.track == track]
        numel, total = sum(p.numel() for p in params), sum(p.numel() for p in model.parameters())
        assert f"{track} {len(params)} tensors, {numel:,} numbers ({100 * numel / total:.1f} %)" in totals
    assert totals.startswith(f"policy {policy}: ")
