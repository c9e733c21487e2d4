"""Share groups, option checks, state and loading between optimizers.

State consists only of tensors. They are in float32 (float64 for float64 parameters) whatever the parameter's dtype, and
exist from construction on, so that distributed checkpoints need no first step. For a parameter in half precision the
state includes the rounding error, so that small updates add up. Each parameter with a second moment counts its
gradients (``state[param]["step"]``, a scalar on the host as in torch.optim.AdamW). The optimizer's counters are plain
numbers in the groups.
"""

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ars2 import graphs, kernels, newton_schulz, validation
from ars2.chunks import Chunk
from ars2.distributed import Local, Replicated, Sharded, find_layout, like, local, same_layout
from ars2.graphs import Compiler, MaybeCompile, eager
from ars2.kernels import Tensors
from ars2.newton_schulz import ALGORITHMS, HALF
from ars2.orthogonalize import orthogonalize_all, stack_shape
from ars2.param_groups import LARGEST_MATRIX_DIMENSION, is_matrix

TRACKS = ("matrix", "vector")
# Keys that are not options but are allowed in a group: those of schedulers, weight averaging and layer-wise decay, a
# label, and those of rho, so that groups for ARS2-Neo also fit Muon.
FOREIGN_KEYS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "lr_scale", "name"}
    | {"rho", "relative_rho"}
)
# Options that may differ between groups. All others have one value.
OF_A_GROUP = frozenset(
    {"track", "flatten", "splits", "lr", "betas", "eps", "weight_decay", "rho", "momentum", "nesterov", "cautious"}
    | {"adjust_lr_fn", "relative_rho", "step"}
)
# Options of every optimizer with a matrix track.
_COMMON = {"track": "matrix", "flatten": False, "splits": 1}


class TrackedOptimizer(Optimizer):
    """Provide a base for optimizers whose groups are on two tracks.

    A group has ``track: "matrix"`` or ``track: "vector"``. Without it the shapes of its parameters decide. A matrix
    group with ``flatten: True`` reads a 3-D tensor (out, in, k), such as a 1-D convolution's kernel, as the matrix
    (out, in*k). Otherwise a 3-D tensor is a stack of matrices. Tensors of 4 and 5 dimensions are always read as (out,
    rest), after leading dimensions (1, 1). ``splits``, a number of equal row blocks or the row counts of each block,
    makes every block of a fused weight a separate matrix.
    """

    fixed_options: ClassVar[tuple[str, ...]] = ()  # a saved state with another value is refused
    main_counters: ClassVar[dict[str, float]] = {}  # in the first group only
    # Whether directions have entries of order 1 at any scale of the gradients.
    directions_in_range: ClassVar[bool] = True
    _warned_of_tracks = False

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], compile: bool = False, capturable: bool = False
    ) -> None:
        # These do not change the results of a step, so the saved state does not include them.
        self._compile, self._capturable = compile, capturable
        self._compilers: dict[int, Compiler] = {}
        self._layouts = [Local()]
        self._loaded: dict[Tensor, dict[str, Tensor]] | None = None
        defaults = _plain({**_COMMON, **defaults})
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
        validation.check_choice(group, "cautious", (False, True))
        validation.check_integer(group, "ns_steps", 1)
        newton_schulz.checked(group["ns_coefficients"], "ns_coefficients")
        validation.check_choice(group, "ns_dtype", validation.DTYPES)
        validation.check_choice(group, "ns_algorithm", ALGORITHMS)
        validation.check_choice(group, "adjust_lr_fn", ("original", "match_rms_adamw"))

    def _check_host_options(self, group: dict[str, Any]) -> None:
        """Check the options of a group, whose learning rate may be a tensor."""
        on_host = dict(group)
        if self._capturable:
            graphs.to_host_(on_host)
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
        return (*self._state_keys(group), "remainder") if param.dtype in HALF else self._state_keys(group)

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
                " both becomes two. Use ars2.param_groups(model) to build groups by the modules of a model, or"
                " ars2.transformers.TwoPassTrainer, which does so",
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
        validation.check_same_options([*self.param_groups[:1], group], self.defaults.keys() - OF_A_GROUP)
        for name, param in _named(group):
            validation.check_parameter(param, name, group["track"])
            validation.check_splits(param, name, group)
        layout = self._find_layout([*self.param_groups[:1], group])
        if isinstance(group["lr"], Tensor) and any(group["lr"] is other["lr"] for other in self.param_groups):
            group["lr"] = group["lr"].clone()  # a scheduler changes each group's in place
        super().add_param_group(group)
        if isinstance(layout, Sharded) and not isinstance(self._layout, Sharded):
            self._layout = layout
        if self._capturable:
            graphs.to_device_(self.param_groups[-1])
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
            graphs.to_host_(group)
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
            groups = [{**_defaults_of(type(self)), **group} for group in found["param_groups"]]
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
                for name in ("track", *self.fixed_options):
                    if saved_group.get(name) != current[name]:
                        raise ValueError(
                            f"{name} is {saved_group.get(name)!r} there and {current[name]!r} in this optimizer: make"
                            " the optimizer as it was when saved, or continue from the weights alone"
                        )
                self._check_counters(saved_group, index == 0)
            except ValueError as error:
                raise ValueError(f"saved optimizer state, group {index}: {error}") from error
            for (name, param), key in zip(_named(current), saved_group["params"], strict=True):
                tensors = dict(saved.get(key, {}))
                count = tensors.pop("step", saved_group["step"])  # older states have one count for each group
                dtype, keys = torch.promote_types(param.dtype, torch.float32), self._keys_of(param, saved_group)
                if "remainder" not in keys:  # saved with parameters in half precision
                    tensors.pop("remainder", None)
                elif tensors:  # older states have none
                    tensors.setdefault("remainder", torch.zeros_like(param, dtype=dtype))
                validation.check_state(tensors, name, param, keys)
                # In the memory layout of the parameter, not of the saved tensor.
                state = {k: torch.zeros_like(param, dtype=dtype).copy_(like(param, v)) for k, v in tensors.items()}
                if "exp_avg_sq" in state:
                    state["step"] = self._count_of(count, param)
                loaded[param] = state
        validation.check_same_options(groups, self.defaults.keys() - OF_A_GROUP)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compile": self._compile, "_capturable": self._capturable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compilers = {}
        loaded = self.__dict__.setdefault("_loaded", None)
        for group in self.param_groups:
            for name, value in _defaults_of(type(self)).items():  # options that came later
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
                graphs.to_device_(group)
        # A copy starts without replicas, unless its parameters are sharded. Loading a state keeps the layout.
        if "_layouts" not in self.__dict__:
            self._layouts = [self._find_layout(self.param_groups)]

    def _adopt_parameters(self) -> None:
        """Make state for parameters that replaced others, whose state is deleted."""
        params = [param for group in self.param_groups for param in group["params"]]
        if all(map(self.state.get, params)):
            return
        for param in self.state.keys() - set(params):
            del self.state[param]
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state.get(param):
                    self._make_state(param, group)
        layout = self._find_layout(self.param_groups)
        self._layout = layout if isinstance(layout, Sharded) else self._layout

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
        if isinstance(self._layout, Sharded):
            self._layout = Sharded(self._layout.group, dtype)
        elif group is None:
            raise ValueError("distribute() needs the group of the processes where parameters are not sharded: pass one")
        else:
            self._layout = Replicated(group, dtype)

    @property
    def is_distributed(self) -> bool:
        """Return whether processes share iterations, see :meth:`distribute`."""
        return type(self._layout) is not Local

    @property
    def _layout(self) -> Local:
        """Return the layout of the parameters, from a list that wrappers share."""
        return self._layouts[0]

    @_layout.setter
    def _layout(self, layout: Local) -> None:
        self._layouts[0] = layout

    def _find_layout(self, groups: list[dict[str, Any]]) -> Local:
        layout = find_layout(pair for group in groups for pair in _named(group))
        if isinstance(layout, Sharded):
            if self._compile or self._capturable:
                raise ValueError("compile and capturable do not support sharded parameters: leave out both options")
            if any(group.get("splits", 1) != 1 for group in groups):
                raise ValueError("splits does not support sharded parameters: leave it out, or do not fuse the weights")
        return layout

    def _maybe_compile(self, group: dict[str, Any]) -> MaybeCompile:
        """Return the wrapper for functions that work on the tensors of ``group``."""
        return self._compilers.setdefault(id(group), Compiler()) if self._compile else eager

    def _gather(self, instead: str | None = None) -> Iterator[Chunk]:
        """Yield the parameters of each group that have a gradient.

        Gradients are in the dtype and strides of the state. Copies in another dtype exist for one group at a time. The
        state tensor ``instead`` takes the place of the gradient for every parameter that is not frozen.
        """
        first = 0
        for group in self.param_groups:
            chunk = Chunk(group, [], [], {}, [], [], first)
            keys = self._state_keys(group)
            if any(param.dtype in HALF for param in group["params"]):
                keys = (*keys, "remainder")
            chunk.state.update((key, []) for key in keys)
            for param in group["params"]:
                state = self.state[param]
                grad = param.grad if instead is None else state[instead] if param.requires_grad else None
                if grad is None or not param.numel():
                    continue
                like = local(state[keys[0]])
                chunk.sources.append(param)
                chunk.params.append(local(param))
                chunk.grads.append(_laid_out_as(like, local(grad)))  # type: ignore[union-attr]
                count = state.get("step", 0.0)
                chunk.counts.append(count if self._capturable else float(count))  # type: ignore[attr-defined]
                for key in keys:
                    tensor = state.get(key)
                    if tensor is not None and not isinstance(self._layout, Sharded):
                        tensor = state[key] = _laid_out_as(like, tensor)  # users may have replaced a tensor
                    chunk.state[key].append(tensor if tensor is None else local(tensor))  # type: ignore[arg-type]
            first += len(chunk.params)
            if chunk.params:
                yield chunk

    def _split(self, chunk: Chunk) -> Iterable[list[Chunk]]:
        """Return the chunks of a group for elementwise work.

        A compiled step fuses the complete group.
        """
        return [[chunk]] if self._compile else chunk.split()

    def _split_matrices(self, chunk: Chunk) -> Iterable[Chunk]:
        """Return the chunks of a group of matrices.

        Several processes, and a compiled step, work on the complete group.
        """
        alone = type(self._layout) is Local and not self._compile
        return chunk.split_matrices(chunk.group["flatten"]) if alone else [chunk]

    def orthogonalize(self, stacks: list[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
        """Return the orthogonal factor of each stack of matrices.

        A subclass may override this, for other iterations or for matrices with a structure. Each process calls it with
        the matrices that it owns.

        Args:
            stacks: directions (matrices, rows, cols), which may be overwritten. The row blocks of fused weights
                (``splits``) are separate stacks.
            group: the options of the parameters.

        Returns:
            A tensor of the same shape for each stack, in ``ns_dtype``.
        """
        factors: list[Tensor] = self._maybe_compile(group)(orthogonalize_all)(
            stacks,
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            dtype=validation.DTYPES[group["ns_dtype"]],
            algorithm=group["ns_algorithm"],
            overwrite=not self._compile,  # a compiled function would copy overwritten inputs back
            in_range=self.directions_in_range,
        )
        return factors

    def _scales(self, group: dict[str, Any], directions: Tensors, shapes: list[torch.Size]) -> Tensors | list[float]:
        """Return the factor of each orthogonal update.

        ``shapes`` are (matrices, rows, cols) of each direction.
        """
        raise NotImplementedError

    def _move_matrices(self, chunk: Chunk, directions: Tensors) -> None:
        """Apply ``p <- (1 - lr*wd) p - lr * scale * NS(direction)`` to matrices."""
        group = chunk.group
        blocks, shapes = row_blocks(chunk, directions)
        stacked = [stack_shape(shape, group["flatten"]) for shape in shapes]
        scales = self._scales(group, blocks, stacked)
        orthogonalize, dtype = partial(self.orthogonalize, group=group), validation.DTYPES[group["ns_dtype"]]
        factors = self._layout.orthogonalize(blocks, shapes, stacked, orthogonalize, dtype)
        torch._foreach_copy_(blocks, factors)
        self._apply(chunk, blocks, scales)

    def _move_vectors(self, chunk: Chunk) -> None:
        """Apply AdamW to the parameters of a chunk."""
        group, maybe_compile = chunk.group, self._maybe_compile(chunk.group)
        alike = all(
            p.dtype == g.dtype and p.stride() == g.stride() for p, g in zip(chunk.params, chunk.grads, strict=True)
        )
        if alike and not group["cautious"]:
            maybe_compile(kernels.adamw_)(chunk.params, *chunk.adam_arguments, group["lr"], group["weight_decay"])
        else:
            self._apply(chunk, maybe_compile(kernels.adam_directions)(*chunk.adam_arguments), None)

    def _apply(self, chunk: Chunk, directions: Tensors, scales: Tensors | list[float] | None) -> None:
        """Move the parameters of a chunk with :func:`ars2.kernels.apply_update_`.

        Parameters in half precision move in float32.
        """
        group, moved = chunk.group, list(chunk.params)
        remainders = chunk.state.get("remainder", [])
        half = [index for index, remainder in enumerate(remainders) if remainder is not None]
        params, remainders = [chunk.params[i] for i in half], [remainders[i] for i in half]
        exact = kernels.with_remainders(params, remainders)
        for index, tensor in zip(half, exact, strict=True):
            moved[index] = tensor
        if len(directions) > len(moved):
            moved, _ = row_blocks(chunk, moved)
        self._maybe_compile(group)(kernels.apply_update_)(
            moved, directions, scales, group["lr"], group["weight_decay"], cautious=group["cautious"]
        )
        kernels.round_(params, remainders, exact)

    def _count_gradients(self) -> None:
        """Increment the gradient counts of parameters and groups."""
        present = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        steps = [state["step"] for state in map(self.state.__getitem__, present) if "step" in state]
        if steps:
            torch._foreach_add_(steps, 1.0)
        for group in self.param_groups:
            group["step"] += 1

    def _check_gradients(self) -> bool:
        """Check every gradient before anything changes.

        Returns:
            Whether any parameter has a gradient.

        Raises:
            RuntimeError: a sparse gradient, or one that is not sharded as its parameter is.
        """
        self._adopt_parameters()
        found, sharded = False, isinstance(self._layout, Sharded)
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                found = True
                if param.grad.layout is not torch.strided:
                    name, _ = _named(group)[index]
                    raise RuntimeError(
                        f"parameter {name} has a sparse gradient, which is not supported:"
                        " make its module with sparse=False"
                    )
                if sharded and not same_layout(param.grad, param):
                    name, _ = _named(group)[index]
                    raise RuntimeError(
                        f"the gradient of parameter {name} is not sharded as the parameter is: let FSDP2 reduce it"
                        " (set_requires_gradient_sync(True) before the last backward of a step)"
                    )
        return found

    def _without_autocast(self) -> torch.autocast:
        """Return a context that disables autocast for the matrix products."""
        device = next((param.device.type for group in self.param_groups for param in group["params"]), "cpu")
        return torch.autocast(device, enabled=False)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return ``options`` with plain numbers, and tuples in place of lists."""
    options = validation.plain_numbers(options)
    if isinstance(options["ns_coefficients"], (list, tuple)):
        options["ns_coefficients"] = newton_schulz.checked(options["ns_coefficients"], "ns_coefficients")
    if isinstance(options["splits"], list):
        options["splits"] = tuple(options["splits"])
    return options


def row_blocks(chunk: Chunk, tensors: Tensors) -> tuple[list[Tensor], list[torch.Size]]:
    """Return views of each tensor's row blocks, and the shapes of the complete blocks."""
    splits = chunk.group["splits"]
    if splits == 1:
        return list(tensors), chunk.shapes
    blocks: list[Tensor] = []
    for tensor in tensors:
        blocks += tensor.split(tensor.shape[0] // splits if isinstance(splits, int) else list(splits))
    return blocks, [block.shape for block in blocks]


def _named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the parameters of a group with their names, or else their indices."""
    names = [*group.get("param_names", ()), *map(str, range(len(group["params"])))]
    pairs = zip(names, group["params"], strict=False)
    return [item if isinstance(item, tuple) else (name, item) for name, item in pairs]


def _by_track(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``group`` with its track, decided by the shapes of its parameters.

    The result is two groups if there are parameters for both tracks.
    """
    by_track: dict[str, list[Any]] = {}
    for (name, param), item in zip(_named(group), group["params"], strict=True):
        validation.check_parameter(param, name, "vector")
        by_track.setdefault("matrix" if is_matrix(param.shape) else "vector", []).append(item)
    return [{**group, "params": by_track[track], "track": track} for track in TRACKS if track in by_track] or [
        {**group, "track": "matrix"}
    ]


def _laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return ``tensor`` in the dtype and strides of ``like``.

    The fused kernels do not check that these agree.
    """
    if tensor is like or (tensor.dtype == like.dtype and tensor.stride() == like.stride()):
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=tensor.device).copy_(tensor)


def options_of(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group among the local variables of ``cls.__init__``."""
    return {name: arguments[name] for name in _defaults_of(cls) if name in arguments}


def _defaults_of(cls: type) -> dict[str, Any]:
    """Return the defaults of the group options of a class and its bases."""
    options: dict[str, Any] = {"splits": 1}
    for base in reversed(cls.__mro__):
        parameters = inspect.signature(base.__init__).parameters if "__init__" in vars(base) else {}  # type: ignore[misc]
        options |= {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return {name: default for name, default in options.items() if name not in ("compile", "capturable")}
