"""Share groups, option checks, state and loading between optimizers.

State consists only of tensors. They are in float32 (float64 for float64 parameters) whatever the parameter's dtype, and
exist from construction on, so that distributed checkpoints need no first step. For a parameter in half precision the
state includes the rounding error, so that small updates add up. Each parameter with a second moment counts its
gradients (``state[param]["step"]``, a scalar on the host as in torch.optim.AdamW). The optimizer's counters are plain
numbers in the groups.
"""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ars2 import capturable, newton_schulz, updates, validation
from ars2.batch import Batch
from ars2.compiled import Compiler, MaybeCompile, eager
from ars2.newton_schulz import ALGORITHMS
from ars2.param_groups import LARGEST_MATRIX_DIMENSION, is_matrix
from ars2.sharded import Shards, find_shards, like, local, same_layout
from ars2.sharing import Replicas

TRACKS = ("matrix", "vector")
# Keys that are not options but are allowed in a group: those of schedulers, weight averaging and layer-wise decay, a
# label, and rho, so that groups for ARS2-Neo also fit Muon.
FOREIGN_KEYS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "lr_scale", "name", "rho"}
)


class TrackedOptimizer(Optimizer):
    """Provide a base for optimizers whose groups are on two tracks.

    A group has ``track: "matrix"`` or ``track: "vector"``. Without it the shapes of its parameters decide. A matrix
    group with ``flatten: True`` reads a 3-D tensor (out, in, k), such as a 1-D convolution's kernel, as the matrix
    (out, in*k). Otherwise a 3-D tensor is a stack of matrices. Tensors of 4 and 5 dimensions are always read as (out,
    rest).
    """

    shared_options: ClassVar[tuple[str, ...]] = ()  # one value for all groups
    fixed_options: ClassVar[tuple[str, ...]] = ()  # a saved state with another value is refused
    _warned_of_tracks = False
    main_counters: ClassVar[tuple[str, ...]] = ()  # in the first group only

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], compile: bool = False, capturable: bool = False
    ) -> None:
        # These do not change the results of a step, so the saved state does not include them.
        self._compile, self._capturable = compile, capturable
        self._compilers: dict[int, Compiler] = {}
        self._exchange: list[Replicas | Shards | None] = [None]
        self._loaded: dict[Tensor, dict[str, Tensor]] | None = None
        defaults = _plain({"track": "matrix", "flatten": False, **defaults})
        self._check_host_options(defaults)
        super().__init__(params, {"step": 0, **defaults})

    @property
    def group_options(self) -> set[str]:
        """Return the options that may differ between groups."""
        return {*self.defaults, "betas"} - {"step"}  # Muon keeps its betas out of the defaults

    def _check_options(self, group: dict[str, Any]) -> None:
        """Check the options of a complete group. Subclasses add checks."""
        validation.check_choice(group, "track", TRACKS)
        validation.check_choice(group, "flatten", (False, True))
        validation.check_number(group, "lr", 0.0)
        validation.check_betas(group)
        validation.check_number(group, "eps", 0.0, open_minimum=True)
        validation.check_number(group, "weight_decay", 0.0)
        validation.check_integer(group, "ns_steps", 1)
        newton_schulz.checked(group["ns_coefficients"], "ns_coefficients")
        validation.check_choice(group, "ns_dtype", validation.DTYPES)
        validation.check_choice(group, "ns_algorithm", ALGORITHMS)

    def _check_host_options(self, group: dict[str, Any]) -> None:
        """Check the options of a group whose learning rate may be a tensor.

        A capturable step has such a learning rate.
        """
        on_host = dict(group)
        if self._capturable:
            capturable.to_host_(on_host)
        self._check_options(on_host)

    def _check_counters(self, group: dict[str, Any], first: bool) -> None:
        """Check the counters of a saved group.

        ``first`` is whether it is the first group, which has the optimizer's counters. Subclasses add checks.
        """
        validation.check_integer(group, "step", 0)

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state tensors of parameters in ``group``."""
        raise NotImplementedError

    def _keys_of(self, param: Tensor, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state tensors of ``param``.

        In half precision these include the rounding error.
        """
        half = param.dtype in (torch.bfloat16, torch.float16)
        return (*self._state_keys(group), "remainder") if half else self._state_keys(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, check its options and make its state.

        Without a track, policy ``"all"`` of :func:`ars2.param_groups` decides by the shapes. A group with parameters
        for both tracks becomes two groups, the matrices first.

        Raises:
            ValueError: an option or parameter is not allowed. The optimizer is then unchanged.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)
        group = {**param_group, "params": params}
        parts = [group] if "track" in group or isinstance(params, set) else _by_track(group)
        before = len(self.param_groups)
        try:
            for part in parts:
                self._add_one_group(part)
        except Exception:
            for added in self.param_groups[before:]:
                for param in added["params"]:
                    self.state.pop(param, None)
            del self.param_groups[before:]
            raise
        if not self._warned_of_tracks and any("track" not in group and part["track"] == "vector" for part in parts):
            self._warned_of_tracks = True
            warnings.warn(
                f"{type(self).__name__} got parameters without a track, so their shapes decide: those of two dimensions"
                f" or more, all below {LARGEST_MATRIX_DIMENSION}, are matrices, the others vectors, and a group with"
                " both becomes two. Use ars2.param_groups(model) to build groups by the modules of a model",
                stacklevel=2,
            )

    def _add_one_group(self, param_group: dict[str, Any]) -> None:
        params = param_group["params"]
        group = _plain({**self.defaults, **param_group, "step": 0, "params": params})
        for name in self.main_counters:  # if this group is a copy of the first one
            group.pop(name, None)
        self._check_host_options(group)
        names = group.keys() - FOREIGN_KEYS - {"params", "param_names", "step"}
        validation.check_known(names, self.group_options, f"{type(self).__name__} ({group['track']} group)")
        # Comparing with the first group suffices and keeps the cost linear in the number of groups.
        validation.check_same_options([*self.param_groups[:1], group], self.shared_options)
        for index, item in enumerate(params):
            name, param = item if isinstance(item, tuple) else (str(index), item)
            validation.check_parameter(param, name, group["track"])
        shards = self._shards_of([*self.param_groups[:1], group])
        if isinstance(group["lr"], Tensor) and any(group["lr"] is other["lr"] for other in self.param_groups):
            group["lr"] = group["lr"].clone()  # a scheduler changes each group's in place
        super().add_param_group(group)
        if shards is not None:
            self._layout = self._shards or shards
        if self._capturable:
            capturable.to_device_(self.param_groups[-1])
        for param in group["params"]:
            self._make_state(param, group)

    def _make_state(self, param: Tensor, group: dict[str, Any]) -> None:
        dtype = torch.promote_types(param.dtype, torch.float32)
        keys = self._keys_of(param, group)
        self.state[param] = {key: torch.zeros_like(param, dtype=dtype) for key in keys}
        if "exp_avg_sq" in keys:
            self.state[param]["step"] = self._count_of(0.0, param)

    def _count_of(self, count: float | Tensor, param: Tensor) -> Tensor:
        """Return a count of gradients as a new tensor on the device that needs it."""
        device = param.device if self._capturable else torch.device("cpu")
        return torch.tensor(float(count), dtype=torch.float32, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the options of the groups.

        All numbers are plain, also if the optimizer is capturable.
        """
        self._adopt_parameters()
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            capturable.to_host_(group)
            group.update(validation.plain_numbers(group))
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by the same class with the same shared options.

        Dtypes and values are restored exactly. Options missing in an old state get their defaults. Hooks see and change
        the state as in any other optimizer.

        Raises:
            ValueError: options are out of range, or the state does not fit the parameters. The optimizer is then
                unchanged.
        """

        def check(_: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            defaults = _defaults_of(type(self))
            groups = [{**defaults, **group} for group in found["param_groups"]]
            self._loaded = self._fitting(groups, found["state"])
            return {**found, "param_groups": groups}

        self._adopt_parameters()
        handle = self.register_load_state_dict_pre_hook(check)  # the last hook, since others may repair the state
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loaded = None

    def _fitting(self, groups: list[dict[str, Any]], saved: Mapping[Any, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """Check saved groups and state, and return the state by parameter.

        Its tensors have the dtypes and layouts that the current parameters need.
        """
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(
                "the saved optimizer state has other parameter groups, load it into the same groups as when saved: "
                f"{[len(group['params']) for group in groups]} parameters against "
                f"{[len(group['params']) for group in self.param_groups]} here"
            )
        loaded: dict[Tensor, dict[str, Tensor]] = {}
        for index, (current, saved_group) in enumerate(zip(self.param_groups, groups, strict=True)):
            try:
                self._check_options(saved_group)
                validation.check_choice(saved_group, "track", (current["track"],))
                for name in self.fixed_options:
                    validation.check_choice(saved_group, name, (current[name],))
                self._check_counters(saved_group, index == 0)
            except ValueError as error:
                raise ValueError(f"saved optimizer state, group {index}: {error}") from error
            names = current.get("param_names", range(len(current["params"])))
            for name, param, key in zip(names, current["params"], saved_group["params"], strict=True):
                tensors = dict(saved.get(key, {}))
                # Older states have one count for each group.
                count = tensors.pop("step", saved_group["step"])
                dtype, keys = torch.promote_types(param.dtype, torch.float32), self._keys_of(param, saved_group)
                if "remainder" not in keys:  # saved with parameters in half precision
                    tensors.pop("remainder", None)
                elif tensors:  # older states have none
                    tensors.setdefault("remainder", torch.zeros_like(param, dtype=dtype))
                validation.check_state(tensors, str(name), param, keys)
                # In the memory layout of the parameter, not of the saved tensor.
                state = {k: torch.zeros_like(param, dtype=dtype).copy_(like(param, v)) for k, v in tensors.items()}
                if "exp_avg_sq" in state:
                    state["step"] = self._count_of(count, param)
                loaded[param] = state
        validation.check_same_options(groups, self.shared_options)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compile": self._compile, "_capturable": self._capturable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compilers = {}
        loaded, defaults = self.__dict__.setdefault("_loaded", None), _defaults_of(type(self))
        for group in self.param_groups:
            for name, value in defaults.items():  # options that came later
                group.setdefault(name, value)
            for param in group["params"]:
                if loaded is not None:  # torch gave the moments the dtype of the parameters
                    self.state[param] = loaded[param]
                    continue
                if "remainder" in self._keys_of(param, group) and "remainder" not in self.state[param]:
                    self.state[param]["remainder"] = torch.zeros_like(param, dtype=torch.float32)
                if "exp_avg_sq" in self.state[param] and "step" not in self.state[param]:
                    self.state[param]["step"] = self._count_of(group["step"], param)
            if self._capturable:
                capturable.to_device_(group)
        # A copy starts without replicas, unless its parameters are sharded. Loading a state keeps the layout.
        if "_exchange" not in self.__dict__:
            self._exchange = [None]
            self._layout = self._find_shards(self.param_groups)

    def _adopt_parameters(self) -> None:
        """Make state for parameters that replaced others in a group.

        The state of the replaced parameters is deleted.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        if all(map(self.state.get, params)):
            return
        for param in self.state.keys() - set(params):
            del self.state[param]
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state.get(param):
                    self._make_state(param, group)
        self._layout = self._shards_of(self.param_groups) or self._layout

    def distribute(self, group: dist.ProcessGroup | None, gather: Literal["exact", "bfloat16"] = "exact") -> None:
        """Distribute Newton-Schulz iterations over processes with replicas (DDP).

        Every process keeps all moments, so only results are exchanged, once for each group of matrices. The parameters
        of the processes stay identical, bit for bit.

        Sharded parameters (FSDP2) need no call, since their processes always share the iterations. For them the call
        only sets ``gather``, which then applies to matrices on the way to their owners and back.

        Args:
            group: of the processes, which must call :meth:`step` equally often. Ignored for sharded parameters, whose
                mesh has the group.
            gather: ``"exact"`` sends the results in ``ns_dtype``, ``"bfloat16"`` rounds wider ones to bfloat16.

        Raises:
            ValueError: another ``gather``, or no group where one is needed.
        """
        validation.check_choice({"gather": gather}, "gather", ("exact", "bfloat16"))
        dtype = None if gather == "exact" else torch.bfloat16
        if (shards := self._shards) is not None:
            self._layout = shards._replace(dtype=dtype)
        elif group is None:
            raise ValueError("distribute() needs the group of the processes where parameters are not sharded: pass one")
        else:
            self._layout = Replicas(group, dtype)

    def _shards_of(self, groups: list[dict[str, Any]]) -> Shards | None:
        shards = self._find_shards(groups)
        if shards is not None and (self._compile or self._capturable):
            raise ValueError("compile and capturable do not support sharded parameters: leave out both options")
        return shards

    @property
    def _layout(self) -> Replicas | Shards | None:
        """Return the processes to exchange with.

        They are in a list, which wrappers of the optimizer share.
        """
        return self._exchange[0]

    @_layout.setter
    def _layout(self, layout: Replicas | Shards | None) -> None:
        self._exchange[0] = layout

    @property
    def _shards(self) -> Shards | None:
        return self._layout if isinstance(self._layout, Shards) else None

    @staticmethod
    def _find_shards(groups: list[dict[str, Any]]) -> Shards | None:
        named: list[tuple[str, Tensor]] = []
        for group in groups:
            for index, item in enumerate(group["params"]):
                names = group.get("param_names", {index: str(index)})
                named.append(item if isinstance(item, tuple) else (names[index], item))
        return find_shards(named)

    def _maybe_compile(self, group: dict[str, Any]) -> MaybeCompile:
        """Return the wrapper for functions that work on the tensors of ``group``."""
        return self._compilers.setdefault(id(group), Compiler()) if self._compile else eager

    def _orthogonalize_(self, group: dict[str, Any], batch: Batch, directions: updates.Tensors) -> None:
        """Orthogonalize the directions of a batch of matrices in place, by the options of ``group``."""
        updates.orthogonalize_(
            directions,
            flatten=group["flatten"],
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            dtype=validation.DTYPES[group["ns_dtype"]],
            algorithm=group["ns_algorithm"],
            layout=self._layout,
            maybe_compile=self._maybe_compile(group),
            shapes=batch.shapes,
        )

    def _chunks(self, batch: Batch) -> Iterable[Batch]:
        """Return the chunks of a batch; a compiled step fuses the complete batch."""
        return batch.chunks() if not self._compile else [batch] if batch.params else []

    def _flat_chunks(self, part: Batch) -> Iterable[Batch]:
        """Return the flat chunks of a large tensor; a compiled step does not split it."""
        return part.flat_chunks() if not self._compile else [part]

    def _matrix_chunks(self, group: dict[str, Any], batch: Batch) -> Iterable[Batch]:
        """Return the chunks of a batch of matrices.

        Several processes, and a compiled step, work on the complete batch.
        """
        return batch.matrix_chunks(group["flatten"]) if self._layout is None and not self._compile else [batch]

    def _batch(self, group: dict[str, Any]) -> Batch:
        """Gather the parameters of ``group`` that have a gradient.

        Gradients are in the dtype and strides of the state.
        """
        sources = [param for param in group["params"] if param.grad is not None and param.numel()]
        states: list[dict[str, Tensor]] = []
        grads = []
        for param in sources:
            owned, (first, *others) = self.state[param], self._keys_of(param, group)
            like = local(owned[first])
            grads.append(_laid_out_as(like, local(param.grad)))
            for key in others if self._shards is None else ():  # users may have replaced a tensor
                owned[key] = _laid_out_as(like, owned[key])
            keys = (first, *others, "step") if "step" in owned else (first, *others)
            states.append({key: local(owned[key]) for key in keys})
        return Batch([local(p) for p in sources], grads, states, sources, None if self._capturable else 0)

    def _batches_by_count(self, group: dict[str, Any]) -> list[Batch]:
        """Return batches of ``group`` whose parameters have equal gradient counts.

        Counts differ where layers were unfrozen later, or get no gradient in every step.
        """
        batch = self._batch(group)
        if not batch.params or self._capturable or "step" not in batch.states[0]:
            return [batch]
        by_count: dict[int, list[int]] = {}
        for index, step in enumerate(batch.state("step")):
            by_count.setdefault(int(step), []).append(index)
        if len(by_count) == 1:
            return [batch._replace(gradient_count=count) for count in by_count]
        return [batch.subset(indices, count) for count, indices in sorted(by_count.items())]

    def _count_gradients(self) -> None:
        """Increment the gradient counts of parameters and groups."""
        present = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        steps = [state["step"] for state in map(self.state.__getitem__, present) if "step" in state]
        if steps:
            torch._foreach_add_(steps, 1.0)
        for group in self.param_groups:
            group["step"] += 1

    def _move_vectors(self, group: dict[str, Any], batch: Batch) -> None:
        """Apply AdamW to the parameters of one vector group."""
        maybe_compile = self._maybe_compile(group)
        adam = (
            batch.grads,
            batch.state("exp_avg"),
            batch.state("exp_avg_sq"),
            group["betas"],
            batch.step,
            group["eps"],
        )
        if all(p.dtype == g.dtype and p.stride() == g.stride() for p, g in zip(batch.params, batch.grads, strict=True)):
            maybe_compile(updates.adamw_)(batch.params, *adam, group["lr"], group["weight_decay"])
        else:
            directions = maybe_compile(updates.adam_directions)(*adam)
            self._apply(group, batch, directions, None)

    def _apply(
        self,
        group: dict[str, Any],
        batch: Batch,
        directions: updates.Tensors,
        scales: updates.Tensors | list[float] | None,
    ) -> None:
        """Move the parameters of a batch with :func:`ars2.updates.apply_`.

        Parameters in half precision move in float32.
        """
        half = [index for index, state in enumerate(batch.states) if "remainder" in state]
        params = [batch.params[index] for index in half]
        remainders = [batch.states[index]["remainder"] for index in half]
        exact = updates.with_remainders(params, remainders)
        moved = list(batch.params)
        for index, tensor in zip(half, exact, strict=True):
            moved[index] = tensor
        self._maybe_compile(group)(updates.apply_)(moved, directions, scales, group["lr"], group["weight_decay"])
        updates.round_(params, remainders, exact)

    def _check_gradients(self) -> bool:
        """Check every gradient before anything changes.

        Returns:
            Whether any parameter has a gradient.

        Raises:
            RuntimeError: a sparse gradient, or one that is not sharded as its parameter is.
        """
        self._adopt_parameters()
        found = False
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                found = True
                if param.grad.layout is not torch.strided:
                    name = group.get("param_names", {index: index})[index]
                    raise RuntimeError(
                        f"parameter {name} has a sparse gradient, which is not supported:"
                        " make its module with sparse=False"
                    )
                if self._shards is not None and not same_layout(param.grad, param):
                    name = group.get("param_names", {index: index})[index]
                    raise RuntimeError(
                        f"the gradient of parameter {name} is not sharded as the parameter is: let FSDP2 reduce it"
                        " (set_requires_gradient_sync(True) before the last backward of a step)"
                    )
        return found

    def _without_autocast(self) -> torch.autocast:
        """Return a context that disables autocast for the matrix products."""
        device = next((param.device.type for group in self.param_groups for param in group["params"]), "cpu")
        return torch.autocast(device, enabled=False)


def _by_track(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``group`` with its track, decided by the shapes of its parameters.

    The result is two groups if there are parameters for both tracks.
    """
    by_track: dict[str, list[Any]] = {}
    for index, item in enumerate(group["params"]):
        name, param = item if isinstance(item, tuple) else (str(index), item)
        validation.check_parameter(param, name, "vector")
        by_track.setdefault("matrix" if is_matrix(param.shape) else "vector", []).append(item)
    return [{**group, "params": by_track[track], "track": track} for track in TRACKS if track in by_track] or [
        {**group, "track": "matrix"}
    ]


def _laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return ``tensor`` in the dtype and strides of ``like``.

    The fused kernels do not check that these agree.
    """
    if tensor.dtype == like.dtype and tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=tensor.device).copy_(tensor)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options as numbers and tuples that the safe loader of checkpoints accepts."""
    coefficients = newton_schulz.checked(options["ns_coefficients"], "ns_coefficients")
    return {**validation.plain_numbers(options), "ns_coefficients": coefficients}


def _defaults_of(cls: type) -> dict[str, Any]:
    """Return the defaults of a class's group options."""
    parameters = inspect.signature(cls).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty and parameter.name not in ("compile", "capturable")
    }
