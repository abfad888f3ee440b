"""sparvar.patch on doubles of upstream's models. The tests marked gpu need a GPU."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

import sparvar
from conftest import ROOT
from sparvar import plans

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import sparvar._torch  # noqa: E402  registers torch.ops.sparvar
from upstream_like import InfinityLike, VarLike  # noqa: E402

GRIDS = ((1, 1), (1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 7), (7, 7), (8, 9), (9, 11), (12, 13))
"""Eleven scales: presets are sparse from the eighth on."""
SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)
CSLA = {"scales": (4, -1), "windows": [-1] * 4 + [3, 3, 3, 3, 5, 5, 5], "sink_scales": 2, "tile": (4, 5)}
PRESETS = ["dense", "csla", "csla-blocks", "cs4a", "cs4a-rows", "cs4a-nocache", "probe", "published", "sparvar"]


def infinity(device="cpu", **arguments):
    torch.manual_seed(3)
    return InfinityLike(schedule=GRIDS, **arguments).to(device).eval()


def var(device="cpu", **arguments):
    torch.manual_seed(4)
    return VarLike(patch_nums=SIDES, **arguments).to(device).eval()


def texts(*lengths, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(length, 32, generator=generator).to(device) for length in lengths]


LABELS = torch.tensor([3, 7])
KINDS = {
    "infinity": (infinity, lambda model, **how: model.draw(texts(5, 5), **how), plans.grids(GRIDS)),
    "var": (var, lambda model, **how: model.draw(LABELS, **how), plans.grids(SIDES)),
}


def layers_of(model):
    return [m for m in model.modules() if hasattr(m, "mat_qkv")]


def with_attention(model, attend):
    """A copy of the model whose self-attention is `attend(layer, q, k, v, scale)`."""
    model = copy.deepcopy(model)
    for index, layer in enumerate(layers_of(model)):

        def replaced(q, k, v, mask, flash, layer=layer, index=index):
            assert mask is None
            q, k, v = (part.transpose(1, 2).contiguous() if flash else part.contiguous() for part in (q, k, v))
            out = attend(index, q, k, v, layer.scale).transpose(1, 2).flatten(2)
            return layer.proj_drop(layer.proj(out))

        layer.attend = replaced
    return model


def masked(plan):
    """Attention in double precision over what the plan's lists show."""

    def attend(layer, q, k, v, scale):
        lists = plan.lists(layer, plan.scale_of(q.shape[2], k.shape[2]))
        mask = torch.from_numpy(lists.mask()).to(q.device)
        parts = (part.double() for part in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)
        return out.to(q.dtype)

    return attend


def by_hand(plan):
    """`sparvar.attention` with one state for all layers and one picture."""
    state = sparvar.AttentionState()

    def attend(layer, q, k, v, scale):
        return sparvar.attention(q, k, v, plan=plan, layer=layer, scale=scale, state=state)

    return attend


def same(got, expected, tolerance=2e-5):
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def like(got, expected, bound=1e-4):
    """Of keys that all but tie, the choosing methods may choose different ones: few numbers may be others."""
    assert mean_error(got, expected) < bound


def mean_error(got, expected):
    return torch.cat([(a - b).abs().flatten() for a, b in zip(got[1], expected[1], strict=True)]).mean().item()


def differ(got, expected):
    return (got[1][-1] - expected[1][-1]).abs().max() > 1e-3


# ---- numbers


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("unit_length", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_plan_changes_nothing(kind, unit_length, flash):
    make, draw, _ = KINDS[kind]
    model = make(flash=flash, **{"cos_attn" if kind == "infinity" else "attn_l2_norm": unit_length})
    expected = draw(model)
    assert sparvar.patch(model, "dense") is model
    same(draw(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_csla_is_attention_under_its_mask(kind):
    make, draw, grids = KINDS[kind]
    model, plan = make(), plans.csla(grids, **CSLA)
    expected = draw(with_attention(model, masked(plan)))
    assert differ(expected, draw(model)), "the mask hides nothing that counts"
    same(draw(sparvar.patch(model, plan)), expected)


def test_every_layer_has_its_own_rule():
    plan = plans.combine(
        plans.csla(GRIDS, layers=(1, 1), **CSLA), plans.probe(GRIDS, layers=(2, 2), scales=(8, -1), window=3, share=0.1)
    )
    model = infinity()
    expected = with_attention(model, by_hand(plan)).draw(texts(5, 5))
    assert differ(expected, model.draw(texts(5, 5)))
    like(sparvar.patch(model, plan).draw(texts(5, 5)), expected)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_presets_over_several_pictures(kind, name):
    """Three pictures of different seeds in a row: what cs4a carries and every cache begin anew."""
    make, draw, grids = KINDS[kind]
    model = make()
    plan = plans.preset(name, grids, layers=len(layers_of(model)))
    expected = [draw(with_attention(model, by_hand(plan)), seed=seed) for seed in range(3)]
    if name not in ("dense", "csla-blocks"):  # blocks of 128 hide nothing of so small a picture
        assert mean_error(draw(model), expected[0]) > 5e-4, "dense attention would pass this test"
    sparvar.patch(model, name)
    for seed in range(3):
        (same if plan.is_static else like)(draw(model, seed=seed), expected[seed])
    for layer in layers_of(model):
        assert layer.cached_k is None and not layer._sparvar_patch.state.layers, "something stays after a picture"


def walk(layer, model, halve_at=99, batch=4):
    """Outputs of one layer over all scales, of inputs that do not hang on what was sampled."""
    generator, out = torch.Generator().manual_seed(6), []
    layer.kv_caching(True)
    for index, (_, h, w) in enumerate(model.schedule):
        if index == halve_at:
            layer.cached_k, layer.cached_v = layer.cached_k[: batch // 2], layer.cached_v[: batch // 2]
        x = torch.randn(batch // 2 if index >= halve_at else batch, h * w, 64, generator=generator)
        with torch.no_grad():
            out.append(
                layer(x.to(layer.proj.weight.device), None, None, model.schedule, model.rope2d_freqs_grid, index)
            )
    return out, layer.cached_k


def check_bfloat16(device, plan, attend):
    """Under autocast, as far from float32 as the model itself is."""
    model = infinity(device)
    reference = with_attention(model, attend(plan))
    exact = walk(layers_of(reference)[1], model)[0]
    with torch.autocast(device, torch.bfloat16):
        own = walk(layers_of(reference)[1], model)[0]
        got = walk(layers_of(sparvar.patch(model, plan))[1], model)[0]
    for a, b, e in zip(got, own, exact, strict=True):
        assert a.dtype == torch.bfloat16
        error, own_error = ((part.float() - e).square().mean().sqrt() for part in (a, b))
        assert error < 1.5 * own_error < 0.02


def test_bfloat16_as_upstream_runs_it():
    check_bfloat16("cpu", plans.csla(GRIDS, **CSLA), masked)


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("cfg", [1, 3.0])
def test_batches_with_and_without_guidance(pictures, cfg):
    model = infinity()
    some = texts(*range(4, 4 + pictures))
    expected = with_attention(model, by_hand(plans.cs4a(GRIDS, decision_scale=8, share=0.1))).draw(some, cfg=cfg)
    sparvar.patch(model, plans.cs4a(decision_scale=8, share=0.1))
    like(model.draw(some, cfg=cfg), expected)


@pytest.mark.parametrize("flash", [False, True])
def test_guidance_may_end_on_the_way(flash):
    """Whoever drops half of the caches leaves tensors of his own there; they are taken over."""
    model, plan = infinity(flash=flash), plans.csla(GRIDS, **CSLA)
    expected, cached = walk(layers_of(with_attention(model, masked(plan)))[1], model, halve_at=6)
    got, own_cached = walk(layers_of(sparvar.patch(model, plan))[1], model, halve_at=6)
    for a, b in zip((*got, own_cached), (*expected, cached), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_the_walk_without_a_scale_index():
    """Where upstream does not hand the index on, it rotates every scale as the first; so does a patched layer."""
    model = infinity()
    expected = model.draw(texts(5), fused_norm=False)
    assert differ(expected, model.draw(texts(5)))
    same(sparvar.patch(model, "dense").draw(texts(5), fused_norm=False), expected)


def filled_with_nan(self, shape, *, dtype=None):
    """torch.Tensor.new_empty; with what no result may hang on."""
    dtype, shape = dtype or self.dtype, (shape,) if isinstance(shape, int) else shape
    return torch.full(shape, float("nan") if dtype.is_floating_point else 127, dtype=dtype, device=self.device)


def test_what_lies_in_a_buffer_beyond_the_keys_does_not_count(monkeypatch):
    model, plan = infinity(), plans.cs4a(GRIDS, decision_scale=8, share=0.1)
    sparvar.patch(model, plan)
    expected = model.draw(texts(5))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled_with_nan)
    got = model.draw(texts(5))
    monkeypatch.undo()
    for a, b in zip(got[1], expected[1], strict=True):
        assert torch.equal(a, b)


def test_weights_may_change_between_pictures():
    model = sparvar.patch(infinity(), "dense")
    model.draw(texts(5))
    other = infinity()
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    model.load_state_dict(other.state_dict())
    same(model.draw(texts(5)), other.draw(texts(5)))


def test_rotations_may_change_between_pictures():
    """In place of a table, in the same dictionary."""
    model = sparvar.patch(infinity(), "csla")
    before = model.draw(texts(5))
    for name, table in model.rope2d_freqs_grid.items():
        model.rope2d_freqs_grid[name] = table.flip(0)
    other = sparvar.patch(infinity(), "csla")
    other.rope2d_freqs_grid = model.rope2d_freqs_grid
    assert differ(model.draw(texts(5)), before)
    same(model.draw(texts(5)), other.draw(texts(5)), 0)


def test_a_mode_sees_the_operators():
    """Layers go past PyTorch's dispatcher only where nobody listens to it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    seen: list[str] = []
    model = sparvar.patch(infinity(), "csla")
    expected = model.draw(texts(5))
    with Names():
        got = model.draw(texts(5))
    same(got, expected)
    assert seen.count("sparvar.split_qkv.default") == len(GRIDS) * len(layers_of(model))


# ---- there and back


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unpatch_restores_the_model(kind, flash):
    make, draw, _ = KINDS[kind]
    model = make(flash=flash)
    before = [dict(vars(layer)) for layer in layers_of(model)]
    expected = draw(model)
    sparvar.patch(model, "sparvar")
    assert differ(draw(model), expected)
    assert sparvar.unpatch(model) is model
    for layer, was in zip(layers_of(model), before, strict=True):
        assert vars(layer).keys() == was.keys() and "forward" not in vars(layer)
    got = draw(model)
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b)
    sparvar.patch(model, "csla")  # and it may be patched again


def test_a_picture_may_end_unpatched():
    """The caches are upstream's at any time: after unpatch its own code goes on with them."""
    for flash in (False, True):
        model = infinity(flash=flash)
        expected = model.draw(texts(5))
        sparvar.patch(model, "dense")
        same(model.draw(texts(5), on_scale=lambda i, model=model: sparvar.unpatch(model) if i == 7 else None), expected)


def test_a_forward_of_somebody_else_comes_back():
    model = infinity()
    layer = layers_of(model)[0]
    theirs = layer.forward = lambda *arguments, **named: type(layer).forward(layer, *arguments, **named)
    sparvar.patch(model)
    assert layer.forward is not theirs
    sparvar.unpatch(model)
    assert layer.forward is theirs


def test_a_picture_that_failed_leaves_nothing():
    model = sparvar.patch(infinity(), plans.cs4a(decision_scale=8, share=0.1))
    expected = model.draw(texts(5))

    def stop(index):
        if index == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.draw(texts(5, 6), on_scale=stop)
    same(model.draw(texts(5)), expected, 0)


def test_copies_are_patched_models_of_their_own():
    model = sparvar.patch(infinity(), "csla")
    expected = model.draw(texts(5))
    other = copy.deepcopy(model)
    sparvar.unpatch(model)
    same(other.draw(texts(5)), expected, 0)
    with pytest.raises(sparvar.UsageError, match="patched already"):
        sparvar.patch(other)


def test_buffers_go_with_the_cache():
    import gc
    import weakref

    model = sparvar.patch(infinity(), "csla")
    kept = []
    model.draw(texts(5), on_scale=lambda i: kept.append(weakref.ref(layers_of(model)[0].cached_k)) if i == 3 else None)
    gc.collect()
    assert all(reference() is None for reference in kept) and kept


def cached_tokens(layer):
    """Of its cache: tokens in it, tokens there is room for."""
    return None if layer.cached_k is None else (layer.cached_k.shape[2], layer.cached_k._sparvar_buffer.shape[2])


def test_at_the_last_scale_caches_come_and_go_layer_by_layer():
    model = sparvar.patch(infinity(), "csla")
    layers = layers_of(model)
    seen = []
    for layer in layers:  # a hook of somebody who looks at keys finds them
        layer.register_forward_hook(lambda *_: seen.append([cached_tokens(layer) for layer in layers]))
    model.draw(texts(5))
    tokens = sum(h * w for h, w in GRIDS)
    before = tokens - GRIDS[-1][0] * GRIDS[-1][1]
    assert seen[-len(layers) - 1] == [(before, before)] * len(layers)
    for index, now in enumerate(seen[-len(layers) :]):
        assert now == [None] * index + [(tokens, tokens)] + [(before, before)] * (len(layers) - index - 1)


def test_a_last_scale_may_be_drawn_again():
    """By whoever puts the caches of before back."""
    model = sparvar.patch(infinity(), plans.csla(GRIDS, **CSLA))
    layers, generator = layers_of(model), torch.Generator().manual_seed(8)
    for layer in layers:
        layer.kv_caching(True)

    def scale(index, x):
        with torch.no_grad():
            return [layer(x, None, None, model.schedule, model.rope2d_freqs_grid, index) for layer in layers]

    inputs = [torch.randn(2, h * w, 64, generator=generator) for h, w in GRIDS]
    for index, x in enumerate(inputs[:-1]):
        scale(index, x)
    kept = [(layer.cached_k.clone(), layer.cached_v.clone()) for layer in layers]
    expected = scale(len(GRIDS) - 1, inputs[-1])
    for layer, (k, v) in zip(layers, kept, strict=True):
        layer.cached_k, layer.cached_v = k, v
    for a, b in zip(scale(len(GRIDS) - 1, inputs[-1]), expected, strict=True):
        assert torch.equal(a, b)


# ---- errors


def test_what_is_no_such_model():
    with pytest.raises(sparvar.UsageError, match=r"expected a torch\.nn\.Module, found str"):
        sparvar.patch("model")
    with pytest.raises(sparvar.UsageError, match="Linear has no self-attention layers"):
        sparvar.patch(torch.nn.Linear(2, 2))
    with pytest.raises(sparvar.UsageError, match="InfinityLike is not patched"):
        sparvar.unpatch(infinity())


def test_twice_and_unknown_and_pruning():
    model = sparvar.patch(infinity(), "csla")
    with pytest.raises(sparvar.UsageError, match=r"patched already \(attention csla\); call sparvar.unpatch"):
        sparvar.patch(model, "dense")
    for name, words in (("sparse", "sparse"), ("fastvar", "prunes tokens"), ("none.json", "none.json")):
        fresh = infinity()
        with pytest.raises(sparvar.Error, match=words):
            sparvar.patch(fresh, name)
        assert all("forward" not in vars(layer) for layer in layers_of(fresh))


def test_schedules_that_differ():
    with pytest.raises(sparvar.UsageError, match=r"plan csla is made for the schedule of 13 .* the model draws of 11"):
        sparvar.patch(var(), plans.csla(plans.schedule()))
    model = sparvar.patch(infinity(), plans.csla(plans.schedule()))
    with pytest.raises(sparvar.UsageError, match=r"of 13 .* to 64x64 \(10521 tokens\), and the model draws of 11"):
        model.draw(texts(5))
    model = sparvar.patch(infinity(), "csla")
    layer = layers_of(model)[0]
    layer.kv_caching(True)
    with torch.no_grad(), pytest.raises(sparvar.UsageError, match="layer 0 got 7 tokens after 0"):
        layer(torch.zeros(2, 7, 64), None, None, model.schedule, model.rope2d_freqs_grid)
    with torch.no_grad(), pytest.raises(sparvar.UsageError, match="neither the call"):
        layer(torch.zeros(2, 1, 64), None)
    with torch.no_grad(), pytest.raises(sparvar.UsageError, match="pictures, not videos"):
        layer(torch.zeros(2, 1, 64), None, None, [(1, 1, 1), (2, 2, 2)], None)
    with torch.no_grad(), pytest.raises(sparvar.UsageError, match="no table for scale_schedule"):
        layer(torch.zeros(2, 1, 64), None, None, [(1, 1, 1), (1, 2, 2)], model.rope2d_freqs_grid)


def test_what_a_plan_cannot_honour():
    model = sparvar.patch(infinity(), "csla")
    layer = layers_of(model)[2]
    x, scale = torch.zeros(2, 1, 64), {"scale_schedule": model.schedule, "rope2d_freqs_grid": model.rope2d_freqs_grid}
    with torch.no_grad():
        with pytest.raises(sparvar.UsageError, match="layer 2 runs without its KV cache"):
            layer(x, None, **scale)
        layer.kv_caching(True)
        with pytest.raises(sparvar.UsageError, match="layer 2 got a mask"):
            layer(x, torch.zeros(1, 1, 1, 1), **scale)
        with pytest.raises(sparvar.UsageError, match="FlexAttention"):
            layer(x, None, lambda *_: None, **scale)
        layer.train()
        with pytest.raises(sparvar.UsageError, match="training mode"):
            layer(x, None, **scale)
        layer.eval()
        with pytest.raises(sparvar.UsageError, match="runs in float16"):
            layers_of(copy.deepcopy(model).half())[2](x.half(), None, **scale)
    with pytest.raises(sparvar.UsageError, match="no gradients"):
        layer(x, None, **scale)
    with torch.no_grad():
        layer(x, None, **scale)
        layer.cached_k, layer.cached_v = layer.cached_k[:1], layer.cached_v[:1]
        with pytest.raises(sparvar.UsageError, match="a batch of 2, and cached_k is"):
            layer(torch.zeros(2, 2, 64), None, scale_ind=1, **scale)


# ---- the operator


def test_split_qkv_keeps_pytorchs_rules():
    qkv, caches = torch.randn(2, 6, 3, 4, 16), [torch.zeros(2, 4, 9, 16) for _ in range(2)]
    rope, factor = torch.randn(6, 8, 2), torch.rand(4)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparvar.split_qkv.default, (qkv, *caches, factor, rope, True, 2), test_utils=tests)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("normalise", "rotates"), [(True, True), (True, False), (False, True), (False, False)])
def test_split_qkv_is_what_it_says(normalise, rotates, dtype):
    check_split("cpu", getattr(torch, dtype), normalise, rotates)


def check_split(device, dtype, normalise, rotates):
    torch.manual_seed(1)
    qkv = torch.randn(2, 6, 3, 4, 16, device=device).to(dtype)
    k_cache, v_cache = (torch.full((2, 4, 11, 16), 7.0, device=device, dtype=dtype) for _ in range(2))
    factor, angle = torch.rand(4, device=device), torch.randn(6, 8, device=device)
    rope = torch.stack([angle.cos(), angle.sin()], -1) if rotates else None
    q = torch.ops.sparvar.split_qkv(qkv, k_cache, v_cache, factor, rope, normalise, 3)
    exact = [part.double() for part in qkv.permute(2, 0, 3, 1, 4)]
    if normalise:
        exact[:2] = [torch.nn.functional.normalize(part, dim=-1) for part in exact[:2]]
    exact[0] = exact[0] * factor.double()[:, None, None]
    if rotates:
        numbers = torch.polar(torch.ones_like(angle).double(), angle.double())
        exact[:2] = [
            torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2))) * numbers).flatten(-2)
            for part in exact[:2]
        ]
    bound = 1e-5 if dtype == torch.float32 else 8e-3
    got = (q, k_cache[:, :, 3:9], v_cache[:, :, 3:9])
    for part, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(part.double(), expected, atol=bound, rtol=bound)
    for cache in (k_cache, v_cache):
        assert bool((cache[:, :, :3] == 7).all()) and bool((cache[:, :, 9:] == 7).all())


def test_split_qkv_refuses_what_does_not_fit():
    qkv, cache = torch.randn(2, 6, 3, 4, 16), torch.zeros(2, 4, 9, 16)
    split = torch.ops.sparvar.split_qkv
    for arguments, words in (
        ((qkv, cache, cache.clone(), None, None, True, 4), "6 rows from row 4 do not fit"),
        ((qkv, cache[:, :3], cache[:, :3], None, None, True, 0), "k_cache is float32"),
        ((qkv, cache, cache[:, :, :8].contiguous(), None, None, True, 0), "v_cache is float32"),
        ((qkv, cache, cache.clone(), torch.rand(3), None, True, 0), "head_scale is"),
        ((qkv, cache, cache.clone(), None, torch.rand(6, 8, 2).double(), True, 0), "rope is"),
        ((qkv, cache, cache.bfloat16(), None, None, True, 0), "is not what was prepared"),
    ):
        with pytest.raises(sparvar.UsageError, match=words):
            split(*arguments)


# ---- the benchmark


def test_the_benchmark_runs():
    command = [sys.executable, ROOT / "bench" / "python_patch.py", "--geometry", "tiny", "--repeat", "1", "--json"]
    command += ["--device", "cpu", "--attention", "dense,sparvar", "--sdpa", "flash", "--text-tokens", "6"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["attention"] for row in rows] == ["unpatched", "dense", "sparvar"]
    for row in rows:
        assert len(row["scales"]) == 11 and 0 < sum(row["scales"]) + row["decode"] <= row["all_seconds"][0] * 1.01


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("normalise", "rotates"), [(True, True), (False, False)])
def test_split_qkv_on_a_gpu(normalise, rotates, dtype):
    check_split("cuda", getattr(torch, dtype), normalise, rotates)


@pytest.mark.gpu
def test_split_qkv_runs_on_the_current_stream():
    qkv, caches = (
        torch.randn(2, 6, 3, 4, 16, device="cuda"),
        [torch.zeros(2, 4, 9, 16, device="cuda") for _ in range(2)],
    )
    expected = torch.ops.sparvar.split_qkv(qkv * 2, *caches, None, None, False, 0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # 0.1 s: what is enqueued elsewhere would be done long before
        got = torch.ops.sparvar.split_qkv(qkv * 2, *caches, None, None, False, 0)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PRESETS)
def test_presets_on_a_gpu(name):
    """float32, two pictures in a row, against the same calls by hand."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = infinity("cuda")
    some = texts(5, 6, device="cuda")
    plan = plans.preset(name, GRIDS, layers=4)
    expected = [with_attention(model, by_hand(plan)).draw(some, seed=seed) for seed in range(2)]
    sparvar.patch(model, name)
    for seed in range(2):
        got = model.draw(some, seed=seed)
        like(got, expected[seed], 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "csla"])
def test_bfloat16_on_a_gpu(name):
    check_bfloat16("cuda", plans.preset(name, GRIDS), masked)


@pytest.mark.gpu
def test_nothing_beyond_the_keys_counts_on_a_gpu(monkeypatch):
    for name in ("dense", "csla", "cs4a", "probe"):
        model = sparvar.patch(infinity("cuda"), name)
        monkeypatch.setattr(torch.Tensor, "new_empty", filled_with_nan)
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.draw(texts(5, device="cuda"))[1]
        monkeypatch.undo()
        assert all(bool(part.isfinite().all()) for part in hidden), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "cs4a", "sparvar"])
def test_less_memory_on_a_gpu(name):
    sides = [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48]
    torch.manual_seed(3)
    model = InfinityLike(depth=8, width=256, schedule=[(side, side) for side in sides]).cuda().eval()
    some, peaks = texts(5, device="cuda"), []
    for patched in (False, True):
        if patched:
            sparvar.patch(model, name)
        for _ in range(2):  # the first one loads kernels
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                model.draw(some, keep=False)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0], peaks
