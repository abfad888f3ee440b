"""Attention plans: which keys each group of queries reads, by layer and scale.

A plan is data: rules in order, of which the first that fits a (layer, scale) holds; where none fits attention is dense.
`docs/attention-plans.md` describes the methods and all parameters.

    plan = sparvar.plans.csla(sparvar.schedule())               # exact windows on the last three scales
    plan = sparvar.plans.cs4a(grids, decision_scale=10, share=0.1)
    plan = sparvar.plans.preset("sparvar", grids)
    plan = sparvar.plans.from_json("mine.json", grids)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from . import _engine
from .errors import UsageError
from .lists import KeyLists

Grid = tuple[int, int]
Schedule: TypeAlias = Sequence[int | Grid]
"""Grids of the scales, smallest first: (height, width) in tokens, or one number for a square."""

_ALL_LAYERS = (0, -1)
_FIRST_SPARSE = 8  # below, sparsity costs more than it saves


def schedule(aspect: str = "1:1", size: str = "1M") -> tuple[Grid, ...]:
    """Infinity's grids of a ratio and a size, as ((h, w), ...).

    `aspect` is width:height: 1:1, 4:5, 3:4, 2:3, 4:7 (16:9 is 7:4), 1:2, 2:5, 1:3 or the other way round; `size` 0.06M,
    0.25M, 0.60M or 1M: the first 7, 10, 12 or 13 scales.
    """
    return tuple(_engine.table_schedule(aspect, size))


def grids(given: Schedule) -> tuple[Grid, ...]:
    """A schedule with every grid as (h, w): [1, 2, (3, 4)] -> ((1, 1), (2, 2), (3, 4))."""
    out: list[Grid] = []
    for grid in given:
        if isinstance(grid, (tuple, list)) and len(grid) == 2:
            out.append((int(grid[0]), int(grid[1])))
        elif isinstance(grid, int):
            out.append((grid, grid))
        else:
            raise UsageError(f"schedule: expected (height, width) or one number for a square, found {grid!r}")
    if not out or any(side < 1 for grid in out for side in grid):
        raise UsageError("schedule: expected grids of at least 1 token a side, smallest first")
    return tuple(out)


@dataclass(frozen=True)
class Rule:
    """Layers and scales (both ends included, -1: to the end) that use a method."""

    layers: tuple[int, int]
    scales: tuple[int, int]
    method: str
    decision_scale: int | None = None

    def fits(self, layer: int, scale_index: int) -> bool:
        return (
            self.layers[0] <= layer
            and (self.layers[1] < 0 or layer <= self.layers[1])
            and self.scales[0] <= scale_index
            and (self.scales[1] < 0 or scale_index <= self.scales[1])
        )


class Plan:
    """Rules, and the schedule whose scales they speak of (None: as yet of no schedule in particular).

    Made by the functions of this module. Two plans are equal if rules, names and schedules are.
    """

    name: str
    schedule: tuple[Grid, ...] | None
    rules: tuple[Rule, ...]
    prunes: bool  # does it leave out tokens? Such plans are for Pipeline alone
    key: str  # the whole of it, as text

    def __init__(self, handle: _engine.AttentionPlan, schedule: Schedule | None = None) -> None:
        self.handle = handle
        self.name = handle.name
        self.schedule = None if schedule is None else grids(schedule)
        text = json.loads(handle.to_json())
        self.rules = tuple(
            Rule(tuple(rule["layers"]), tuple(rule["scales"]), rule["method"], rule.get("decision_scale"))
            for rule in text["rules"]
        )
        self.prunes = handle.prunes
        self.key = json.dumps({"plan": text, "schedule": self.schedule}, separators=(",", ":"))
        self._lists: dict[tuple[int, int], KeyLists] = {}

    def __repr__(self) -> str:
        scales = "no schedule" if self.schedule is None else f"{len(self.schedule)} scales"
        return f"<sparvar plan {self.name}: {len(self.rules)} rules, {scales}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.key,)

    @property
    def is_static(self) -> bool:
        """Does all of it depend on the schedule alone (dense and csla)?"""
        return self.handle.is_static

    def bind(self, schedule: Schedule) -> Plan:
        """The same rules for a schedule."""
        return Plan(self.handle, schedule)

    def to_json(self) -> str:
        """The rules as JSON, as `sparvar generate --plan` reads it."""
        return self.handle.to_json()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json()` to a file, aside first: the file is whole or what it was."""
        aside = f"{os.fspath(path)}.{os.getpid()}.part"
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(self.to_json() + "\n")
            os.replace(aside, path)
        except BaseException:
            if os.path.exists(aside):
                os.unlink(aside)
            raise

    def rule_index(self, layer: int, scale_index: int) -> int:
        """Which rule holds at a layer and scale; -1: none, dense."""
        for index, rule in enumerate(self.rules):
            if rule.fits(layer, scale_index):
                return index
        return -1

    def method(self, layer: int, scale_index: int) -> str:
        """dense, csla, cs4a or probe."""
        index = self.rule_index(layer, scale_index)
        return "dense" if index < 0 else self.rules[index].method

    def scale_of(self, queries: int, keys: int) -> int:
        """The scale that has so many tokens, and so many together with all scales before it."""
        so_far = 0
        for index, (h, w) in enumerate(self._schedule()):
            so_far += h * w
            if so_far == keys and h * w == queries:
                return index
        raise UsageError(
            f"attention: no scale of the plan's schedule has {queries} queries and {keys} keys; q is of one scale, k "
            "and v of it and all before it"
        )

    def lists(self, layer: int, scale_index: int) -> KeyLists:
        """The keys of every tile of queries, where they are known beforehand (dense and csla)."""
        self.require_kernels()
        known = (self.rule_index(layer, scale_index), scale_index)
        if known not in self._lists:
            made = _engine.Lists.of_plan(self.handle, list(self._schedule()), layer, scale_index)
            self._lists[known] = KeyLists(made)
        return self._lists[known]

    def require_kernels(self) -> None:
        """Raises where attention alone cannot follow the plan."""
        if self.prunes:
            raise UsageError(
                f"attention: plan {self.name} prunes tokens: which ones run depends on the picture; it is for "
                "sparvar.Pipeline alone"
            )

    def _schedule(self) -> tuple[Grid, ...]:
        if self.schedule is None:
            raise UsageError(f"plan {self.name} has no schedule; say which with plan.bind(schedule)")
        return self.schedule


def _unpickled(key: str) -> Plan:
    text = json.loads(key)
    return from_json(text["plan"], text["schedule"])


def from_json(source: str | os.PathLike[str] | Mapping[str, Any], schedule: Schedule | None = None) -> Plan:
    """A plan from a JSON file (a path), from JSON text (it begins with a brace) or from a dict of the same form."""
    if isinstance(source, Mapping):
        return Plan(_engine.AttentionPlan.from_json(json.dumps(dict(source)), "the plan"), schedule)
    text = os.fspath(source)
    if text.lstrip().startswith("{"):
        return Plan(_engine.AttentionPlan.from_json(text, "the plan"), schedule)
    return Plan(_engine.AttentionPlan.from_file(text), schedule)


def preset_names() -> list[str]:
    """dense, csla, csla-blocks, cs4a, cs4a-rows, probe, published, sparvar, fastvar."""
    return _engine.preset_names()


def preset(name: str, schedule: Schedule | None = None, *, layers: int = 40, scales: int = 13) -> Plan:
    """A named plan. `layers` matters to `published` alone; `scales` is the schedule's length where one is given."""
    made = None if schedule is None else grids(schedule)
    return Plan(_engine.AttentionPlan.preset(name, layers, scales if made is None else len(made)), made)


def combine(*plans: Plan, name: str = "combined") -> Plan:
    """The rules of several plans, one plan after the other: the first rule that fits holds."""
    if not plans:
        raise UsageError("combine: no plans")
    if any(plan.prunes for plan in plans):
        raise UsageError("combine: a plan that prunes tokens is not only rules")
    if len({plan.schedule for plan in plans}) > 1:
        raise UsageError("combine: the plans have different schedules; bind them to one")
    rules = [rule for plan in plans for rule in json.loads(plan.to_json())["rules"]]
    return from_json({"name": name, "rules": rules}, plans[0].schedule)


def dense(schedule: Schedule | None = None) -> Plan:
    """All keys everywhere."""
    return from_json({"name": "dense", "rules": []}, schedule)


def csla(
    schedule: Schedule | None = None,
    *,
    layers: tuple[int, int] = _ALL_LAYERS,
    scales: tuple[int, int] | None = None,
    windows: Sequence[int] | None = None,
    sink_scales: int = 5,
    form: str = "lists",
    centre: str = "published",
    tile: tuple[int, int] = (8, 16),
    rows: int = 0,
    block: int = 128,
    name: str = "csla",
) -> Plan:
    """Static windows and sinks (SparVAR, CSLA).

    A query sees a key of scale j if j < `sink_scales`, or if it lies in the window of side `windows[j]` (-1: none)
    around the query's own place. `form` "lists": the exact keys of each `tile` (height, width) of queries, or of `rows`
    queries in row order; "blocks": `block` queries by `block` keys in row order, computed whole, as published.
    `scales`: from the first to the last one that is sparse; without, the last three, but none before scale 8.
    """
    rule = _rule("csla", schedule, layers, scales)
    count = 13 if schedule is None else len(schedule)
    rule["windows"] = list(_engine.published_windows(count) if windows is None else windows)
    rule.update(sink_scales=sink_scales, form=form, centre=centre, block=block, group=_group(tile, rows))
    return from_json({"name": name, "rules": [rule]}, schedule)


def cs4a(
    schedule: Schedule | None = None,
    *,
    layers: tuple[int, int] = _ALL_LAYERS,
    scales: tuple[int, int] | None = None,
    decision_scale: int | None = None,
    share: float = 0.2,
    granularity: int = 1,
    tile: tuple[int, int] = (8, 8),
    rows: int = 0,
    carry: str = "group",
    own_windows: Sequence[int] = (7, 7),
    residual: bool = True,
    name: str = "cs4a",
) -> Plan:
    """Keys chosen by column sums at the decision scale and carried to the scales above it (SparVAR, CS4A).

    `rows=192, granularity=64, own_windows=(7, 9)` is the published form. Calls of `sparvar.attention` need a
    `sparvar.AttentionState`, which carries what was chosen.
    """
    rule = _rule("cs4a", schedule, layers, scales if decision_scale is None else (decision_scale, -1))
    rule.update(decision_scale=rule["scales"][0], share=share, granularity=granularity, group=_group(tile, rows))
    rule.update(carry=carry, own_windows=list(own_windows), residual=residual)
    return from_json({"name": name, "rules": [rule]}, schedule)


def probe(
    schedule: Schedule | None = None,
    *,
    layers: tuple[int, int] = _ALL_LAYERS,
    scales: tuple[int, int] | None = None,
    stride: int = 8,
    share: float = 0.03,
    tile: tuple[int, int] = (8, 8),
    window: int = 7,
    window_scales: int = 3,
    sink_scales: int = 0,
    residual: bool = True,
    name: str = "probe",
) -> Plan:
    """Every `stride`-th row and column of queries runs dense and chooses the keys of its tile."""
    rule = _rule("probe", schedule, layers, scales)
    rule.update(stride=stride, share=share, window=window, window_scales=window_scales, sink_scales=sink_scales)
    rule.update(group=_group(tile, 0), residual=residual)
    return from_json({"name": name, "rules": [rule]}, schedule)


def _rule(
    method: str, schedule: Schedule | None, layers: tuple[int, int], scales: tuple[int, int] | None
) -> dict[str, Any]:
    if scales is None:
        scales = (max((13 if schedule is None else len(schedule)) - 3, _FIRST_SPARSE), -1)
    return {"layers": list(layers), "scales": list(scales), "method": method}


def _group(tile: tuple[int, int], rows: int) -> dict[str, int]:
    return {"rows": rows} if rows else {"tile_h": tile[0], "tile_w": tile[1]}
