"""What a model's attention looks like: sinks, locality, similarity across scales, by layer and head.

    with sparvar.analysis.capture(model) as maps:          # any PyTorch model that walks over scales
        model(...)
    report = sparvar.analyze(maps, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    sparvar.plots.scale_pairs(report)

The figures are those of `sparvar analyze` (docs/quality-tools.md), counted by the same code; they say which plan suits
a model: weight on the first scales asks for sinks, weight near the query for windows (CSLA), and maps that a scale
shares with the one before for keys that are carried up (CS4A): the three properties that SparVAR stands on.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _engine
from .errors import UsageError
from .plans import Grid, Schedule, grids
from .report import Report, report_of

if TYPE_CHECKING:
    from .attention import Array

__all__ = ["Captures", "Report", "analyze", "capture"]

_USUAL_SCALES = 3  # the last ones, where presets are sparse
_SUM_TOLERANCE = 0.02  # of a row of probabilities: bfloat16 keeps 8 bits


@dataclass
class _Call:
    """One attention call, one batch entry, on the host: arrays of numpy or PyTorch."""

    queries: int
    keys: int
    heads: int
    q: Any = None  # (heads, queries, channels)
    k: tuple[Any, ...] = ()  # parts (key heads, tokens, channels), one after the other
    scale: float = 1.0
    mask: Any = None  # (heads or 1, queries or 1, keys): bool, or added to the logits
    probabilities: Any = None  # (heads, queries, keys)


class Captures:
    """Attention calls by layer, in the order in which they came. Filled by `capture`, or by hand with `add`.

    Of a batch one entry is kept (`batch_entry`; in most models the first is the conditional half of the first picture).
    Keys that a call shares with the layer's call before (a KV cache) are kept once.
    """

    def __init__(self, batch_entry: int = 0) -> None:
        self.batch_entry = batch_entry
        self._calls: dict[str, list[_Call]] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """The names, in the order in which the layers first came."""
        return tuple(self._calls)

    def __len__(self) -> int:
        """How many calls."""
        return sum(len(calls) for calls in self._calls.values())

    def __repr__(self) -> str:
        return f"<sparvar captures: {len(self)} attention calls of {len(self._calls)} layers>"

    def add(self, layer: str, q: Array, k: Array, *, scale: float | None = None, mask: Array | None = None) -> None:
        """One call: softmax(scale * q k^T + mask).

        q: (batch, heads, queries, channels), numpy or torch, any float type. k: (batch, heads, keys, channels); its
        heads may be fewer, each for as many heads of q. The order of tokens: scale by scale, row by row of the grid.
        scale: of the logits; without, 1 / sqrt(channels). mask: broadcast to (batch, heads, queries, keys); True where
        a query reads a key, or numbers that are added. Raises UsageError where shapes do not fit.
        """
        for name, array in (("q", q), ("k", k)):
            _require_4d(layer, name, array)
        heads, queries, channels = (int(size) for size in q.shape[1:])
        if k.shape[0] != q.shape[0] or k.shape[3] != channels or k.shape[1] == 0 or heads % k.shape[1]:
            raise UsageError(
                f"analyze: layer {layer}: q {tuple(q.shape)} and k {tuple(k.shape)} do not belong together; expected "
                "(batch, heads, tokens, channels) of one batch and one number of channels, as many heads or a divisor"
            )
        call = _Call(queries, int(k.shape[2]), heads, scale=1 / math.sqrt(channels) if scale is None else float(scale))
        call.q = self._entry(layer, q)
        call.k = self._shared(layer, self._entry(layer, k))
        if mask is not None:
            call.mask = self._mask(layer, mask, call)
        self._calls.setdefault(layer, []).append(call)

    def add_probabilities(self, layer: str, probabilities: Array) -> None:
        """One call of which the probabilities are known: (batch, heads, queries, keys), rows that sum to 1."""
        _require_4d(layer, "probabilities", probabilities)
        heads, queries, keys = (int(size) for size in probabilities.shape[1:])
        call = _Call(queries, keys, heads, probabilities=self._entry(layer, probabilities))
        self._calls.setdefault(layer, []).append(call)

    def _entry(self, layer: str, array: Any) -> Any:
        """The batch entry, copied to the host."""
        if not 0 <= self.batch_entry < array.shape[0]:
            raise UsageError(f"analyze: layer {layer}: batch entry {self.batch_entry} of a batch of {array.shape[0]}")
        one = array[self.batch_entry]
        return one.copy() if isinstance(one, np.ndarray) else one.detach().to("cpu", copy=True)

    def _shared(self, layer: str, k: Any) -> tuple[Any, ...]:
        """k as parts, those of the call before where it begins with them."""
        before = self._calls[layer][-1].k if layer in self._calls else ()
        first = 0
        for part in before:
            piece = k[:, first : first + part.shape[1]]
            if piece.shape != part.shape or type(piece) is not type(part) or not bool((piece == part).all()):
                return (k,)
            first += part.shape[1]
        rest = k[:, first:]
        if not before or rest.shape[1] == 0:
            return before or (k,)
        return (*before, rest.copy() if isinstance(rest, np.ndarray) else rest.clone())

    def _mask(self, layer: str, mask: Any, call: _Call) -> Any:
        shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        wanted = (None, call.heads, call.queries, call.keys)
        if len(shape) != 4 or any(w is not None and s not in (1, w) for s, w in zip(shape, wanted, strict=True)):
            raise UsageError(
                f"analyze: layer {layer}: mask {tuple(mask.shape)} does not fit (batch, {call.heads}, {call.queries}, "
                f"{call.keys})"
            )
        whole = mask.reshape(shape)
        one = whole[self.batch_entry if shape[0] > 1 else 0]
        return np.array(one) if isinstance(one, np.ndarray) else one.detach().to("cpu", copy=True)


@contextlib.contextmanager
def capture(model: Any, *, modules: str | Sequence[str] = "*", batch_entry: int = 0) -> Iterator[Captures]:
    """Records the attention calls that a PyTorch model makes inside the `with`.

    model: a `torch.nn.Module`; run it, or a method of it that calls its modules. Seen are
    `scaled_dot_product_attention`, however it was imported, and softmax over the last of 4 dimensions (attention
    written out: its whole maps are kept, which is much for large grids), in modules whose name fits `modules` (patterns
    such as "blocks.*.attn"). Each layer is named after the module that made the call ("name#2": its second call in one
    run). Memory: queries and keys of one batch entry, of all layers, on the host, in the model's type.

    Not seen: kernels of other packages (flash_attn, xformers, FlexAttention), `nn.MultiheadAttention`, and what
    `torch.compile` made; switch the model to PyTorch's attention without compiling. Needs PyTorch.
    """
    try:
        from . import _capture
    except ImportError as error:
        raise UsageError('capture needs PyTorch: pip install "sparvar[torch]"') from error
    captures = Captures(batch_entry)
    with _capture.watching(model, [modules] if isinstance(modules, str) else list(modules), captures):
        yield captures


def analyze(
    captures: Captures,
    schedule: Schedule,
    *,
    scales: Sequence[int] | None = None,
    side: int = 16,
    windows: Sequence[int] | None = None,
    sink_scales: int = 5,
) -> Report:
    """Sinks, locality and similarity across scales of captured attention: the figures of `sparvar analyze`.

    captures: of `capture`, or filled by hand. schedule: the model's grids, smallest first: (height, width) in tokens,
    or one number for a square. A call belongs to scale k if it has n_k queries and the keys of scales 0 to k; or it
    holds all tokens at once (training), each scale reading itself and those before. Layers none of whose calls fit
    (attention to text) are left out and named in the report.

    scales: which are looked at, counted from 0; without, the last three. side: at most side x side queries of a scale,
    evenly spread. windows: side in tokens by key scale (-1: none) of the windows whose weight is counted; without,
    CSLA's published ones. sink_scales: how many first scales count as sinks.

    Raises UsageError where nothing was captured, the schedule does not fit, shapes differ, or numbers are not finite.
    """
    if not isinstance(captures, Captures):
        raise UsageError(f"analyze: expected what sparvar.analysis.capture gave, found {type(captures).__name__}")
    if len(captures) == 0:
        raise UsageError(
            "analyze: nothing was captured: no module called scaled_dot_product_attention or a softmax of 4 dimensions "
            "inside the with; run the model there, uncompiled, with PyTorch's own attention"
        )
    count = counter(schedule, scales, side, windows, sink_scales)
    fitting, left_out = _fitting(captures, count.schedule)
    for index, (name, calls) in enumerate(fitting.items()):
        _count(count, index, name, calls)
    return count.report(tuple(fitting), left_out)


@dataclass(frozen=True)
class Counter:
    """The engine's analyzer and what it was told."""

    analyzer: _engine.Analyzer
    schedule: tuple[Grid, ...]
    scales: tuple[int, ...]
    side: int
    windows: list[int]
    sink_scales: int

    def report(self, layers: tuple[str, ...], left_out: tuple[str, ...] = ()) -> Report:
        results = self.analyzer.results()
        return report_of(results, layers, self.schedule, self.side, self.sink_scales, self.windows, left_out)


def counter(
    schedule: Schedule,
    scales: Sequence[int] | None,
    side: int,
    windows: Sequence[int] | None = None,
    sink_scales: int = 5,
) -> Counter:
    """Settings checked, defaults filled in."""
    steps = grids(schedule)
    count = len(steps)
    chosen = range(max(0, count - _USUAL_SCALES), count) if scales is None else sorted({int(scale) for scale in scales})
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise UsageError(f"scales: expected some of 0 to {count - 1}, found {list(scales or [])}")
    if not 1 <= side <= 64:
        raise UsageError(f"side: expected 1 to 64, found {side}")
    if sink_scales < 0:
        raise UsageError(f"sink_scales: expected 0 or more, found {sink_scales}")
    sides = list(_engine.published_windows(count)) if windows is None else [int(window) for window in windows]
    if len(sides) != count:
        raise UsageError(f"windows: expected one for each of {count} scales, found {len(sides)}")
    analyzer = _engine.Analyzer(list(steps), list(chosen), side, sides, sink_scales)
    return Counter(analyzer, steps, tuple(chosen), side, sides, sink_scales)


_Step = tuple[int, _Call, int, int]
"""Scale, the call that holds its queries, the first of them there, and how many keys they read."""


def _fitting(captures: Captures, steps: tuple[Grid, ...]) -> tuple[dict[str, list[_Step]], tuple[str, ...]]:
    """The calls of each layer by scale, and the layers that are left out."""
    fitting: dict[str, list[_Step]] = {}
    left_out: list[str] = []
    complaint = ""
    for name, calls in captures._calls.items():
        found = [_steps_of(call, steps) for call in calls]
        misfits = [call for call, step in zip(calls, found, strict=True) if not step]
        if misfits:
            complaint = complaint or (
                f"analyze: layer {name}: a call of {misfits[0].queries} queries and {misfits[0].keys} keys is none of "
                f"the schedule's: {_expected(steps)}; is it another schedule, or are there more tokens before scale 0?"
            )
            if len(misfits) < len(calls):
                raise UsageError(complaint)
            left_out.append(name)
        else:
            fitting[name] = [step for all_of in found for step in all_of]
    if not fitting:
        raise UsageError(complaint)
    heads = {name: steps_of[0][1].heads for name, steps_of in fitting.items()}
    for name, steps_of in fitting.items():
        first = next(iter(heads))
        if any(call.heads != heads[first] for _, call, _, _ in steps_of):
            raise UsageError(
                f"analyze: layer {name} has {steps_of[0][1].heads} heads and layer {first} {heads[first]}: choose "
                "layers of one number of heads with capture(modules=...)"
            )
    return fitting, tuple(left_out)


def _steps_of(call: _Call, steps: tuple[Grid, ...]) -> list[_Step]:
    """What the call holds: one scale, or all up to one; nothing where it does not fit."""
    first, found = 0, []
    for scale, (h, w) in enumerate(steps):
        keys = first + h * w
        if (call.queries, call.keys) == (h * w, keys):
            return [(scale, call, 0, keys)]
        found.append((scale, call, first, keys))
        if call.queries == call.keys == keys:
            return found
        first = keys
    return []


def _expected(steps: tuple[Grid, ...]) -> str:
    tokens = [h * w for h, w in steps]
    pairs = [f"{n} and {sum(tokens[: k + 1])}" for k, n in enumerate(tokens)]
    return ", ".join(pairs if len(pairs) <= 4 else [*pairs[:2], "...", pairs[-1]])


def _count(count: Counter, layer: int, name: str, steps: list[_Step]) -> None:
    last: dict[int, _Step] = {}
    for step in steps:
        scale = step[0]
        last[scale] = step
        if scale not in count.scales:
            continue
        rows = _probabilities(name, step, count.analyzer.queries(scale))
        before = last.get(scale - 1)
        under = None if before is None else _probabilities(name, before, count.analyzer.parents(scale))
        count.analyzer.count(layer, scale, rows, under)
    for scale in count.scales:
        if scale not in last:
            raise UsageError(
                f"analyze: layer {name}: no call of scale {scale} was captured, only of {sorted(last)}; choose others "
                "with scales=[...]"
            )


def _probabilities(name: str, step: _Step, tokens: list[int]) -> NDArray[np.float32]:
    """Of the queries `tokens` of the step's scale: float32 (heads, queries, keys)."""
    scale, call, first, keys = step
    at = np.asarray(tokens) + first
    if call.probabilities is not None:
        rows = _numbers(call.probabilities[:, at])[:, :, :keys]
        if not np.isfinite(rows).all() or (rows < 0).any() or (abs(rows.sum(-1) - 1) > _SUM_TOLERANCE).any():
            raise UsageError(
                f"analyze: layer {name}, scale {scale}: the rows are no probabilities: some are negative, NaN, "
                f"or do not sum to 1 over the {keys} keys of scales 0 to {scale}"
            )
        return np.ascontiguousarray(rows)
    q = _numbers(call.q[:, at])
    k = np.concatenate([_numbers(part) for part in call.k], axis=1)[:, :keys]
    k = np.repeat(k, call.heads // k.shape[0], axis=0)
    logits = np.float32(call.scale) * (q @ k.swapaxes(1, 2))
    if not np.isfinite(logits).all():
        raise UsageError(
            f"analyze: layer {name}, scale {scale}: NaN or infinity in q k^T; look at the model's q and k there"
        )
    if call.mask is not None:
        rows_of = call.mask[:, at] if call.mask.shape[1] > 1 else call.mask
        mask = _numbers(rows_of)[:, :, :keys]
        logits = np.where(mask > 0, logits, -np.inf) if "bool" in str(call.mask.dtype) else logits + mask
        if not (logits.max(-1) > -np.inf).all():
            raise UsageError(
                f"analyze: layer {name}, scale {scale}: the mask hides every key from a query, or holds NaN"
            )
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.ascontiguousarray(weights / weights.sum(-1, keepdims=True, dtype=np.float64), dtype=np.float32)


def _numbers(array: Any) -> NDArray[np.float32]:
    """float32 of numpy or PyTorch."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float32)
    made: NDArray[np.float32] = array.float().numpy()
    return made


def _require_4d(layer: str, name: str, array: Any) -> None:
    torch: Any = sys.modules.get("torch")
    if not isinstance(array, np.ndarray) and not (torch is not None and isinstance(array, torch.Tensor)):
        raise UsageError(f"analyze: layer {layer}: {name} is {type(array).__name__}; expected numpy or torch")
    if array.ndim != 4:
        raise UsageError(
            f"analyze: layer {layer}: {name}: expected 4 dimensions (batch, heads, tokens, ...), found "
            f"{tuple(array.shape)}"
        )
