"""The kernels as PyTorch operators: torch.ops.sparvar.attend, .attend_choosing, .attend_following and .split_qkv.

An operator gets tensors and plain values alone, so a plan goes as its text and what cs4a carries as tensors: nothing is
hidden from `torch.compile`, and all memory is PyTorch's, which keeps a CUDA graph's apart. Outputs lie in memory as
[batch, tokens, heads, channels].
"""

from __future__ import annotations

import functools
import json
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch

from . import _engine
from .attention import AttentionState, Source, carried_shapes, plan_kernel, run_lists, step_of
from .errors import UsageError
from .lists import KeyLists, registered
from .plans import Plan, from_json

if TYPE_CHECKING:
    from torch import Tensor

_ARGS = "Tensor q, Tensor k, Tensor v"
_WHICH = "str plan, int layer, int scale_index, float scale, int threads"
# Strides are checked by the kernels: the compiler must not choose others.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)

_KERNEL_CHANNELS = (64, 80, 96, 112, 128)  # of a head
_MUCH = 4e9  # multiply-adds of a product

library = torch.library.Library("sparvar", "DEF")
_OPS = torch.ops.sparvar
library.define(f"attend({_ARGS}, {_WHICH}) -> Tensor", tags=_TAGS)
library.define(f"attend_choosing({_ARGS}, {_WHICH}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
library.define(f"attend_following({_ARGS}, Tensor choice, Tensor residual, {_WHICH}) -> Tensor", tags=_TAGS)
library.define(
    "split_qkv(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? head_scale, Tensor? rope, bool normalise, "
    "int first) -> Tensor",
    tags=_TAGS,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Source,
    layer: int,
    scale_index: int,
    scale: float,
    state: AttentionState | None,
    threads: int,
) -> Tensor:
    """`sparvar.attention` of tensors. Made of operators, so that `torch.compile` sees through it."""
    for name, other in (("k", k), ("v", v)):
        if other.device != q.device:
            raise UsageError(f"attention: q is on {q.device} and {name} on {other.device}: they must be on one device")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise UsageError(f"attention: q is on {q.device}; kernels are for the CPU and CUDA")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UsageError("attention: the kernels have no gradients; call within torch.no_grad(), or detach q, k and v")
    step = step_of(plan, layer, scale_index, state)
    on_gpu = q.device.type == "cuda"
    if on_gpu and isinstance(plan, Plan) and plan.method(layer, scale_index) == "dense":
        _require_keys(q, k, v, plan, scale_index)
        if not _dense_is_ours(q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    which = (plan.key, layer, scale_index, scale, threads)
    if step in ("lists", "probe"):
        return cast("Tensor", _OPS.attend.default(q, k, v, *which))
    carrying = cast("AttentionState", state)
    if step == "choose":
        out, choice, residual = _OPS.attend_choosing.default(q, k, v, *which)
        carrying.layers[layer] = (choice, residual)
        return cast("Tensor", out)
    return cast("Tensor", _OPS.attend_following.default(q, k, v, *carrying.of(layer), *which))


def _dense_is_ours(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Is a dense scale the kernel's and not PyTorch's? On Hopper it is faster where there is much to do; PyTorch takes
    less of the host, tensors that lie in memory in any way, and what the compiler traces."""
    batch, heads, queries, channels = q.shape
    if torch.compiler.is_compiling() or q.dtype != torch.bfloat16 or channels not in _KERNEL_CHANNELS:
        return False
    if batch * heads * queries * k.shape[2] * channels < _MUCH or not q.is_contiguous():
        return False
    if any(tensor.storage_offset() % 8 for tensor in (q, k, v)):  # kernels read 16 bytes at once
        return False
    row = (k.stride(0) == heads * k.stride(1), k.stride(1) % channels == 0, k.stride()[2:] == (channels, 1))
    return all(row) and v.stride() == k.stride() and _on_hopper(q)


def _on_hopper(x: Tensor) -> bool:
    return torch.cuda.get_device_capability(x.device) == (9, 0)


def _require_keys(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale_index: int) -> None:
    """What the kernels check, before PyTorch's attention."""
    schedule = cast("tuple[tuple[int, int], ...]", plan.schedule)
    keys = sum(h * w for h, w in schedule[: scale_index + 1])
    batch, heads, _, channels = q.shape
    if k.shape != (batch, heads, keys, channels) or v.shape != k.shape:
        raise UsageError(
            f"attention: k and v: expected {(batch, heads, keys, channels)}, found {tuple(k.shape)} and "
            f"{tuple(v.shape)}; the order is (batch, heads, tokens, channels)"
        )


@functools.lru_cache(maxsize=64)
def _plan_of(key: str) -> Plan:
    text = json.loads(key)
    return from_json(text["plan"], text["schedule"])


def _source(key: str) -> Source:
    return registered(key) if key.startswith("lists:") else _plan_of(key)


def _empty_out(q: Tensor) -> Tensor:
    batch, heads, queries, channels = q.shape
    return q.new_empty((batch, queries, heads, channels)).transpose(1, 2)


# ---- one call, on the CPU or on the current stream of a GPU, with working memory of PyTorch's

_Prepared = tuple[Any, Any]  # a kernel, and a call of it whose arrays were checked
_prepared: dict[Any, _Prepared] = {}
_MOST_PREPARED = 4096


def _keep(key: Any, made: _Prepared) -> _Prepared:
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    _prepared[key] = made
    return made


def _stream(of: Tensor) -> int:
    """The current one of its device; 0 on the CPU."""
    return torch.cuda.current_stream(of.device).cuda_stream if of.is_cuda else 0


def _current(device: torch.device) -> AbstractContextManager[object]:
    """The device is PyTorch's current one, as it mostly is."""
    there = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if there else torch.cuda.device(device)


def _kernel(plan: Plan, q: Tensor) -> Any:
    return plan_kernel(plan, str(q.device), q.dtype == torch.bfloat16)


def _call(
    source: Source,
    which: tuple[int, int, float],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    carried: tuple[Tensor, Tensor] | tuple[()] = (),
) -> _Prepared:
    """tensors: q, k, v, out; which: layer, scale, factor of the logits; carried: choice, residual. Checked once: later
    calls of these shapes and strides, in whichever layer of the same rule, cost no more than addresses. The tensors'
    device is the current one."""
    layer, scale_index, scale = which
    rule = -1 if isinstance(source, KeyLists) else source.rule_index(layer, scale_index)
    q = tensors[0]
    given = (*tensors[:3], *carried)  # out is made like q
    shapes = tuple([(tensor.dtype, tensor.shape, tensor.stride()) for tensor in given])
    key = (source.key, rule, scale_index, scale, q.device, shapes)
    found = _prepared.get(key)
    if found is None:
        lists = source.handle if isinstance(source, KeyLists) else None
        kernel = _kernel(_no_rules if isinstance(source, KeyLists) else source, q)
        arrays = [tensor.detach() for tensor in tensors]
        call = _engine.Call(layer, scale_index, scale, lists)
        found = _keep(key, (kernel, kernel.prepare(call, *arrays, *(carried or (None, None)))))
    return found


def _run(
    source: Source,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    which: tuple[int, int, float],
    carried: tuple[Tensor, Tensor] | tuple[()] = (),
) -> None:
    """Enqueues the work of `_call`, on the current stream."""
    q = tensors[0]
    with _current(q.device):
        kernel, prepared = _call(source, which, tensors, carried)
        memory = q.new_empty(prepared.bytes, dtype=torch.uint8)
        addresses = [tensor.data_ptr() for tensor in (*tensors, *carried)]
        kernel.run_at(prepared, _stream(q), *addresses, *(() if carried else (0, 0)), memory.data_ptr())


def _attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, key: str, layer: int, scale_index: int, scale: float, threads: int
) -> Tensor:
    plan, out = _source(key), _empty_out(q)
    if step_of(plan, layer, scale_index, None) == "lists":
        run_lists([tensor.detach() for tensor in (q, k, v, out)], plan, layer, scale_index, scale, False, threads)
    else:
        _run(plan, (q, k, v, out), (layer, scale_index, scale))
    return out


def _attend_cuda(
    q: Tensor, k: Tensor, v: Tensor, key: str, layer: int, scale_index: int, scale: float, threads: int
) -> Tensor:
    out = _empty_out(q)
    _run(_source(key), (q, k, v, out), (layer, scale_index, scale))
    return out


def _carried(q: Tensor, kernel: Any, layer: int, scale_index: int) -> tuple[Tensor, Tensor]:
    choice, residual = carried_shapes(kernel, layer, scale_index, tuple(q.shape))
    of = q.dtype if q.device.type == "cuda" else torch.float32
    return q.new_empty(choice, dtype=torch.int32), q.new_empty(residual, dtype=of)


def _choosing(
    q: Tensor, k: Tensor, v: Tensor, key: str, layer: int, scale_index: int, scale: float, threads: int
) -> tuple[Tensor, Tensor, Tensor]:
    plan, out = _plan_of(key), _empty_out(q)
    with _current(q.device):
        carried = _carried(q, _kernel(plan, q), layer, scale_index)
    _run(plan, (q, k, v, out), (layer, scale_index, scale), carried)
    return out, *carried


def _following(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: Tensor,
    residual: Tensor,
    key: str,
    layer: int,
    scale_index: int,
    scale: float,
    threads: int,
) -> Tensor:
    out = _empty_out(q)
    _run(_plan_of(key), (q, k, v, out), (layer, scale_index, scale), (choice, residual))
    return out


_no_rules = from_json({"name": "lists", "rules": []}, [1])


# ---- what stands before attention in a layer


def _split_qkv(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    head_scale: Tensor | None,
    rope: Tensor | None,
    normalise: bool,
    first: int,
) -> Tensor:
    """q of the product of a layer's qkv projection, with k and v written into rows [first, first + tokens) of their
    caches, in one pass.

    qkv: (batch, tokens, 3, heads, channels), contiguous. k_cache, v_cache: (batch, heads, capacity, channels) of the
    type of q, float32 or bfloat16. normalise: q and k get length 1 (F.normalize); head_scale: float32 (heads,), q is
    multiplied by it; rope: float32 (tokens, channels / 2, 2), cosine and sine of the pairs (2i, 2i + 1). Sums are
    float32 and every number is rounded once. Returns q, (batch, heads, tokens, channels).
    """
    batch, tokens, _, heads, channels = qkv.shape
    q = k_cache.new_empty((batch, heads, tokens, channels))
    product = (qkv if qkv.is_cuda else qkv.float()).flatten(2, 3)
    arrays, small = (product, q, k_cache, v_cache), (head_scale, rope)
    kernel, prepared = _split_call(arrays, small, normalise)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*arrays, *small)]
    kernel.split_at(prepared, first, _stream(qkv), *addresses)
    return q


def _split_call(
    arrays: tuple[Tensor, Tensor, Tensor, Tensor], small: tuple[Tensor | None, Tensor | None], normalise: bool
) -> _Prepared:
    """arrays: product, q, k_cache, v_cache; small: head_scale, rope."""
    every = (*arrays, *small)
    shapes = tuple([None if t is None else (t.dtype, t.shape, t.stride(), t.device) for t in every])
    found = _prepared.get((shapes, normalise))
    if found is None:
        product, _, k_cache, _ = arrays
        kernel = plan_kernel(_no_rules, str(product.device), k_cache.dtype == torch.bfloat16)
        detached = [None if tensor is None else tensor.detach() for tensor in every]
        found = _keep((shapes, normalise), (kernel, kernel.prepare_split(normalise, *detached)))
    return found


class LayerCalls:
    """What stands between the two projections of a layer at one scale, split_qkv and attention, checked once and then
    called by addresses. PyTorch's dispatcher, which this goes past, takes longer than a small scale does; so nothing
    that traces or overrides operators may be active: `dispatches_plainly`. Lists of a plan that carries keys from scale
    to scale are not for this."""

    def __init__(
        self,
        plan: Plan,
        which: tuple[int, int, float],
        qkv: Tensor,
        cache: Tensor,
        small: tuple[Tensor | None, Tensor | None, bool],
        first: int,
    ) -> None:
        """which: as of `_run`; cache: one like those that will come; small: head_scale, rope and normalise, as of
        `split_qkv`."""
        batch, tokens, _, heads, channels = qkv.shape
        self.device, self.first = qkv.device, first
        self.q_shape, self.out_shape = (batch, heads, tokens, channels), (batch, tokens, heads * channels)
        self.like = qkv.new_empty(0)
        q, out = qkv.new_empty(self.q_shape), qkv.new_empty((batch, tokens, heads, channels)).transpose(1, 2)
        self.split_call = _split_call((qkv.detach().flatten(2, 3), q, cache, cache), small[:2], small[2])
        keys = cache[:, :, : first + tokens]
        with _current(self.device):
            self.attend_call = _call(plan, which, (q, keys, keys, out))

    @staticmethod
    def takes(plan: Plan, layer: int, scale_index: int, qkv: Tensor, keys: int) -> bool:
        """Is there such a call? On a GPU in bfloat16, where the kernels are the fast ones; on the CPU in float32."""
        batch, tokens, _, heads, channels = qkv.shape
        method = plan.method(layer, scale_index)
        if qkv.device.type == "cpu":
            return method in ("dense", "csla", "probe") and qkv.dtype == torch.float32
        if qkv.device.type != "cuda" or qkv.dtype != torch.bfloat16 or channels not in _KERNEL_CHANNELS:
            return False
        large = batch * heads * tokens * keys * channels >= _MUCH and not _on_hopper(qkv)
        return method in ("csla", "probe") or (method == "dense" and not large)

    def split(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, head_scale: Tensor | None, rope: Tensor | None
    ) -> Tensor:
        """q. All tensors are of the types, shapes and strides that this was made with."""
        q = self.like.new_empty(self.q_shape)
        addresses = [0 if x is None else x.data_ptr() for x in (qkv, q, k_cache, v_cache, head_scale, rope)]
        kernel, prepared = self.split_call
        with _current(self.device):
            kernel.split_at(prepared, self.first, _stream(q), *addresses)
        return q

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """The output, (batch, tokens, width)."""
        out = self.like.new_empty(self.out_shape)
        kernel, prepared = self.attend_call
        memory = self.like.new_empty(prepared.bytes, dtype=torch.uint8)
        addresses = [x.data_ptr() for x in (q, k_cache, v_cache, out)]
        with _current(self.device):
            kernel.run_at(prepared, _stream(q), *addresses, 0, 0, memory.data_ptr())
        return out


def dispatches_plainly(x: Tensor) -> bool:
    """Does an operator of such a tensor do no more than compute: no tracing, no mode, no subclass?"""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling() and _modes() == 0


_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)  # of no public name; without it: never


def _split_fake(qkv: Tensor, k_cache: Tensor, *_: Any) -> Tensor:
    batch, tokens, _three, heads, channels = qkv.shape
    return k_cache.new_empty((batch, heads, tokens, channels))


# ---- without computing: shapes for the compiler


def _attend_fake(q: Tensor, *_: Any) -> Tensor:
    return _empty_out(q)


def _choosing_fake(
    q: Tensor, k: Tensor, v: Tensor, key: str, layer: int, scale_index: int, scale: float, threads: int
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = plan_kernel(_plan_of(key), "cpu", q.dtype == torch.bfloat16)
    return _empty_out(q), *_carried(q, kernel, layer, scale_index)


for _name, _cpu, _cuda, _fake in (
    ("attend", _attend_cpu, _attend_cuda, _attend_fake),
    ("attend_choosing", _choosing, _choosing, _choosing_fake),
    ("attend_following", _following, _following, _attend_fake),
    ("split_qkv", _split_qkv, _split_qkv, _split_fake),
):
    library.impl(_name, _cpu, "CPU")
    library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"sparvar::{_name}", _fake, lib=library)
