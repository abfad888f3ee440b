"""What `sparvar.patch` puts in the place of upstream's self-attention layers.

A layer's own forward takes some thirty operations; here they are the projection, one kernel that normalises, rotates
and writes into the cache, attention by the plan, and the output projection. Less work for the GPU, and far fewer
launches on the small scales, where a model in eager PyTorch waits for them.
"""

from __future__ import annotations

import os
import weakref
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from . import _torch, plans
from .attention import AttentionState
from .errors import UsageError
from .plans import Plan

if TYPE_CHECKING:
    from torch import Tensor

    Grids = tuple[tuple[int, int], ...]
    Schedule = tuple[tuple[int, ...], ...] | None  # a call's scale_schedule, ((1, h, w), ...)

_RECORD = "_sparvar_patch"  # attribute of a patched layer
_BUFFER = "_sparvar_buffer"  # attribute of a cached tensor that is a view of a buffer of ours
_LAYER_HAS = ("mat_qkv", "q_bias", "zero_k_bias", "v_bias", "proj", "proj_drop", "num_heads", "head_dim", "scale")
_CACHE_HAS = ("kv_caching", "caching", "cached_k", "cached_v")


def patch(model: torch.nn.Module, attention: str | os.PathLike[str] | Plan) -> None:
    """`sparvar.patch`."""
    layers = _layers(model)
    if not layers:
        raise UsageError(
            f"patch: {type(model).__name__} has no self-attention layers of upstream's Infinity or VAR (with "
            "mat_qkv, kv_caching and cached_k); pass the transformer itself"
        )
    patched = [_record(layer) for layer in layers if _record(layer) is not None]
    if patched:
        raise UsageError(
            f"patch: {type(model).__name__} is patched already (attention {patched[0].shared.name}); call "
            "sparvar.unpatch(model) first"
        )
    shared = _Shared(attention, len(layers), _patch_nums(model))
    for index, layer in enumerate(layers):
        setattr(layer, _RECORD, _Layer(shared, index, layer.__dict__.get("forward")))
        layer.forward = MethodType(_forward, layer)


def unpatch(model: torch.nn.Module) -> None:
    """`sparvar.unpatch`."""
    patched = [layer for layer in _layers(model) if _record(layer) is not None]
    if not patched:
        raise UsageError(f"unpatch: {type(model).__name__} is not patched")
    for layer in patched:
        before = _record(layer).forward_before
        del layer.forward
        if before is not None:
            layer.forward = before
        delattr(layer, _RECORD)


def _layers(model: torch.nn.Module) -> list[Any]:
    return [m for m in model.modules() if all(hasattr(m, name) for name in (*_LAYER_HAS, *_CACHE_HAS))]


def _record(layer: Any) -> Any:
    return layer.__dict__.get(_RECORD)


def _patch_nums(model: torch.nn.Module) -> Grids | None:
    for module in model.modules():
        nums = getattr(module, "patch_nums", None)
        if isinstance(nums, (tuple, list)):
            return plans.grids([int(side) for side in nums])
    return None


class _Walk(NamedTuple):
    """A schedule with the plan that is bound to it."""

    plan: Plan
    scale_at: dict[tuple[int, int], int]  # tokens of the scale, tokens before it -> scale
    tokens: int
    begins: tuple[int, ...]  # of the scales

    def room(self, end: int) -> int:
        """Tokens that a layer's cache is made for where `end` are to be in it. Keys of the last scale are read by no
        other, so layers make room for them one after the other, when it is there."""
        return self.begins[-1] if end <= self.begins[-1] else self.tokens


class _Shared:
    """What the layers of a model share: the plan for each schedule that comes, tables of rotations."""

    def __init__(self, attention: str | os.PathLike[str] | Plan, layers: int, patch_nums: Grids | None) -> None:
        self.attention = attention
        self.layers = layers
        self.patch_nums = patch_nums
        self.walks: dict[Schedule, _Walk] = {}
        self.ropes: dict[Any, tuple[Tensor, Tensor]] = {}
        self.made_ropes = 0  # so far
        self.drawn: tuple[Any, weakref.ref[Tensor]] | None = None  # the last layer that is through, its cached_k
        # whatever is wrong with the plan is said now, not in the first picture
        trial = self._bind(patch_nums if patch_nums is not None else plans.schedule())
        trial.require_kernels()
        self.name = trial.name
        if patch_nums is not None:
            self.walk(None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model is through with nothing."""
        return {**self.__dict__, "drawn": None}

    def _bind(self, grids: Grids) -> Plan:
        if isinstance(self.attention, Plan):
            return self.attention if self.attention.schedule is not None else self.attention.bind(grids)
        name = os.fspath(self.attention)
        return plans.from_json(name, grids) if name.endswith(".json") else plans.preset(name, grids, layers=self.layers)

    def walk(self, key: Schedule) -> _Walk:
        """Of a call's schedule, or of None: the model's or the plan's."""
        found = self.walks.get(key)
        if found is None:
            found = self.walks[key] = self._made(key)
        return found

    def _made(self, key: Schedule) -> _Walk:
        own = self.attention.schedule if isinstance(self.attention, Plan) else None
        grids = self.patch_nums if self.patch_nums is not None else own
        if key is not None:
            if any(len(grid) != 3 or grid[0] != 1 for grid in key):
                raise UsageError(
                    f"patch: scale_schedule {key}: expected (1, h, w) for every scale: pictures, not videos"
                )
            grids = tuple((int(h), int(w)) for _, h, w in key)
        if grids is None:
            raise UsageError(
                "patch: neither the call (scale_schedule) nor the model (patch_nums) says which scales come; patch "
                "with a plan that has a schedule"
            )
        plan = self._bind(grids)
        if plan.schedule != grids:
            raise UsageError(
                f"patch: plan {plan.name} is made for the schedule {_text(plan.schedule)}, and the model draws "
                f"{_text(grids)}; pass plan.bind(schedule), or a plan without a schedule"
            )
        begins = [0]
        for h, w in grids:
            begins.append(begins[-1] + h * w)
        scale_at = {(h * w, begin): index for index, ((h, w), begin) in enumerate(zip(grids, begins, strict=False))}
        return _Walk(plan, scale_at, begins[-1], tuple(begins[:-1]))

    def drop_drawn(self) -> None:
        """Lets go of the cache of a layer that is through with its picture. What somebody else has put in its place
        stays."""
        if self.drawn is not None:
            layer, cached = self.drawn
            self.drawn = None
            if layer.cached_k is not None and layer.cached_k is cached():
                layer.cached_k = layer.cached_v = None

    def rope(
        self, tables: tuple[dict[str, Tensor], Any], schedule: Schedule, like: Tensor, refresh: bool = False
    ) -> Tensor:
        """The rotations of a whole schedule, float32 (tokens, channels / 2, 2), of numbers rounded to the type of
        `like` as upstream rounds them. tables: rope2d_freqs_grid and scale_schedule of a call."""
        by_name, scale_schedule = tables
        if schedule is None:
            raise UsageError("patch: rope2d_freqs_grid came without scale_schedule, which says where its tokens stand")
        key = (schedule, like.dtype, like.device)
        known = self.ropes.get(key)
        if known is not None and not refresh:
            return known[1]
        source = by_name.get(str(tuple(scale_schedule)))
        if source is None:
            raise UsageError(f"patch: rope2d_freqs_grid has no table for scale_schedule {tuple(scale_schedule)}")
        if known is None or known[0] is not source:
            cosine_sine = source.detach().reshape(2, -1, source.shape[-1]).to(like.device, like.dtype).float()
            known = self.ropes[key] = (source, cosine_sine.permute(1, 2, 0).contiguous())
            self.made_ropes += 1
        return known[1]


def _text(grids: Grids | None) -> str:
    if grids is None:
        return "none"
    return f"of {len(grids)} scales up to {grids[-1][0]}x{grids[-1][1]} ({sum(h * w for h, w in grids)} tokens)"


class _Step(NamedTuple):
    """One scale of one layer. What was found out about it holds for the next picture too, where that is `of` the same
    arguments (schedule and scale_ind first), tokens and types."""

    of: tuple[Any, ...]
    plan: Plan
    scale_index: int
    capacity: int  # tokens that the cache has room for
    ends: bool  # the picture
    rope: Tensor | None
    calls: _torch.LayerCalls | None


class _Layer:
    """What one layer keeps while it is patched."""

    def __init__(self, shared: _Shared, index: int, forward_before: Any) -> None:
        self.shared = shared
        self.index = index
        self.forward_before = forward_before
        self.state = AttentionState()
        self.bias: Tensor | None = None
        self.normalises = False
        self.head_scale: Tensor | None = None
        self.token_axis = 2  # of cached_k
        self.settled = False
        self.steps: dict[int, _Step] = {}  # tokens before it -> scale

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model finds its own."""
        return {**self.__dict__, "steps": {}}

    def begin(self, layer: Any) -> None:
        """A picture begins: nothing of the one before counts, and the weights may be others."""
        self.state.reset()
        self.bias = torch.cat((layer.q_bias, layer.zero_k_bias, layer.v_bias)).detach()
        self.normalises = bool(getattr(layer, "cos_attn", getattr(layer, "attn_l2_norm", False)))
        self.head_scale = None
        self.settled = False

    def settle(self, layer: Any, dtype: torch.dtype) -> None:
        """What depends on the type that the layer turned out to run in."""
        self.settled = True
        if self.bias is not None:
            self.bias = self.bias.to(dtype)
        self.token_axis = _token_axis(layer, dtype)
        if self.normalises:
            factor = layer.scale_mul_1H11.detach().clamp_max(layer.max_scale_mul).exp()
            if hasattr(layer, "cos_attn"):  # Infinity rounds it, VAR does not
                factor = factor.to(dtype)
            self.head_scale = factor.float().reshape(-1)


def _forward(
    layer: Any,
    x: Tensor,
    attn_bias_or_two_vector: Any = None,
    attn_fn: Any = None,
    scale_schedule: Any = None,
    rope2d_freqs_grid: Any = None,
    scale_ind: int = 0,
    *,
    attn_bias: Any = None,
) -> Tensor:
    """The layer's forward, with the arguments of Infinity's and VAR's; x: (batch, tokens of one scale, width)."""
    record: _Layer = _record(layer)
    if attn_bias_or_two_vector is not None or attn_bias is not None or attn_fn is not None or not layer.caching:
        _refuse(record, layer, attn_fn)
    if layer.training:
        raise UsageError("patch: the model is in training mode; call model.eval(), or sparvar.unpatch(model) to train")
    batch, tokens, width = x.shape
    shared = record.shared
    shared.drop_drawn()
    begins = layer.cached_k is None
    if begins or record.bias is None:
        record.begin(layer)
    qkv = functional.linear(x, layer.mat_qkv.weight, record.bias).view(
        batch, tokens, 3, layer.num_heads, layer.head_dim
    )
    _require_inference(qkv)
    if not record.settled:
        record.settle(layer, qkv.dtype)
    token_axis = record.token_axis
    before = 0 if begins else int(layer.cached_k.shape[token_axis])
    schedule = None if scale_schedule is None else tuple(map(tuple, scale_schedule))
    tables = None
    if rope2d_freqs_grid is not None:
        tables = rope2d_freqs_grid, scale_schedule
        if begins and record.index == 0:
            shared.rope(tables, schedule, qkv, refresh=True)
    types = (qkv.shape, qkv.dtype, qkv.device)
    of = (schedule, scale_ind, *types, tables is None, shared.made_ropes, layer.scale, record.normalises)
    known = record.steps.get(before)
    step = known if known is not None and known.of == of else _step(of, layer, qkv, before, tables)
    end = before + tokens
    k_buffer, v_buffer = _buffers(layer, qkv, token_axis, step.capacity)
    if step is not known:
        step = record.steps[before] = step._replace(calls=_calls(step, layer, qkv, k_buffer, before))
    k, v = k_buffer.narrow(2, 0, end), v_buffer.narrow(2, 0, end)
    if step.calls is not None and _torch.dispatches_plainly(qkv):
        q = step.calls.split(qkv, k_buffer, v_buffer, record.head_scale, step.rope)
        del qkv
        out = step.calls.attend(q, k_buffer, v_buffer)
    else:
        small = (record.head_scale, step.rope, record.normalises)
        q = torch.ops.sparvar.split_qkv(qkv, k_buffer, v_buffer, *small, before)
        del qkv
        which = (record.index, step.scale_index, float(layer.scale))
        out = _torch.attention(q, k, v, step.plan, *which, record.state, 0)
        out = out.transpose(1, 2).reshape(batch, tokens, width)
    _put(layer, "cached_k", _shown(k, k_buffer, token_axis))
    _put(layer, "cached_v", _shown(v, v_buffer, token_axis))
    if step.ends:  # what it carried need not wait for the next picture
        record.state.reset()
        shared.drawn = layer, weakref.ref(layer.cached_k)
    return layer.proj_drop(layer.proj(out))  # type: ignore[no-any-return]


def _step(
    of: tuple[Any, ...],
    layer: Any,
    qkv: Tensor,
    before: int,
    tables: tuple[dict[str, Tensor], Any] | None,
) -> _Step:
    """Which scale `qkv`, (batch, tokens, 3, heads, channels), after `before` tokens is; without its calls."""
    record: _Layer = _record(layer)
    schedule, scale_ind = of[:2]
    tokens = qkv.shape[1]
    walk = record.shared.walk(schedule)
    scale_index = walk.scale_at.get((tokens, before))
    if scale_index is None:
        raise UsageError(
            f"patch: layer {record.index} got {tokens} tokens after {before}, which is no scale of the schedule "
            f"{_text(walk.plan.schedule)}"
        )
    rope = None
    if tables is not None:
        first = walk.begins[scale_ind]  # as upstream: of the scale that the call names
        rope = record.shared.rope(tables, schedule, qkv)[first : first + tokens]
    end = before + tokens
    return _Step(of, walk.plan, scale_index, walk.room(end), end == walk.tokens, rope, None)


def _calls(step: _Step, layer: Any, qkv: Tensor, cache: Tensor, before: int) -> _torch.LayerCalls | None:
    """Of a step whose keys and values lie in buffers like `cache`; None where operators are called instead."""
    record: _Layer = _record(layer)
    where = (record.index, step.scale_index)
    takes = _torch.LayerCalls.takes(step.plan, *where, qkv, before + qkv.shape[1])
    if not takes or not _torch.dispatches_plainly(qkv):
        return None
    small = (record.head_scale, step.rope, record.normalises)
    return _torch.LayerCalls(step.plan, (*where, float(layer.scale)), qkv, cache, small, before)


def _refuse(record: _Layer, layer: Any, attn_fn: Any) -> None:
    if not layer.caching:
        raise UsageError(
            f"patch: layer {record.index} runs without its KV cache, so it is not drawing scale by scale; call "
            "kv_caching(True), or sparvar.unpatch(model) for training and teacher forcing"
        )
    if attn_fn is not None:
        raise UsageError("patch: the model brings FlexAttention (attn_fn); make it with use_flex_attn=0")
    raise UsageError(
        f"patch: layer {record.index} got a mask (attn_bias), which plans cannot honour; unpatch the model to train"
    )


def _require_inference(qkv: Tensor) -> None:
    if qkv.requires_grad and torch.is_grad_enabled():
        raise UsageError("patch: the kernels have no gradients; draw within torch.no_grad() or torch.inference_mode()")
    if qkv.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            f"patch: self-attention runs in {str(qkv.dtype).removeprefix('torch.')}; the kernels are for float32 and "
            "bfloat16: torch.autocast(..., dtype=torch.bfloat16)"
        )


def _token_axis(layer: Any, dtype: torch.dtype) -> int:
    """Of `cached_k`: 1, (batch, tokens, heads, channels), where the layer calls flash-attn or xformers; else 2."""
    flash = bool(getattr(layer, "using_flash", False))
    if hasattr(layer, "using_xform"):  # VAR
        flash = layer.using_xform or (flash and dtype != torch.float32)
    return 1 if flash else 2


def _buffers(layer: Any, qkv: Tensor, token_axis: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Keys and values, (batch, heads, capacity, channels). They live as long as the layer's `cached_k` and `cached_v`
    do; where those are of another capacity, or somebody else has put them there (halved a batch, say), they are
    copied."""
    batch, _, _, heads, channels = qkv.shape
    made = []
    for name in ("cached_k", "cached_v"):
        cached = getattr(layer, name)
        buffer = getattr(cached, _BUFFER, None)
        shape = (batch, heads, capacity, channels)
        if buffer is None or buffer.shape != shape or buffer.dtype != qkv.dtype:
            buffer = qkv.new_empty(shape)
            if cached is not None:
                rows = cached.transpose(1, 2) if token_axis == 1 else cached
                if rows.shape[:2] != shape[:2] or rows.shape[3] != channels:
                    raise UsageError(
                        f"patch: x has a batch of {batch}, and {name} is {tuple(cached.shape)}: expected {batch} x "
                        f"{heads} heads of {channels} channels"
                    )
                buffer[:, :, : rows.shape[2]] = rows
        made.append(buffer)
    return made[0], made[1]


def _put(layer: Any, name: str, value: Tensor) -> None:
    """Assigns an attribute. Module's own assignment looks for parameters first and costs as much as a small kernel."""
    if name in layer.__dict__:
        layer.__dict__[name] = value
    else:
        setattr(layer, name, value)


def _shown(rows: Tensor, buffer: Tensor, token_axis: int) -> Tensor:
    """A part of a buffer as upstream's code expects `cached_k`."""
    shown = rows.transpose(1, 2) if token_axis == 1 else rows
    setattr(shown, _BUFFER, buffer)
    return shown
