"""Plans, schedules, lists of keys, FlashInfer's arrays."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

import sparvar
from conftest import GRIDS, KEYS, TOKENS
from sparvar import plans


def csla(**options):
    given = {"scales": (3, -1), "windows": [-1, -1, -1, 3, 3, 5], "sink_scales": 2, "tile": (4, 5)}
    return plans.csla(GRIDS, **{**given, **options})


def test_schedules_are_infinitys():
    square = sparvar.schedule()
    assert [h for h, _ in square] == [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64]
    assert len(sparvar.schedule("16:9", "0.25M")) == 10
    wide = sparvar.schedule("2:1")
    assert wide[-1][1] == 2 * wide[-1][0]
    with pytest.raises(sparvar.UsageError, match="nearest"):
        sparvar.schedule("9:1")


def test_a_schedule_takes_squares_and_pairs():
    assert plans.grids([1, 2, (3, 4)]) == ((1, 1), (2, 2), (3, 4))
    for wrong in ([], [0], [(1, 2, 3)], ["a"]):
        with pytest.raises(sparvar.UsageError, match="schedule"):
            plans.grids(wrong)


@pytest.mark.parametrize("name", plans.preset_names())
def test_presets_are_the_engines(name):
    plan = plans.preset(name, sparvar.schedule(), layers=12)
    again = plans.from_json(plan.to_json(), sparvar.schedule())
    assert plan == again and hash(plan) == hash(again)
    assert plan.name == name
    assert plan.method(0, 3) == "dense"


def test_builders_say_what_they_were_told():
    text = json.loads(
        plans.cs4a(GRIDS, decision_scale=3, share=0.3, rows=7, own_windows=(3,), residual=False).to_json()
    )
    rule = text["rules"][0]
    assert (rule["scales"], rule["decision_scale"], rule["share"], rule["residual"]) == ([3, -1], 3, 0.3, False)
    assert rule["group"]["rows"] == 7
    assert plans.csla(sparvar.schedule()) == plans.preset("csla", sparvar.schedule())
    assert plans.probe(sparvar.schedule()) == plans.preset("probe", sparvar.schedule())
    assert plans.cs4a(sparvar.schedule()) == plans.preset("cs4a", sparvar.schedule())


def test_the_first_rule_that_fits_holds():
    plan = plans.combine(
        plans.cs4a(GRIDS, layers=(0, 1), decision_scale=4), csla(layers=(2, 5), scales=(3, 4)), name="both"
    )
    methods = [[plan.method(layer, scale) for scale in range(6)] for layer in (1, 2, 6)]
    assert methods[0] == ["dense"] * 4 + ["cs4a"] * 2
    assert methods[1] == ["dense"] * 3 + ["csla"] * 2 + ["dense"]
    assert methods[2] == ["dense"] * 6
    for layer in range(8):
        for scale in range(6):
            assert plan.method(layer, scale) == plan.handle.method(layer, scale)


def test_rules_of_different_pictures_are_not_combined():
    with pytest.raises(sparvar.UsageError, match="different schedules"):
        plans.combine(plans.dense(GRIDS), plans.dense())
    with pytest.raises(sparvar.UsageError, match="prunes"):
        plans.combine(plans.preset("fastvar"))


def test_plans_are_kept_and_copied(tmp_path):
    plan = csla()
    plan.save(tmp_path / "plan.json")
    assert plans.from_json(tmp_path / "plan.json", GRIDS) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_what_is_wrong_is_said():
    with pytest.raises(sparvar.UsageError, match="did you mean 'csla'"):
        plans.preset("clsa")
    with pytest.raises(sparvar.InputError, match="windws"):
        plans.from_json({"rules": [{"method": "csla", "windws": [1]}]})
    with pytest.raises(sparvar.Error, match="share"):
        plans.cs4a(GRIDS, decision_scale=3, share=2.0)
    with pytest.raises(sparvar.InputError, match=r"nothing\.json"):
        plans.from_json("nothing.json")
    with pytest.raises(sparvar.UsageError, match=r"plan\.bind"):
        plans.csla().lists(0, 12)
    with pytest.raises(sparvar.UsageError, match="no lists beforehand"):
        plans.probe(GRIDS, scales=(3, -1)).lists(0, 4)
    assert issubclass(sparvar.UsageError, ValueError) and issubclass(sparvar.ResourceError, RuntimeError)


def window_mask(scale: int) -> np.ndarray:
    """CSLA's definition, token by token, with the published centre: float32, half to even."""
    windows, sinks = [-1, -1, -1, 3, 3, 5], 2
    height, width = GRIDS[scale]
    mask = np.zeros((TOKENS[scale], KEYS[scale]), bool)
    for j, (h, w) in enumerate(GRIDS[: scale + 1]):
        first = KEYS[j] - TOKENS[j]
        for query in range(TOKENS[scale]):
            y, x = divmod(query, width)
            centre = [
                int(np.rint(np.float32(at) / np.float32(size) * np.float32(of)))
                for at, size, of in ((y, height, h), (x, width, w))
            ]
            for key in range(h * w):
                v, u = divmod(key, w)
                near = max(abs(v - centre[0]), abs(u - centre[1])) <= windows[j] // 2
                mask[query, first + key] = j < sinks or (windows[j] > 0 and near)
    return mask


def test_lists_hold_the_union_of_their_tiles_windows():
    lists = csla().lists(0, 5)
    assert (lists.queries, lists.keys) == (TOKENS[5], KEYS[5])
    mask, shown = window_mask(5), lists.mask()
    for tile in lists.tiles:
        assert np.array_equal(shown[tile], np.broadcast_to(mask[tile].any(0), (len(tile), KEYS[5])))
    assert lists.share_of_pairs == pytest.approx(shown.mean())
    one_each = csla(tile=(1, 1)).lists(0, 5)
    assert np.array_equal(one_each.mask(), mask)


def test_bsr_of_a_plan_of_blocks_is_exact():
    lists = csla(form="blocks", block=16).lists(0, 5)
    bsr = lists.to_bsr((16, 16))
    assert bsr.exact and bsr.indptr.dtype == bsr.indices.dtype == np.int32
    assert len(bsr.indptr) == -(-TOKENS[5] // 16) + 1 and bsr.indptr[-1] == len(bsr.indices)
    dense = np.zeros(bsr.shape, bool)
    for i in range(len(bsr.indptr) - 1):
        for j in bsr.indices[bsr.indptr[i] : bsr.indptr[i + 1]]:
            dense[i * 16 : (i + 1) * 16, j * 16 : (j + 1) * 16] = True
    assert np.array_equal(dense, lists.mask())
    back = sparvar.KeyLists.from_bsr(bsr.indptr, bsr.indices, bsr.shape, bsr.block)
    assert np.array_equal(back.mask(), lists.mask())
    assert back.key == lists.key != csla().lists(0, 5).key


def test_bsr_of_exact_lists_is_rounded_up_to_blocks():
    lists = csla().lists(0, 5)
    bsr = lists.to_bsr((16, 32))
    assert not bsr.exact
    rounded = sparvar.KeyLists.from_bsr(bsr.indptr, bsr.indices, bsr.shape, bsr.block).mask()
    assert np.all(rounded >= lists.mask()) and rounded.sum() > lists.mask().sum()
    single = lists.to_bsr((1, 1))
    assert single.exact and len(single.indices) == lists.mask().sum()


def test_wrong_bsr_arrays_are_refused():
    build = sparvar.KeyLists.from_bsr
    with pytest.raises(sparvar.UsageError, match="3 numbers"):
        build([0, 1], [0], (20, 20), (16, 16))
    with pytest.raises(sparvar.UsageError, match="ascend"):
        build([0, 2, 1], [0], (20, 20), (16, 16))
    with pytest.raises(sparvar.UsageError, match="2 key blocks"):
        build([0, 1, 2], [0, 2], (20, 20), (16, 16))
    with pytest.raises(sparvar.UsageError, match="once"):
        sparvar.KeyLists.of_tiles([[0, 1], [1, 2]], [[0], [0]], 4)
    with pytest.raises(sparvar.UsageError, match="there are 4"):
        sparvar.KeyLists.of_tiles([[0, 1]], [[0, 4]], 4)
