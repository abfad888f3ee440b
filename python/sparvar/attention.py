"""The attention kernels, on numpy arrays and torch tensors, without copies.

    state = sparvar.AttentionState()
    out = sparvar.attention(q, k, v, plan=plan, layer=3, state=state)

q holds the tokens of one scale, (batch, heads, n_k, channels), row by row of its grid; k and v those of this scale and
all before it, (batch, heads, N_k, channels), in that order.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeAlias, cast, overload

import numpy as np
from numpy.typing import NDArray

from . import _engine
from .errors import UsageError
from .lists import KeyLists
from .plans import Plan

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = "NDArray[Any] | torch.Tensor"

Source: TypeAlias = "Plan | KeyLists"


class AttentionState:
    """What a `cs4a` plan carries from its decision scale to the scales above, by layer.

    One for every picture (or batch) that is drawn; `attention` fills it at the decision scale and reads it above. When
    guidance ends on the way, the batch may become smaller: its first entries are the ones that are left. Under
    `torch.compile` and in CUDA graphs the tensors in it are ordinary tensors of the program.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Any, Any]] = {}
        """layer -> chosen keys, int32 (batch * heads, groups, keys), and residual, (batch, n_S, heads, channels) or an
        empty array."""

    def reset(self) -> None:
        """Forgets everything: for the next picture."""
        self.layers.clear()

    def of(self, layer: int) -> tuple[Any, Any]:
        """What the layer carries."""
        if layer not in self.layers:
            raise UsageError(
                f"attention: layer {layer} carries keys, but its decision scale did not run with this state; scales "
                "must come in order"
            )
        return self.layers[layer]


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    plan: Source,
    layer: int = 0,
    scale_index: int | None = None,
    scale: float | None = None,
    state: AttentionState | None = None,
    out: None = None,
    threads: int = 0,
) -> torch.Tensor: ...


@overload
def attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    plan: Source,
    layer: int = 0,
    scale_index: int | None = None,
    scale: float | None = None,
    state: AttentionState | None = None,
    out: NDArray[Any] | None = None,
    threads: int = 0,
) -> NDArray[Any]: ...


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    plan: Source,
    layer: int = 0,
    scale_index: int | None = None,
    scale: float | None = None,
    state: AttentionState | None = None,
    out: NDArray[Any] | None = None,
    threads: int = 0,
) -> Any:
    """softmax(scale * q k^T) v, each query over the keys that the plan shows it.

    q: (batch, heads, n_k, channels) of one scale; k, v: (batch, heads, N_k, channels) of this scale and all before it.
    float32 or bfloat16 (numpy: of `ml_dtypes`), up to 256 channels, channels next to each other. Returns (batch, heads,
    n_k, channels) of the same type, which lies in memory as [batch, n_k, heads, channels].

    plan: a `Plan` with a schedule, or `KeyLists`. layer: which of the plan's rules holds. scale_index: which scale q is
    of; without, the one that has so many tokens. scale: of the logits; without, 1 / sqrt(channels). state: needed by
    cs4a, see `AttentionState`. out: where to write (numpy). threads: of the CPU, for dense, csla and lists; 0: all.

    On the CPU dense, csla and lists take any strides; cs4a, probe and GPUs take packed q, and k and v as
    the first rows of packed caches (batch, heads, capacity, channels). On a GPU work is enqueued on PyTorch's current
    stream, and dense scales are PyTorch's own `scaled_dot_product_attention`, but for large ones of such tensors in
    bfloat16 on Hopper, outside of `torch.compile`. No gradients.
    """
    torch_: Any = sys.modules.get("torch")
    is_torch = torch_ is not None and isinstance(q, torch_.Tensor)
    kind = torch_.Tensor if is_torch else np.ndarray
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not isinstance(array, kind):
            raise UsageError(
                f"attention: {name} is {type(array).__name__}; expected numpy arrays or torch tensors, all of one kind"
            )
        if array.ndim != 4:
            raise UsageError(
                f"attention: {name}: expected 4 dimensions (batch, heads, tokens, channels), found {array.ndim}"
            )
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
    if scale == 0 or not math.isfinite(scale):
        raise UsageError(f"attention: a scale of the logits of {scale}; it must be a finite number other than 0")
    if isinstance(plan, KeyLists):
        scale_index = 0
    elif not isinstance(plan, Plan):
        raise UsageError(f"attention: plan: expected a plan or lists of keys, found {type(plan).__name__}")
    elif scale_index is None:
        scale_index = plan.scale_of(int(q.shape[2]), int(k.shape[2]))
    if is_torch:
        if out is not None:
            raise UsageError("attention: out is of numpy arrays; of torch tensors take what is returned")
        from . import _torch

        tensors = cast("tuple[torch.Tensor, torch.Tensor, torch.Tensor]", (q, k, v))
        return _torch.attention(*tensors, plan, layer, scale_index, scale, state, threads)
    arrays = cast("tuple[NDArray[Any], NDArray[Any], NDArray[Any]]", (q, k, v))
    return _numpy_attention(*arrays, plan, layer, scale_index, scale, state, out, threads)


def _numpy_attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    plan: Source,
    layer: int,
    scale_index: int,
    scale: float,
    state: AttentionState | None,
    out: NDArray[Any] | None,
    threads: int,
) -> NDArray[Any]:
    words = q.dtype.name == "bfloat16"
    for name, other in (("k", k), ("v", v), ("out", q if out is None else out)):
        if other.dtype != q.dtype:
            raise UsageError(f"attention: q is {q.dtype} and {name} is {other.dtype}: they must be of one type")
    if out is None:
        batch, heads, queries, channels = q.shape
        out = np.empty((batch, queries, heads, channels), q.dtype).transpose(0, 2, 1, 3)
    # numpy hands bfloat16 to nobody: the same memory as 16-bit words
    arrays = [array.view(np.uint16) if words else array for array in (q, k, v, out)]
    step = step_of(plan, layer, scale_index, state)
    if step == "lists":
        run_lists(arrays, plan, layer, scale_index, scale, words, threads)
        return out
    kernel = plan_kernel(cast("Plan", plan), "cpu", words)
    choice = residual = None
    if step == "choose":
        choice, residual = (
            np.zeros(shape, dtype)
            for shape, dtype in zip(
                carried_shapes(kernel, layer, scale_index, q.shape), (np.int32, np.float32), strict=True
            )
        )
    elif step == "follow":
        choice, residual = cast("AttentionState", state).of(layer)
    kernel.run(_engine.Call(layer, scale_index, scale), *arrays, words, choice, residual)
    if step == "choose":
        cast("AttentionState", state).layers[layer] = (choice, residual)
    return out


def step_of(plan: Source, layer: int, scale_index: int, state: AttentionState | None) -> str:
    """lists: known beforehand; probe; choose: cs4a at its decision scale; follow: above it."""
    if isinstance(plan, KeyLists):
        return "lists"
    plan.require_kernels()
    index = plan.rule_index(layer, scale_index)
    if index < 0 or plan.rules[index].method in ("dense", "csla"):
        return "lists"
    if plan.rules[index].method == "probe":
        return "probe"
    decision = plan.rules[index].decision_scale
    if state is None:
        raise UsageError(
            f"attention: plan {plan.name} at layer {layer}, scale {scale_index} (cs4a) chooses keys that later scales "
            "read: pass state=sparvar.AttentionState(), one for every picture"
        )
    return "choose" if scale_index == decision else "follow"


def carried_shapes(
    kernel: _engine.PlanKernel, layer: int, scale_index: int, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of what is chosen, and of the residual: (0,) where there is none."""
    batch, heads, _, channels = shape
    choice, residual = kernel.carried_shapes(layer, scale_index, batch, heads, channels)
    return choice, (0,) if residual is None else residual


class _Recent:
    """The objects of the last keys."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.lock = threading.Lock()
        self.known: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Any) -> Any:
        with self.lock:
            found = self.known.get(key)
            if found is not None:
                self.known.move_to_end(key)
                return found
        made = make()
        with self.lock:
            self.known[key] = made
            while len(self.known) > self.most:
                self.known.popitem(last=False)
        return made


_list_kernels = _Recent(64)
_plan_kernels = _Recent(16)


def run_lists(
    arrays: list[Any], plan: Source, layer: int, scale_index: int, scale: float, words: bool, threads: int
) -> None:
    """q, k, v, out on the CPU by lists that are known beforehand."""
    lists = plan if isinstance(plan, KeyLists) else plan.lists(layer, scale_index)
    batch, heads, _, channels = arrays[0].shape
    bf16 = words or str(arrays[0].dtype) == "torch.bfloat16"
    key = (lists.key, batch, heads, channels, bf16, scale, threads)
    kernel = _list_kernels.get(
        key, lambda: _engine.ListKernel(lists.handle, batch, heads, channels, bf16, scale, threads)
    )
    kernel.run(*arrays, words)


def plan_kernel(plan: Plan, device: str, bf16: bool) -> Any:
    """The plan on a device."""
    if plan.schedule is None:
        raise UsageError(f"plan {plan.name} has no schedule; say which with plan.bind(schedule)")
    schedule = list(plan.schedule)
    return _plan_kernels.get((plan.key, device, bf16), lambda: _engine.PlanKernel(plan.handle, schedule, device, bf16))
