"""The figures of an analysis, by layer, scale and head."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _engine

Floats = NDArray[np.float64]

_LOCAL_SCALES = 3  # key scales whose distances are in the JSON: the own one and those before


@dataclass(frozen=True)
class Report:
    """What attention looks like. Arrays are by layer, scale (of `scales`), head, then by key scale, where key scales
    after the scale itself are NaN. Shares are of one query's weight, means over the queries that were looked at.
    """

    schedule: tuple[tuple[int, int], ...]
    layers: tuple[str, ...]  # names
    scales: tuple[int, ...]  # those that were looked at
    side: int  # at most side x side queries of a scale
    sink_scales: int
    window_sides: tuple[int, ...]  # by key scale, in tokens; -1: none
    left_out: tuple[str, ...]  # layers whose calls are not of the schedule
    queries: NDArray[np.int64]  # (layers, scales)
    sinks: Floats  # (layers, scales, heads): share on the first `sink_scales` scales
    windows: Floats  # (layers, scales, heads): share inside the windows on the other scales
    mass: Floats  # (layers, scales, heads, key scales): share on each scale
    distance: Floats  # (layers, scales, heads, key scales): mean from the query's place, in tokens of the key scale
    similarity: Floats  # (layers, scales, heads, key scales): correlation of A(k, i) with A(k-1, i-1) resized
    similarity_mean: Floats  # (layers, scales, heads): over the key scales that have one
    weight: Floats  # (layers, scales, heads, key scales, 16): share at each rounded distance; the last: 15 and farther
    keys: Floats  # the same shape: how many keys lie there

    @property
    def heads(self) -> int:
        """How many."""
        return int(self.sinks.shape[2])

    @property
    def own_scale(self) -> Floats:
        """(layers, scales, heads): share on the scale itself."""
        return np.stack([self.mass[:, s, :, k] for s, k in enumerate(self.scales)], axis=1)

    @property
    def own_distance(self) -> Floats:
        """(layers, scales, heads): mean distance of the weight on the scale itself, in tokens."""
        return np.stack([self.distance[:, s, :, k] for s, k in enumerate(self.scales)], axis=1)

    def to_json(self) -> str:
        """The report in the form of `sparvar analyze --json`, rounded to six decimals; null where there is no value."""
        rows = self._rows()
        layers = [
            {"layer": i} | _rounded({n: row[i].mean() for n, row in rows.items()}) for i in range(len(self.layers))
        ]
        results = [self._result(rows, i, s) for i in range(len(self.layers)) for s in range(len(self.scales))]
        return json.dumps(
            {
                "schedule": self.schedule,
                "layer_names": self.layers,
                "left_out": self.left_out,
                "scales": self.scales,
                "queries_along_a_side": self.side,
                "sink_scales": self.sink_scales,
                "windows_by_key_scale": self.window_sides,
                "layers": layers,
                "results": results,
            },
            indent=2,
        )

    def _rows(self) -> dict[str, Floats]:
        """Means over heads: (layers, scales)."""
        return {
            "sinks": self.sinks.mean(-1),
            "windows": self.windows.mean(-1),
            "own_scale": self.own_scale.mean(-1),
            "own_distance": self.own_distance.mean(-1),
            "similarity": self.similarity_mean.mean(-1),
        }

    def _result(self, rows: dict[str, Floats], i: int, s: int) -> dict[str, Any]:
        k = self.scales[s]
        mean = {name: row[i, s] for name, row in rows.items()}
        mean["similarity_by_key_scale"] = nan_mean(self.similarity[i, s, :, : k + 1], 0)
        heads = [self._head(i, s, head, k) for head in range(self.heads)]
        return {"layer": i, "scale": k, "queries": int(self.queries[i, s]), "mean": _rounded(mean), "heads": heads}

    def _head(self, i: int, s: int, head: int, k: int) -> dict[str, Any]:
        at = (i, s, head)
        mean, weight, keys = self.distance[at], self.weight[at], self.keys[at]
        distances = [
            {"key_scale": j} | _rounded({"mean": mean[j], "weight": weight[j], "keys": keys[j]})
            for j in range(max(0, k + 1 - _LOCAL_SCALES), k + 1)
        ]
        figures = {
            "sinks": self.sinks[at],
            "windows": self.windows[at],
            "similarity_mean": self.similarity_mean[at],
            "mass_by_key_scale": self.mass[at][: k + 1],
            "similarity_by_key_scale": self.similarity[at][: k + 1],
        }
        return _rounded(figures) | {"distances": distances}


def nan_mean(values: Floats, axis: int | tuple[int, ...]) -> Floats:
    """Mean over the values that are there; NaN, without a warning, where none is."""
    there = np.isfinite(values)
    count = there.sum(axis)
    total = np.where(there, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Six decimals are more than a sample knows."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.ndim:
            return [plain(one) for one in value]
        return round(float(value), 6) if math.isfinite(value) else None

    return {name: plain(value) for name, value in figures.items()}


def report_of(
    results: list[dict[str, Any]],
    layers: tuple[str, ...],
    schedule: tuple[tuple[int, int], ...],
    side: int,
    sink_scales: int,
    window_sides: list[int],
    left_out: tuple[str, ...] = (),
) -> Report:
    """Of what `_engine.Analyzer.results` tells: every layer at the same scales, in order."""
    scales = tuple(sorted({int(one["scale"]) for one in results}))
    heads = len(results[0]["sinks"])
    shape = (len(layers), len(scales), heads)
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(("sinks", "windows", "similarity_mean"), shape)
    sizes |= dict.fromkeys(("mass", "distance", "similarity"), (*shape, len(schedule)))
    sizes |= dict.fromkeys(("weight", "keys"), (*shape, len(schedule), _engine.distance_bins))
    arrays = {name: np.full(size, np.nan) for name, size in sizes.items()}
    queries = np.zeros(shape[:2], np.int64)
    for one in results:
        at = (one["layer"], scales.index(one["scale"]))
        queries[at] = one["queries"]
        for name, array in arrays.items():
            values = np.asarray(one[name], np.float64)
            array[at][tuple(slice(0, size) for size in values.shape)] = values
    return Report(
        schedule=schedule,
        layers=layers,
        scales=scales,
        side=side,
        sink_scales=sink_scales,
        window_sides=tuple(window_sides),
        left_out=left_out,
        queries=queries,
        **arrays,
    )
