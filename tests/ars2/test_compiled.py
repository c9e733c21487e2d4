"""A compiled step equals an eager one, and new numbers compile nothing anew."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import OneCycleLR

from ars2 import ARS2Neo, Muon
from tests.ars2.problems import SmallProblem, problem_groups
from tests.ars2.training import MODES, closure_of, copies, parameters_of, setup, worst_difference

STEPS = 8


class RaggedProblem(SmallProblem):
    """Make every third batch a short one."""

    def loss(self, step: int) -> Tensor:
        rows = slice(0, 5) if step % 3 == 2 else slice(step % 3 * 16, step % 3 * 16 + 16)
        return torch.nn.functional.cross_entropy(self(self.images[rows], self.tokens[rows]), self.targets[rows])


def make(mode: str, compile: bool, **options: Any) -> tuple[RaggedProblem, ARS2Neo | Muon]:
    model = RaggedProblem()
    groups = problem_groups(model)
    if mode == "muon":
        for group in groups:
            del group["rho"]
        return model, Muon(groups, compile=compile, ns_dtype="float32", **options)
    groups[0]["relative_rho"] = True
    return model, ARS2Neo(groups, compile=compile, ns_dtype="float32", **MODES[mode], **options)


def train(mode: str, compile: bool, **options: Any) -> tuple[list[Tensor], list[int]]:
    """Train with a learning rate and a momentum that change in every step.

    Return the parameters, and the number of compilations in each step.
    """
    model, optimizer = make(mode, compile, **options)
    # It changes betas[0] or the momentum too.
    scheduler = OneCycleLR(optimizer, [5e-3, 1e-2], total_steps=STEPS + 1)
    compilations = []
    for step in range(STEPS):
        before = counters["stats"]["unique_graphs"]
        optimizer.step(closure_of(model, optimizer, step))
        scheduler.step()
        compilations.append(counters["stats"]["unique_graphs"] - before)
    return copies(parameters_of(optimizer)), compilations


@pytest.mark.slow
def test_a_two_pass_step_compiled_by_the_user_runs_eagerly() -> None:
    results = []
    for compiled in (False, True):
        model, optimizer = make("sync", compile=False)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(2):
            step(closure_of(model, optimizer, number))  # type: ignore[arg-type]
        results.append(copies(parameters_of(optimizer)))
    assert worst_difference(*results) < 1e-6  # what torch compiled around it may round otherwise


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["base", "muon"])
def test_a_compiled_step_does_not_depend_on_the_default_device(mode: str, backend: CompileCounterWithBackend) -> None:
    model, optimizer = make(mode, compile=True)
    closure = closure_of(model, optimizer, 0)  # type: ignore[arg-type]
    closure()
    with torch.device("meta"):
        optimizer.step()
    assert backend.frame_count > 0 and all(p.device.type == "cpu" for p in parameters_of(optimizer))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Trace and guard without generating kernels, which would take a minute.

    Tracing and guards decide what is compiled anew.
    """
    backend = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return backend


@pytest.mark.parametrize(
    "mode", ["aga", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("base", "sync", "muon"))]
)
def test_a_compiled_step_equals_the_eager_one_and_is_compiled_once(
    mode: str, backend: CompileCounterWithBackend
) -> None:
    plain, none = train(mode, compile=False)
    compiled, compilations = train(mode, compile=True)
    assert not any(none)
    # AGA: the first step makes a second pass, the second one injects the shear force.
    first = 2 if mode == "aga" else 1
    assert all(compilations[:first]) and not any(compilations[first:]), compilations
    assert backend.frame_count == sum(compilations)
    assert worst_difference(plain, compiled) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["base", "sync"])
def test_a_capturable_step_can_be_compiled_too(mode: str, backend: CompileCounterWithBackend) -> None:
    plain, _ = train(mode, compile=False)
    compiled, compilations = train(mode, compile=True, capturable=True)
    assert compilations[0] and not any(compilations[1:])
    assert worst_difference(plain, compiled) < 2e-5


@pytest.mark.slow
def test_without_energy_or_geometry_a_compiled_step_equals_the_eager_one(backend: CompileCounterWithBackend) -> None:
    for switched_off in ("energy", "geometry"):
        plain, _ = train("sync", compile=False, **{switched_off: False})
        compiled, compilations = train("sync", compile=True, **{switched_off: False})
        assert not any(compilations[1:])
        assert worst_difference(plain, compiled) < 2e-5


@pytest.mark.slow
def test_a_gradient_scale_that_changes_compiles_nothing_anew(backend: CompileCounterWithBackend) -> None:
    model, optimizer = setup("aga", compile=True)
    for step in range(8):
        optimizer.zero_grad()
        (model.loss(step) * 2.0**step).backward()
        if step == 2:
            before = backend.frame_count
        if optimizer.wants_second_pass(grad_scale=2.0**step):
            optimizer.perturb()
            model.loss(step).backward()
            optimizer.restore()
        else:
            for p in parameters_of(optimizer):
                p.grad /= 2.0**step  # type: ignore[operator]
        optimizer.step()
    assert backend.frame_count == before


@pytest.mark.slow
def test_many_groups_and_many_optimizers_do_not_reach_the_limit_of_compilations(
    backend: CompileCounterWithBackend,
) -> None:
    for _ in range(2):
        params = [torch.nn.Parameter(torch.randn(3 + i)) for i in range(9)]
        optimizer = ARS2Neo([{"params": [p], "track": "vector"} for p in params], mode="base", compile=True)
        before = copies(params)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert all((a != b).any() for a, b in zip(params, before, strict=True))


def test_a_saved_state_does_not_record_compiling() -> None:
    _, optimizer = make("base", compile=True)
    assert not any("compile" in group for group in optimizer.state_dict()["param_groups"])


@pytest.mark.slow
def test_a_copy_is_compiled(backend: CompileCounterWithBackend) -> None:
    _, optimizer = make("base", compile=True)
    copied = copy.deepcopy(optimizer)
    for p in parameters_of(copied):
        p.grad = torch.ones_like(p)
    copied.step()
    assert backend.frame_count > 0


def test_a_missing_compiler_is_a_one_sentence_error_and_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise OSError("g++: not found")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=no_compiler))
    model, optimizer = make("base", compile=True)
    before = copies(parameters_of(optimizer))
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler.*compile=False") as info:
        optimizer.step(closure_of(model, optimizer, 0))
    assert "\n" not in str(info.value)
    assert worst_difference(before, parameters_of(optimizer)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["base", "sync", "aga", "muon"])
def test_with_generated_kernels_the_results_are_the_same_to_rounding(mode: str) -> None:
    plain, _ = train(mode, compile=False)
    compiled, compilations = train(mode, compile=True)
    assert not any(compilations[2:]), compilations
    assert worst_difference(plain, compiled) < 2e-5
