"""Plots of an analysis (`sparvar.analyze`). Needs matplotlib: pip install "sparvar[plots]".

Each function draws into `ax` (a `matplotlib.axes.Axes`; without, one of a new figure) and returns it; save it with
`ax.figure.savefig("plot.png")`. layer: a layer's number or name; head: its number; without, the mean over all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UsageError
from .report import Floats, Report, nan_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["locality", "scale_pairs", "similarity", "sinks"]

_LOCAL_SCALES = 3


def scale_pairs(
    report: Report, layer: int | str | None = None, head: int | None = None, ax: Axes | None = None
) -> Axes:
    """Where the weight goes: a row for each scale of queries, a column for each scale of keys, rows sum to 1."""
    shares = _of(report, report.mass, layer, head)
    ax = _axes(ax, (0.6 * len(report.schedule) + 2, 0.5 * len(report.scales) + 1.5))
    _map(ax, shares, "share of a query's weight", 0, 1)
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            shade = "black" if share < 0.6 else "white"
            ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=shade)
    _scale_ticks(ax, report)
    ax.set_yticks(range(len(report.scales)), [str(k) for k in report.scales])
    ax.set_ylabel("scale of the queries")
    ax.set_title(f"attention by scale, %, {_whose(report, layer, head)}")
    return ax


def locality(
    report: Report,
    layer: int | str | None = None,
    head: int | None = None,
    scale: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Weight of one key against its distance to the query's place, for the keys of the own scale and the two before.

    scale: of the queries; without, the last that was looked at. Distances are in tokens of the key scale, the larger of
    both axes, rounded; 15 stands for all that are farther. Where nothing is local the lines are flat.
    """
    s = _scale_at(report, scale)
    k = report.scales[s]
    weight, keys = (_of(report, array, layer, head)[s] for array in (report.weight, report.keys))
    ax = _axes(ax, (6, 4))
    for j in range(max(0, k + 1 - _LOCAL_SCALES), k + 1):
        there = keys[j] > 0
        ax.plot(np.flatnonzero(there), weight[j][there] / keys[j][there], marker="o", label=f"keys of scale {j}")
    ax.set_yscale("log")
    ax.set_xlabel("distance, tokens")
    ax.set_ylabel("weight of one key")
    ax.legend()
    ax.set_title(f"locality at scale {k}, {_whose(report, layer, head)}")
    return ax


def sinks(report: Report, scale: int | None = None, ax: Axes | None = None) -> Axes:
    """Share of the weight on the first scales, a row for each layer and a column for each head.

    scale: of the queries; without, the mean over those that were looked at.
    """
    s = slice(None) if scale is None else slice(_scale_at(report, scale), _scale_at(report, scale) + 1)
    shares = report.sinks[:, s].mean(1)
    ax = _axes(ax, (0.5 * report.heads + 3, 0.35 * len(report.layers) + 1.5))
    _map(ax, shares, f"share on scales 0 to {report.sink_scales - 1}", 0, 1)
    ax.set_xticks(range(report.heads))
    ax.set_xlabel("head")
    _layer_ticks(ax, report)
    ax.set_title("sinks, " + ("mean over scales" if scale is None else f"scale {scale}"))
    return ax


def similarity(report: Report, scale: int | None = None, head: int | None = None, ax: Axes | None = None) -> Axes:
    """How alike a scale's map and the resized one of the scale before are: correlation, by layer and scale of keys.

    scale: of the queries; without, the last that was looked at. Where it is near 1, keys that one scale chose serve the
    next (CS4A).
    """
    s = _scale_at(report, scale)
    values = report.similarity[:, s]
    shown = nan_mean(values, 1) if head is None else values[:, _index("head", head, report.heads)]
    ax = _axes(ax, (0.6 * len(report.schedule) + 2, 0.35 * len(report.layers) + 1.5))
    _map(ax, shown, "correlation", -1, 1, "RdBu")
    _scale_ticks(ax, report)
    _layer_ticks(ax, report)
    of_heads = "mean over heads" if head is None else f"head {head}"
    ax.set_title(f"similarity of scale {report.scales[s]} to the one before, {of_heads}")
    return ax


def _of(report: Report, values: Floats, layer: int | str | None, head: int | None) -> Floats:
    """(scales, ...): of one layer and head, or means."""
    layers = values if layer is None else values[_layer_at(report, layer)][None]
    heads = layers if head is None else layers[:, :, _index("head", head, report.heads)][:, :, None]
    return nan_mean(heads, (0, 2))


def _whose(report: Report, layer: int | str | None, head: int | None) -> str:
    of_layer = "all layers" if layer is None else f"layer {report.layers[_layer_at(report, layer)]}"
    return of_layer if head is None else f"{of_layer}, head {head}"


def _layer_at(report: Report, layer: int | str) -> int:
    if isinstance(layer, str):
        if layer not in report.layers:
            raise UsageError(f"layer: the report has {', '.join(report.layers)}; found {layer!r}")
        return report.layers.index(layer)
    return _index("layer", layer, len(report.layers))


def _scale_at(report: Report, scale: int | None) -> int:
    if scale is None:
        return len(report.scales) - 1
    if scale not in report.scales:
        raise UsageError(f"scale: the report has {', '.join(map(str, report.scales))}; found {scale}")
    return report.scales.index(scale)


def _index(name: str, given: int, count: int) -> int:
    if not 0 <= given < count:
        raise UsageError(f"{name}: the report has 0 to {count - 1}; found {given}")
    return given


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError('plots need matplotlib: pip install "sparvar[plots]"') from error
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _map(ax: Axes, values: Floats, label: str, low: float, high: float, colours: str = "Greys") -> None:
    image = ax.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto")
    figure: Any = ax.figure
    figure.colorbar(image, ax=ax, label=label)


def _scale_ticks(ax: Axes, report: Report) -> None:
    grids = [f"{j}\n{h}x{w}" for j, (h, w) in enumerate(report.schedule)]
    ax.set_xticks(range(len(grids)), grids, fontsize=7)
    ax.set_xlabel("scale of the keys, its grid")


def _layer_ticks(ax: Axes, report: Report) -> None:
    ax.set_yticks(range(len(report.layers)), report.layers, fontsize=7)
    ax.set_ylabel("layer")
