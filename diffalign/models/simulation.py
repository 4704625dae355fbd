"""What computation would hold in memory on a device, found without memory, computation or device.

Everything lies on torch's meta device, where tensors have shapes and no values. `Simulation` sees
every operator that autograd, checkpointing, peft and the optimiser call, and follows the storages
that they make until the last reference to them is gone; what an allocator of the device would hold
is the sum of those alive. Two things that the meta device lacks are done here as the device does
them: autocast, whose rules differ between CPU and CUDA, and fused attention, which keeps queries,
keys, values, the output and one number a row instead of the matrix of all weights.

Sources: torch/csrc/autograd and aten/src/ATen/autocast_mode.h (which operators run in which
precision); Dao 2023, arXiv:2307.08691, algorithm 2 (what the backward of fused attention keeps).
Prior art: torch.distributed._tools.mem_tracker, which does the same for FSDP on fake tensors.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
SimulatedDevice = Literal["cpu", "cuda"]

_aten = torch.ops.aten
_IN_PLACE = {_aten._fused_adamw_.default, _aten._fused_adamw_.tensor_lr}
"""Operators that allocate nothing, and have no form on the meta device."""
_BY_INDEX = {
    _aten.embedding, _aten.index_select, _aten.index, _aten.gather, _aten.masked_scatter,
    _aten.scatter, _aten.embedding_dense_backward, _aten.index_put, _aten.index_put_,
    _aten._index_put_impl_,
}  # fmt: skip
"""Operators of which indices may have values where the rest has none; results depend on them."""
_READABLE = 1 << 16
"""Elements of a tensor that may be read back: figures. What is larger takes no memory."""


@dataclass
class Peak:
    """What was alive at the fullest moment of a phase."""

    total: int = 0
    """Bytes."""
    by_label: Mapping[str, int] = field(default_factory=dict)
    """The same bytes by what they were made or marked as."""


class Simulation(TorchDispatchMode):
    """Follows the storages on the meta device that are made while it is entered.

    A storage carries the label that was current when it was made, until `mark` gives it another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = "other"
        """Of what is made from now on; it also names the phase, for `peaks`."""
        self.peaks: dict[str, Peak] = {}
        """The fullest moment of every phase."""
        self.work: Counter[str] = Counter()
        """Floating-point operations of matrix products and convolutions, by label."""
        self._alive: dict[int, tuple[int, str]] = {}
        self._by_label: Counter[str] = Counter()
        self._total = 0
        self._made: dict[Any, Any] = {}

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        return self._total

    def alive(self, label: str) -> int:
        """Bytes under a label that are alive."""
        return self._by_label[label]

    def mark(self, tensors: Iterable[Tensor], label: str) -> None:
        """Say what tensors are, whenever they were made."""
        for tensor in tensors:
            self._follow(tensor)
            key = tensor.untyped_storage()._cdata
            if key in self._alive:
                size, before = self._alive[key]
                self._by_label[before] -= size
                self._by_label[label] += size
                self._alive[key] = (size, label)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].device == META:
            return False if args[0].dtype == torch.bool else 1
        if func is _aten._to_copy.default and _is_readable(args[0], kwargs):
            # Whole numbers, such as tokens, masks and sizes of images, decide what is computed.
            return func(args[0], dtype=kwargs.get("dtype"))
        mixed = func.overloadpacket not in _BY_INDEX and _is_mixed(args)
        if mixed:
            args = tuple(map(_blank, args))
        if func is _aten._to_copy.default and args[0].device == META:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cpu":
                dtype = kwargs.get("dtype") or args[0].dtype
                if args[0].numel() > _READABLE:  # weights: they lie there, and nothing reads them
                    return torch.zeros((), dtype=dtype).expand(args[0].shape)
                return torch.zeros(args[0].shape, dtype=dtype)
        result = self._run(func, args, kwargs)
        if (work := flop_registry.get(func.overloadpacket)) is not None:
            self.work[self.label] += work(*args, **kwargs, out_val=result)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._follow(value)
            elif isinstance(value, (tuple, list)):
                for part in value:
                    self._follow(part)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The operator on the meta device; what it made of equal shapes before is made again.

        Shapes are worked out in Python, which takes most of the time, and a network repeats
        itself."""
        if func.overloadpacket in _BY_INDEX or not _makes_anew(func):
            if func in _IN_PLACE:
                return None
            return func(*args, **kwargs)
        try:
            key = (func, _signature(args), _signature(tuple(kwargs.items())))
            known = self._made.get(key)
        except TypeError:  # an argument that cannot be a key
            return func(*args, **kwargs)
        if known is None:
            result = func(*args, **kwargs)
            parts = result if isinstance(result, tuple) else (result,)
            if all(isinstance(part, Tensor) and part.device == META for part in parts):
                self._made[key] = (
                    isinstance(result, tuple),
                    [(part.shape, part.stride(), part.dtype) for part in parts],
                )
            return result
        several, specifications = known
        made = tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device=META)
            for shape, stride, dtype in specifications
        )
        return made if several else made[0]

    def _follow(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.device != META:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = (size, self.label)
        self._by_label[self.label] += size
        self._total += size
        weakref.finalize(storage, self._forget, key)
        peak = self.peaks.setdefault(self.label, Peak())
        if self._total > peak.total:
            self.peaks[self.label] = Peak(self._total, dict(self._by_label))

    def _forget(self, key: int) -> None:
        size, label = self._alive.pop(key)
        self._by_label[label] -= size
        self._total -= size


def _is_readable(value: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether whole numbers with values would be copied to where there are none."""
    device = kwargs.get("device")
    whole = not (
        value.is_floating_point() or (kwargs.get("dtype") or torch.int64).is_floating_point
    )
    return (
        whole and value.device.type == "cpu" and device is not None and torch.device(device) == META
    )


def _is_mixed(args: tuple[Any, ...]) -> bool:
    """Whether tensors with values, besides single numbers, meet others without."""
    found = [0, 0]
    for value in args:
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, Tensor):
                found[part.device == META] += part.device == META or part.dim() > 0
    return all(found)


def _blank(value: Any) -> Any:
    """The same without values."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_blank, value))
    if not isinstance(value, Tensor) or value.device == META or value.dim() == 0:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


_ANEW: dict[Any, bool] = {}


def _makes_anew(func: Any) -> bool:
    """Whether all that an operator returns is new, and nothing that it is given changes."""
    known = _ANEW.get(func)
    if known is None:
        schema = func._schema
        known = _ANEW[func] = (
            not schema.is_mutable
            and all(
                returned.alias_info is None and "Tensor" in str(returned.type)
                for returned in schema.returns
            )
            and bool(schema.returns)
            and not func.is_view
        )
    return known


def _signature(value: Any) -> Any:
    """What a result's shape depends on; raises TypeError for what cannot be hashed."""
    if isinstance(value, Tensor):
        return (value.dtype, value.shape, value.stride(), value.device.type, value.storage_offset())
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(map(_signature, value)))
    return (type(value), value)


class _Attention(torch.autograd.Function):
    """Fused attention as far as memory goes."""

    @staticmethod
    def forward(
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        device: SimulatedDevice,
        simulation: Simulation,
    ) -> Tensor:
        # Kernels write heads last but one, so that putting them together again copies nothing.
        *rows, heads, length, _ = query.shape
        output = query.new_empty((*rows, length, heads, value.shape[-1])).transpose(-2, -3)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        if bias is not None:  # a mask becomes numbers that are added, and is kept as such
            bias = query.new_empty(bias.shape)
        context.save_for_backward(query, key, value, output, sums, bias)
        context.device, context.simulation = device, simulation
        simulation.work[simulation.label] += _attention_work(query, key, value)
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        query, key, value, _, sums, _ = context.saved_tensors
        simulation = context.simulation  # of each product one gradient for each of its factors
        simulation.work[simulation.label] += 2 * _attention_work(query, key, value)
        query_gradient = torch.empty_like(query)
        if context.device == "cuda":  # summed in float32 over the blocks, then rounded
            torch.empty_like(query, dtype=torch.float32)
            torch.empty_like(sums)
        gradients_of_others = torch.empty_like(key), torch.empty_like(value)
        return query_gradient, *gradients_of_others, None, None, None


def _attention_work(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Operations of both products of attention, forward."""
    rows = query.numel() // query.shape[-1]
    return 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_LOWER = {
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.bmm, torch.mm,
    torch.addmm, torch.baddbmm, torch.einsum, torch.conv_transpose2d, F.bilinear, torch.mv,
    F.scaled_dot_product_attention, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm,
}  # fmt: skip
"""Functions that autocast runs in lower precision, as far as image generators use them."""

_UPPER = {
    "cpu": {F.mse_loss, torch.cdist, torch.prod, Tensor.prod},
    "cuda": {
        F.mse_loss, torch.cdist, torch.prod, Tensor.prod, F.layer_norm, torch.layer_norm,
        F.group_norm, torch.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax,
        torch.log_softmax, Tensor.log_softmax, torch.pow, Tensor.pow, Tensor.__pow__, torch.exp,
        Tensor.exp, torch.log, Tensor.log, torch.rsqrt, Tensor.rsqrt, torch.reciprocal,
        F.softplus, torch.cumsum, Tensor.cumsum, torch.norm, Tensor.norm, F.interpolate,
        torch.logsumexp, Tensor.logsumexp, F.cosine_similarity,
    },
}  # fmt: skip
"""Functions that it runs in float32."""


class _DeviceRules(TorchFunctionMode):
    """Autocast and fused attention of a device, for tensors on the meta device.

    Autocast is switched by that of the CPU, which checkpointing restores when it recomputes. As in
    autocast itself, a float32 weight that trains is rounded once for the whole context.
    """

    def __init__(self, device: SimulatedDevice, simulation: Simulation) -> None:
        super().__init__()
        self.device: SimulatedDevice = device
        self.simulation = simulation
        self._rounded: dict[int, tuple[Tensor, Tensor]] = {}
        self._recomputed: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()
        self._backward = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            self._rounded.clear()
            self._backward = True
            try:
                gradient = torch.ones_like(args[0])
                with self:  # what is recomputed in it calls functions too
                    # Not `torch.autograd.backward`, which leaves modes like this one behind.
                    return torch.autograd.Variable._execution_engine.run_backward(
                        (args[0],),
                        (gradient,),
                        False,
                        False,
                        (),
                        allow_unreachable=True,
                        accumulate_grad=True,
                    )
            finally:
                self._backward = False
        if torch.is_autocast_enabled("cpu"):
            if func in _LOWER:
                dtype = torch.get_autocast_dtype("cpu")
                args, kwargs = self._cast(args, kwargs, lambda value: self._lower(value, dtype))
            elif func in _UPPER[self.device]:
                args, kwargs = self._cast(args, kwargs, _upper)
        elif self._rounded:
            self._rounded.clear()
        if func is F.scaled_dot_product_attention and args[0].device == META:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _cast(args: Any, kwargs: Any, cast: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
        def apply(value: Any) -> Any:
            if isinstance(value, Tensor):
                castable = value.device == META and value.is_floating_point()
                return cast(value) if castable else value
            return [apply(part) for part in value] if isinstance(value, list) else value

        return tuple(map(apply, args)), {name: apply(value) for name, value in kwargs.items()}

    def _lower(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if value.dtype == dtype or value.dtype == torch.float64:
            return value
        if value.dtype != torch.float32 or not value.requires_grad or not value.is_leaf:
            return value.to(dtype)
        if self._backward:  # the graph of what is recomputed holds it as long as it is needed
            known = self._recomputed.get(id(value))
            if known is None:
                known = self._recomputed[id(value)] = value.to(dtype)
            return known
        if not torch.is_autocast_cache_enabled():
            return value.to(dtype)
        if id(value) not in self._rounded:
            self._rounded[id(value)] = (value, value.to(dtype))
        return self._rounded[id(value)][1]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,  # which flash kernels do without repeating keys and values
    ) -> Tensor:
        result: Tensor = _Attention.apply(
            query, key, value, attn_mask, self.device, self.simulation
        )
        return result


def _upper(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


@contextmanager
def simulated(device: SimulatedDevice) -> Iterator[Simulation]:
    """Within this context, what is computed on the meta device is followed.

    Args:
        device: whose rules of autocast and attention hold; it need not be here.
    """
    autocast = torch.autocast

    def switched(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == META.type else device_type, *args, **kwargs)

    fused = "_get_fused_kernels_supported_devices"
    devices = getattr(optimizer, fused)()
    simulation = Simulation()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", switched))
        stack.enter_context(mock.patch.object(optimizer, fused, lambda: [*devices, META.type]))
        stack.enter_context(_DeviceRules(device, simulation))
        yield stack.enter_context(simulation)
