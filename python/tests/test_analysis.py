"""What analyze counts, against the definitions in double precision on whole maps, on maps whose figures are known, and
against the program."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import sparvar
from conftest import GRIDS, KEYS, TOKENS, arrays, probabilities
from sparvar import plots
from sparvar.analysis import Captures, capture

LAYERS, HEADS = 2, 3
WINDOWS = [-1, -1, 1, 3, 3, 5]
LAST = len(GRIDS) - 1


def qk(layer: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries of a scale, and all keys so far: a cache that grows."""
    q = arrays(10 * layer + scale, scale, channels=8)[0]
    return q, arrays(100 + layer, LAST, channels=8)[1][:, :, : KEYS[scale]]


@pytest.fixture(scope="module")
def captures() -> Captures:
    made = Captures()
    for scale in range(len(GRIDS)):
        for layer in range(LAYERS):
            made.add(f"blocks.{layer}.attn", *qk(layer, scale))
    return made


@pytest.fixture(scope="module")
def report(captures: Captures) -> sparvar.analysis.Report:
    return sparvar.analyze(captures, GRIDS, side=64, windows=WINDOWS, sink_scales=2)


def places(size: int, other: int) -> np.ndarray:
    """Centres of an axis' tokens on an axis of another size."""
    return (np.arange(size) + 0.5) * other / size - 0.5


def resize_matrix(size: int, to: int) -> np.ndarray:
    """Linear interpolation between the nearest centres, the edge repeated."""
    at = np.clip(places(to, size), 0, size - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(size)[None]))


def resized(maps: np.ndarray, of: int, to: int) -> np.ndarray:
    """(queries, h, w) of scale `of`, on the grid of scale `to`."""
    down, across = (resize_matrix(GRIDS[of][axis], GRIDS[to][axis]) for axis in (0, 1))
    return np.einsum("vi,uj,qij->qvu", down, across, maps)


def under(scale: int) -> np.ndarray:
    """The token of the scale below under each token."""
    (h, w), (below_h, below_w) = GRIDS[scale], GRIDS[scale - 1]
    y = np.floor((np.arange(h) + 0.5) * below_h / h).astype(int)
    x = np.floor((np.arange(w) + 0.5) * below_w / w).astype(int)
    return (y[:, None] * below_w + x[None]).ravel()


def part(rows: np.ndarray, j: int) -> np.ndarray:
    """The keys of one scale: (queries, h, w)."""
    return rows[:, KEYS[j] - TOKENS[j] : KEYS[j]].reshape(-1, *GRIDS[j])


@pytest.mark.parametrize("k", [3, 4, 5])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_agrees_with_the_definitions_on_whole_maps(report, layer, k):
    s = report.scales.index(k)
    h, w = GRIDS[k]
    for head in range(HEADS):
        rows = probabilities(*qk(layer, k))[0, head]
        before = probabilities(*qk(layer, k - 1))[0, head][under(k)]
        at, inside, correlations = (layer, s, head), 0.0, []
        for j in range(k + 1):
            weights = part(rows, j)
            far = [abs(np.arange(GRIDS[j][a])[None] - places(GRIDS[k][a], GRIDS[j][a])[:, None]) for a in (0, 1)]
            distance = np.maximum(far[0][:, None, :, None], far[1][None, :, None, :]).reshape(h * w, *GRIDS[j])
            assert report.mass[(*at, j)] == pytest.approx(weights.sum() / (h * w), abs=1e-6)
            assert report.distance[(*at, j)] == pytest.approx((weights * distance).sum() / weights.sum(), abs=1e-5)
            bins = np.minimum(np.floor(distance + 0.5), 15).astype(int)
            for values, sums in ((weights, report.weight), (np.ones_like(weights), report.keys)):
                expected = np.bincount(bins.ravel(), values.ravel(), 16) / (h * w)
                np.testing.assert_allclose(sums[(*at, j)], expected, atol=1e-5)
            if j >= 2:
                near = [
                    abs(np.arange(GRIDS[j][a])[None] - np.floor(places(GRIDS[k][a], GRIDS[j][a]) + 0.5)[:, None])
                    <= WINDOWS[j] // 2
                    for a in (0, 1)
                ]
                both = near[0][:, None, :, None] & near[1][None, :, None, :]
                inside += (weights * both.reshape(weights.shape)).sum() / (h * w)
            if j > 0:
                carried = resized(part(before, j - 1), j - 1, j)
                correlations.append(np.corrcoef(weights.ravel(), carried.ravel())[0, 1])
                assert report.similarity[(*at, j)] == pytest.approx(correlations[-1], abs=1e-4)
        assert report.windows[at] == pytest.approx(inside, abs=1e-6)
        assert report.sinks[at] == pytest.approx(rows[:, : KEYS[1]].sum() / (h * w), abs=1e-6)
        assert report.similarity_mean[at] == pytest.approx(np.mean(correlations), abs=1e-4)
        assert report.own_scale[at] == report.mass[(*at, k)] and report.own_distance[at] == report.distance[(*at, k)]
        assert np.isnan(report.mass[(*at, slice(k + 1, None))]).all() and np.isnan(report.similarity[(*at, 0)])
    assert report.queries[layer, s] == h * w


def rows_of(scale: int) -> np.ndarray:
    return np.zeros((TOKENS[scale], KEYS[scale]))


def analyzed(maps: dict[int, np.ndarray], **options) -> sparvar.analysis.Report:
    """Of one layer and head, given whole maps by scale."""
    made = Captures()
    for scale, rows in maps.items():
        assert rows.shape == (TOKENS[scale], KEYS[scale])
        made.add_probabilities("0", rows[None, None])
    return sparvar.analyze(made, GRIDS, scales=[LAST], side=64, **options)


def test_a_pure_sink():
    rows = rows_of(LAST)
    rows[:, 0] = 1
    found = analyzed({LAST: rows})
    assert found.sinks[0, 0, 0] == 1.0 and found.mass[0, 0, 0, 0] == 1.0
    assert found.windows[0, 0, 0] == 0.0 and found.own_scale[0, 0, 0] == 0.0
    assert np.isnan(found.own_distance[0, 0, 0]), "no weight there, so no distance"


def test_a_pure_diagonal():
    rows = rows_of(LAST)
    rows[:, KEYS[LAST - 1] :] = np.eye(TOKENS[LAST])
    found = analyzed({LAST: rows})
    assert found.own_scale[0, 0, 0] == 1.0 and found.own_distance[0, 0, 0] == 0.0
    assert found.windows[0, 0, 0] == 1.0 and found.sinks[0, 0, 0] == 0.0
    assert found.weight[0, 0, 0, LAST, 0] == 1.0 and found.keys[0, 0, 0, LAST, 0] == 1.0
    away = rows_of(LAST)
    away[:, KEYS[LAST - 1] :] = np.roll(np.eye(TOKENS[LAST]), 8, axis=1)  # 8 along, or 5 back in the next row
    assert analyzed({LAST: away}).windows[0, 0, 0] == 0.0, "all outside of a window of 7"


def test_a_pure_copy_of_the_coarser_scale():
    random = np.random.default_rng(1)
    before = random.random((TOKENS[LAST - 1], KEYS[LAST - 1])) ** 4
    before /= before.sum(1, keepdims=True)
    rows = rows_of(LAST)
    for j in range(1, LAST + 1):
        copy = resized(part(before[under(LAST)], j - 1), j - 1, j)
        rows[:, KEYS[j] - TOKENS[j] : KEYS[j]] = copy.reshape(TOKENS[LAST], -1)
    rows *= 0.9 / rows.sum(1).max()
    rows[:, 0] = 1 - rows.sum(1)
    found = analyzed({LAST - 1: before, LAST: rows})
    # key scale 1 is a copy of the one key of scale 0, which does not vary within a query but between queries
    np.testing.assert_allclose(found.similarity[0, 0, 0, 1:], 1.0, atol=1e-6)
    assert found.similarity_mean[0, 0, 0] == pytest.approx(1.0, abs=1e-6)
    other = analyzed({LAST - 1: np.roll(before, 7, axis=1), LAST: rows})
    assert other.similarity_mean[0, 0, 0] < 0.5


def test_without_the_scale_before_there_is_no_similarity():
    rows = rows_of(LAST) + 1 / KEYS[LAST]
    assert np.isnan(analyzed({LAST: rows}).similarity).all()


def test_even_attention_has_flat_locality():
    found = analyzed({LAST: rows_of(LAST) + 1 / KEYS[LAST]}, sink_scales=3)
    assert found.sinks[0, 0, 0] == pytest.approx(KEYS[2] / KEYS[LAST], abs=1e-6)
    there = found.keys[0, 0, 0, LAST] > 0
    per_key = found.weight[0, 0, 0, LAST][there] / found.keys[0, 0, 0, LAST][there]
    np.testing.assert_allclose(per_key, 1 / KEYS[LAST], rtol=1e-5)


def test_probabilities_and_all_tokens_at_once_give_the_same(captures, report):
    maps, whole = Captures(), Captures()
    for layer in range(LAYERS):
        q = np.concatenate([qk(layer, scale)[0] for scale in range(len(GRIDS))], axis=2)
        k = qk(layer, LAST)[1]
        sees = np.repeat(np.arange(len(GRIDS)), TOKENS)
        block = sees[:, None] >= sees[None]
        whole.add(f"blocks.{layer}.attn", q, k, mask=block)
        maps.add_probabilities(f"blocks.{layer}.attn", probabilities(q, k, block))
    options = {"side": 64, "windows": WINDOWS, "sink_scales": 2}
    for other in (maps, whole):
        found = sparvar.analyze(other, GRIDS, **options)
        for name in ("sinks", "windows", "mass", "distance", "similarity", "weight"):
            np.testing.assert_allclose(getattr(found, name), getattr(report, name), atol=2e-5, err_msg=name)


def test_a_mask_and_a_scale_are_the_calls_own():
    q, k = qk(0, LAST)
    hidden = np.arange(KEYS[LAST]) >= KEYS[2]
    for mask in (~hidden, np.where(hidden, -np.inf, 0.0)):
        made = Captures()
        made.add("0", q, k, scale=0.7, mask=mask)
        found = sparvar.analyze(made, GRIDS, scales=[LAST], side=64, sink_scales=1)
        expected = probabilities(q * (0.7 * np.sqrt(8)), k, np.broadcast_to(~hidden, (TOKENS[LAST], KEYS[LAST])))
        assert found.mass[0, 0, :, 3:].max() == 0.0
        np.testing.assert_allclose(found.sinks[0, 0], expected[0, :, :, 0].mean(-1), atol=1e-6)


def test_heads_that_share_keys_and_the_batch_entry():
    q, k = qk(0, LAST)
    shared, repeated = Captures(batch_entry=1), Captures()
    shared.add("0", q, k[:, :1])
    repeated.add("0", q[1:], np.repeat(k[1:, :1], HEADS, axis=1))
    a, b = (sparvar.analyze(made, GRIDS, scales=[LAST]).mass for made in (shared, repeated))
    np.testing.assert_array_equal(a, b)


def test_keys_of_a_cache_are_kept_once(captures):
    kept = [sum(part.shape[1] for part in calls[-1].k) for calls in captures._calls.values()]
    assert kept == [KEYS[LAST]] * LAYERS
    for calls in captures._calls.values():
        assert all(one is other for one, other in zip(calls[-2].k, calls[-1].k, strict=False))
    q, k = qk(0, LAST)
    made = Captures()
    made.add("0", *qk(0, LAST - 1))
    made.add("0", q, k[:, :, ::-1])
    assert len(made._calls["0"][-1].k) == 1, "another picture's keys begin with others"
    k[:] = 0
    assert made._calls["0"][-1].k[0].any(), "what is captured is not what the caller goes on to write"


def test_json_is_the_report(report):
    text = json.loads(report.to_json())
    assert text["layer_names"] == ["blocks.0.attn", "blocks.1.attn"] and text["scales"] == [3, 4, 5]
    assert text["windows_by_key_scale"] == WINDOWS and text["sink_scales"] == 2
    assert [(one["layer"], one["scale"]) for one in text["results"]] == [(i, k) for i in range(2) for k in (3, 4, 5)]
    one = text["results"][-1]
    assert one["heads"][2]["mass_by_key_scale"] == pytest.approx(list(report.mass[1, 2, 2]), abs=1e-6)
    assert one["heads"][2]["similarity_by_key_scale"][0] is None
    assert one["mean"]["sinks"] == pytest.approx(report.sinks[1, 2].mean(), abs=1e-6)
    assert [d["key_scale"] for d in one["heads"][0]["distances"]] == [3, 4, 5]
    assert text["layers"][1]["own_distance"] == pytest.approx(report.own_distance[1].mean(), abs=1e-6)


def program_says(program, folder, prompts, *arguments):
    command = [program, "analyze", *prompts, "--model", folder, *arguments, "--json", "--quiet"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=600)
    return json.loads(done.stdout)


def assert_same(a, b, where=""):
    """Equal, numbers within the rounding to six decimals."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_same(a[name], b[name], f"{where}.{name}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, abs=1.1e-6), where
    else:
        assert a == b, where


def test_the_pipeline_says_what_the_program_says(pipe, program, model):
    expected = program_says(program, model, ["red heart, noto style"], "--side", 4, "--seed", 3)
    found = json.loads(pipe.analyze("red heart, noto style", side=4, seed=3).to_json())
    same = ("scales", "queries_along_a_side", "sink_scales", "windows_by_key_scale", "layers", "results")
    assert_same({name: found[name] for name in same}, {name: expected[name] for name in same})


def test_several_prompts_and_chosen_scales(few_scales, program):
    prompts = ["red heart, noto style", "a boat"]
    expected = program_says(program, few_scales, prompts, "--scales", "2,3")
    small = sparvar.Pipeline.from_pretrained(few_scales, device="cpu")
    small.set_progress_bar_config(disable=True)
    found = small.analyze(prompts, scales=[3, 2])
    assert_same(json.loads(found.to_json())["results"], expected["results"])
    assert found.queries[0].tolist() == [2 * h * w for h, w in small.schedule[2:4]]
    with pytest.raises(sparvar.UsageError, match="expected some of 0 to 3"):
        small.analyze("a boat", scales=[4])
    with pytest.raises(sparvar.UsageError, match="no prompt"):
        small.analyze([])


def test_wrong_arguments_are_refused_by_name(captures):
    q, k = qk(0, LAST)
    analyze = sparvar.analyze

    def holding(*calls, **options):
        made = Captures(**options)
        for name, *rest in calls:
            made.add(name, *rest)
        return made

    def with_nan():
        bad = q.copy()
        bad[0, 1, 7, 2] = np.nan
        return holding(("blocks.0.attn", bad, k))

    def not_probabilities():
        made = Captures()
        made.add_probabilities("0", np.full((1, 1, TOKENS[LAST], KEYS[LAST]), 0.5))
        return made

    two = (("a", q, k), ("b", q[:, :2], k[:, :2]))
    partly = (("a", q, k), ("a", q, k[:, :, :-1]))
    refused = [
        (lambda: analyze(Captures(), GRIDS), "nothing was captured"),
        (lambda: analyze({"0": [q, k]}, GRIDS), "capture gave, found dict"),
        (lambda: holding(("a", q, k[..., :4])), r"layer a: q \(2, 3, 156, 8\) and k \(2, 3, 324, 4\)"),
        (lambda: holding(("a", q, k[:, :2])), "do not belong together"),
        (lambda: holding(("a", q[0], k)), r"q: expected 4 dimensions .*found \(3, 156, 8\)"),
        (lambda: holding(("a", q.tolist(), k)), "q is list"),
        (lambda: holding(("a", q, k), batch_entry=2), "batch entry 2 of a batch of 2"),
        (lambda: Captures().add("a", q, k, mask=np.ones((5, 5), bool)), r"mask \(5, 5\) does not fit"),
        (lambda: analyze(captures, GRIDS[:-1]), "156 queries and 324 keys is none of the schedule's: 1 and 1, 6 and 7"),
        (lambda: analyze(captures, [1, 2, 3]), "blocks.0.attn: a call of 6 queries and 7 keys"),
        (lambda: analyze(holding(*partly), GRIDS, scales=[LAST]), "156 queries and 323 keys"),
        (lambda: analyze(captures, []), "at least 1 token a side"),
        (lambda: analyze(captures, [(1, 2, 3)]), "expected .height, width."),
        (lambda: analyze(captures, GRIDS, scales=[6]), "expected some of 0 to 5"),
        (lambda: analyze(captures, GRIDS, side=0), "side: expected 1 to 64"),
        (lambda: analyze(captures, GRIDS, windows=[3]), "one for each of 6 scales, found 1"),
        (lambda: analyze(captures, GRIDS, sink_scales=-1), "sink_scales"),
        (lambda: analyze(holding(("a", q, k)), GRIDS), "no call of scale 3 was captured"),
        (lambda: analyze(holding(*two), GRIDS, scales=[LAST]), "layer b has 2 heads and layer a 3"),
        (lambda: analyze(with_nan(), GRIDS, scales=[LAST], side=64), "blocks.0.attn, scale 5: NaN or infinity"),
        (lambda: analyze(not_probabilities(), GRIDS, scales=[LAST]), "the rows are no probabilities"),
    ]
    for call, message in refused:
        with pytest.raises(sparvar.UsageError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- plots


def test_plots_show_the_report(report):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = plots.scale_pairs(report)
    np.testing.assert_allclose(np.ma.filled(pairs.images[0].get_array(), np.nan), report.mass.mean((0, 2)))
    one = plots.scale_pairs(report, layer="blocks.1.attn", head=2)
    np.testing.assert_allclose(np.ma.filled(one.images[0].get_array(), np.nan), report.mass[1, :, 2])
    assert one.get_title() == "attention by scale, %, layer blocks.1.attn, head 2"
    lines = plots.locality(report, layer=0, head=1, scale=4).lines
    assert [line.get_label() for line in lines] == ["keys of scale 2", "keys of scale 3", "keys of scale 4"]
    weight, keys = report.weight[0, 1, 1, 4], report.keys[0, 1, 1, 4]
    np.testing.assert_allclose(lines[-1].get_ydata(), (weight / np.maximum(keys, 1e-30))[keys > 0])
    np.testing.assert_array_equal(lines[-1].get_xdata(), np.flatnonzero(keys > 0))
    np.testing.assert_allclose(plots.sinks(report).images[0].get_array(), report.sinks.mean(1))
    np.testing.assert_allclose(plots.sinks(report, scale=5).images[0].get_array(), report.sinks[:, 2])
    alike = plots.similarity(report, head=0).images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(alike, np.nan), report.similarity[:, 2, 0])
    ax = pyplot.subplots()[1]
    assert plots.similarity(report, scale=3, ax=ax) is ax
    ax.figure.canvas.draw()
    pyplot.close("all")
    for call, message in (
        (lambda: plots.scale_pairs(report, layer="x"), "the report has blocks.0.attn, blocks.1.attn; found 'x'"),
        (lambda: plots.scale_pairs(report, head=3), "head: the report has 0 to 2; found 3"),
        (lambda: plots.locality(report, scale=1), "scale: the report has 3, 4, 5; found 1"),
    ):
        with pytest.raises(sparvar.UsageError, match=message):
            call()


def test_without_matplotlib_it_says_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(sparvar.UsageError, match=r'plots need matplotlib: pip install "sparvar\[plots\]"'):
        plots.sinks(report)


def test_without_torch_capture_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "sparvar._capture", raising=False)
    monkeypatch.delattr(sparvar, "_capture", raising=False)
    with (
        pytest.raises(sparvar.UsageError, match=r'capture needs PyTorch: pip install "sparvar\[torch\]"'),
        capture(None),
    ):
        pass


# ---- models of PyTorch


def walking_model(torch, attend: str):
    """Two blocks of attention over a growing cache, and one over a text of five tokens."""
    from torch.nn.functional import scaled_dot_product_attention as imported_by_name

    class Attention(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.qk = torch.nn.Linear(24, 48, bias=False)
            self.cache: list = []

        def forward(self, x):
            q, k = (one.unflatten(-1, (HEADS, 8)).transpose(1, 2) for one in self.qk(x).chunk(2, -1))
            self.cache.append(k)
            k = torch.cat(self.cache, 2)
            if attend == "written out":
                out = (q * 8**-0.5 @ k.transpose(-1, -2)).softmax(dim=-1) @ k
            elif attend == "by name":
                out = imported_by_name(q, k, k)
            else:
                out = torch.nn.functional.scaled_dot_product_attention(query=q, key=k, value=k, scale=8**-0.5)
            return x + out.transpose(1, 2).flatten(2)

    class Text(torch.nn.Module):
        def forward(self, x):
            heads = x.unflatten(-1, (HEADS, 8)).transpose(1, 2)
            text = torch.ones(2, HEADS, 5, 8)
            return x + imported_by_name(heads, text, text).transpose(1, 2).flatten(2)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Attention(0), Text(), Attention(1)])

        def draw(self):
            torch.manual_seed(5)
            for tokens in TOKENS:
                x = torch.randn(2, tokens, 24)
                for block in self.blocks:
                    x = block(x)

    return Model().eval()


@pytest.mark.parametrize("attend", ["by module", "by name", "written out"])
def test_capture_sees_the_attention_of_a_model(attend):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = walking_model(torch, attend)
    with torch.inference_mode(), capture(model, batch_entry=1) as maps:
        model.draw()
    assert maps.layers == ("blocks.0", "blocks.1", "blocks.2") and len(maps) == 3 * len(GRIDS)
    model.draw()
    assert len(maps) == 3 * len(GRIDS), "nothing is seen outside of the with"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    found = sparvar.analyze(maps, GRIDS, side=64)
    assert found.layers == ("blocks.0", "blocks.2") and found.left_out == ("blocks.1",)

    model = walking_model(torch, attend)
    seen = []
    model.blocks[2].register_forward_hook(lambda block, args, _: seen.append((args[0], torch.cat(block.cache, 2))))
    with torch.no_grad():
        model.draw()
        for s, k in enumerate(found.scales):
            x, keys = seen[k]
            q = model.blocks[2].qk(x)[..., :24].unflatten(-1, (HEADS, 8)).transpose(1, 2)
            rows = probabilities(q.numpy(), keys.numpy())[1]
            for j in range(k + 1):
                share = rows[:, :, KEYS[j] - TOKENS[j] : KEYS[j]].sum(-1).mean(-1)
                np.testing.assert_allclose(found.mass[1, s, :, j], share, atol=1e-5)


def test_capture_takes_bfloat16_and_chosen_modules():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = walking_model(torch, "by name")
    with torch.no_grad(), capture(model, modules="blocks.2") as maps:
        model.draw()
    assert maps.layers == ("blocks.2",)
    wide, narrow = Captures(), Captures()
    for scale in range(len(GRIDS)):
        q, k = (torch.from_numpy(array).bfloat16() for array in qk(0, scale))
        narrow.add("0", q, k)
        wide.add("0", q.float().numpy(), k.float().numpy())
    a, b = (sparvar.analyze(made, GRIDS).mass for made in (narrow, wide))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(sparvar.UsageError, match="no module's name fits layers"), capture(model, modules=["layers.*"]):
        pass
    with pytest.raises(sparvar.UsageError, match=r"expected a torch.nn.Module, found list"), capture([]):
        pass


def test_what_the_model_raises_leaves_no_hooks():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = walking_model(torch, "by name")
    model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), capture(model) as maps:
        model.draw()
    assert maps.layers == ("blocks.0", "blocks.1")
    assert [len(module._forward_hooks) for module in model.blocks] == [0, 1, 0]
    before = len(maps)
    torch.nn.functional.scaled_dot_product_attention(*(torch.ones(1, 1, 1, 4),) * 3)
    assert len(maps) == before
