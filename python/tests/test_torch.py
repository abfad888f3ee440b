"""The operators: PyTorch's tensors, torch.compile, FlexAttention. The tests marked gpu need a GPU."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import sparvar
from conftest import GRIDS, KEYS, TOKENS, arrays
from sparvar import plans

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

CSLA = plans.csla(GRIDS, scales=(3, -1), windows=[-1, -1, -1, 3, 3, 5], sink_scales=2, tile=(4, 5))
PLANS = {
    "csla": CSLA,
    "cs4a": plans.cs4a(GRIDS, decision_scale=3, share=0.3, tile=(3, 3), own_windows=(3,)),
    "probe": plans.probe(GRIDS, scales=(3, -1), stride=3, share=0.2, tile=(4, 4), window=3),
}


def tensors(seed, scale, device="cpu", dtype=None, **shape):
    return [torch.from_numpy(array).to(device, dtype) for array in arrays(seed, scale, **shape)]


def walk(plan, device="cpu", dtype=torch.float32, attend=sparvar.attention, layers=2, channels=32):
    """Outputs of all scales and layers, keys in one cache of a larger capacity."""
    state = sparvar.AttentionState()
    out = []
    caches = [
        torch.from_numpy(np.random.default_rng(i).standard_normal((2, 3, KEYS[-1] + 5, channels)))
        for i in range(3 * layers)
    ]
    caches = [cache.to(device, dtype) for cache in caches]
    for scale in range(len(GRIDS)):
        first, keys = KEYS[scale] - TOKENS[scale], KEYS[scale]
        for layer in range(layers):
            q, k, v = caches[3 * layer : 3 * layer + 3]
            own = q[:, :, first:keys].contiguous()
            out.append(attend(own, k[:, :, :keys], v[:, :, :keys], plan=plan, layer=layer, state=state))
    return out


@pytest.mark.parametrize("name", PLANS)
def test_tensors_give_what_arrays_give(name):
    plan, state = PLANS[name], sparvar.AttentionState()
    for scale in range(3, 6):
        q, k, v = tensors(scale, scale)
        got = sparvar.attention(q, k, v, plan=plan, state=state)
        if scale == 3:
            numpy_state = sparvar.AttentionState()
        expected = sparvar.attention(q.numpy(), k.numpy(), v.numpy(), plan=plan, state=numpy_state)
        assert np.array_equal(got.numpy(), expected)
        assert got.shape == q.shape and got.transpose(1, 2).is_contiguous()


def test_bfloat16_is_computed_in_place():
    q, k, v = tensors(1, 5, dtype=torch.bfloat16)
    mask = torch.from_numpy(CSLA.lists(0, 5).mask())
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    got = sparvar.attention(q, k, v, plan=CSLA)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", PLANS)
def test_compiled_programs_give_the_same_bits(name):
    torch._dynamo.reset()

    def program(cache, plan):
        state = sparvar.AttentionState()
        out = []
        for scale in range(2, 6):
            first, keys = KEYS[scale] - TOKENS[scale], KEYS[scale]
            q = (cache[0][:, :, first:keys] * 2).contiguous()
            out.append(sparvar.attention(q, cache[1][:, :, :keys], cache[2][:, :, :keys], plan=plan, state=state) + 1)
        return out

    cache = tensors(2, 5)
    cache[0] = tensors(3, 5)[1]
    expected = program(cache, PLANS[name])
    compiled = torch.compile(program, fullgraph=True)
    for _ in range(2):
        for a, b in zip(compiled(cache, PLANS[name]), expected, strict=True):
            assert torch.equal(a, b)


def test_operators_keep_pytorchs_rules():
    q, k, v = tensors(4, 5)
    which = (CSLA.key, 0, 5, 0.2, 0)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.sparvar.attend.default, (q, k, v, *which), test_utils=tests)
    q3, k3, v3 = tensors(4, 3)
    choosing = (PLANS["cs4a"].key, 0, 3, 0.2, 0)
    torch.library.opcheck(torch.ops.sparvar.attend_choosing.default, (q3, k3, v3, *choosing), test_utils=tests)
    _, choice, residual = torch.ops.sparvar.attend_choosing(q3, k3, v3, *choosing)
    following = (choice, residual, PLANS["cs4a"].key, 0, 5, 0.2, 0)
    torch.library.opcheck(torch.ops.sparvar.attend_following.default, (q, k, v, *following), test_utils=tests)


def test_shapes_are_known_without_computing():
    q, k, v = (torch.empty(tensor.shape, device="meta") for tensor in tensors(5, 5))
    out = sparvar.attention(q, k, v, plan=CSLA)
    assert out.device.type == "meta" and out.shape == q.shape and out.transpose(1, 2).is_contiguous()


def test_no_memory_is_left_behind():
    """The same call again and again takes no more memory: nothing is copied and kept."""
    import resource

    q, k, v = tensors(6, 5, batch=8, heads=16)
    sparvar.attention(q, k, v, plan=CSLA)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        sparvar.attention(q, k, v, plan=CSLA)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 10 * q.numel() * 4, f"{grown} bytes more after 100 calls of {q.numel() * 4}"


def test_gradients_and_mixtures_are_refused():
    q, k, v = tensors(7, 5)
    with pytest.raises(sparvar.UsageError, match="no gradients"):
        sparvar.attention(q.requires_grad_(), k, v, plan=CSLA)
    with torch.no_grad():
        sparvar.attention(q, k, v, plan=CSLA)
    q = q.detach()
    with pytest.raises(sparvar.UsageError, match="all of one kind"):
        sparvar.attention(q, k.numpy(), v, plan=CSLA)
    with pytest.raises(sparvar.UsageError, match="k on meta"):
        sparvar.attention(q, k.to("meta"), v, plan=CSLA)
    with pytest.raises(sparvar.UsageError, match="q: expected float32 or bfloat16, found float16"):
        sparvar.attention(q.half(), k.half(), v.half(), plan=CSLA)
    with pytest.raises(sparvar.UsageError, match="of one type"):
        sparvar.attention(q, k.bfloat16(), v, plan=CSLA)


@pytest.mark.parametrize(("form", "block"), [("lists", (16, 16)), ("lists", (32, 64)), ("blocks", (16, 16))])
def test_flex_attention_with_our_block_mask(form, block):
    from torch.nn.attention.flex_attention import flex_attention

    plan = plans.csla(
        GRIDS, scales=(3, -1), windows=[-1, -1, -1, 3, 3, 5], sink_scales=2, tile=(4, 5), form=form, block=16
    )
    q, k, v = tensors(8, 5)
    lists = plan.lists(0, 5)
    mask = lists.to_block_mask(block)
    ours = sparvar.attention(q, k, v, plan=plan)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), ours, atol=3e-6, rtol=1e-5)
    back = sparvar.KeyLists.from_block_mask(mask)
    assert np.array_equal(back.mask(), lists.mask())
    torch.testing.assert_close(sparvar.attention(q, k, v, plan=back), ours, atol=3e-6, rtol=1e-5)


def test_block_masks_of_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(batch, head, query, key):
        return ((query - key) % 37 < 11) | (key < 5)

    q, k, v = tensors(9, 5)
    mask = create_block_mask(near, None, None, TOKENS[5], KEYS[5], device="cpu", BLOCK_SIZE=32)
    lists = sparvar.KeyLists.from_block_mask(mask)
    query, key = np.arange(TOKENS[5])[:, None], np.arange(KEYS[5])[None]
    assert np.array_equal(lists.mask(), ((query - key) % 37 < 11) | (key < 5))
    expected = flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(sparvar.attention(q, k, v, plan=lists), expected, atol=3e-6, rtol=1e-5)
    by_head = create_block_mask(lambda b, h, i, j: j >= h, None, 3, TOKENS[5], KEYS[5], device="cpu", BLOCK_SIZE=32)
    with pytest.raises(sparvar.UsageError, match="batch entry or head"):
        sparvar.KeyLists.from_block_mask(by_head)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    ("dtype", "channels", "bound"), [("bfloat16", 64, 0.03), ("bfloat16", 20, 0.03), ("float32", 32, 1e-4)]
)
def test_a_gpu_gives_what_the_cpu_gives(name, dtype, channels, bound):
    dtype = getattr(torch, dtype)
    expected = walk(PLANS[name], dtype=dtype, channels=channels)
    got = walk(PLANS[name], "cuda", dtype, channels=channels)
    for a, b in zip(got, expected, strict=True):
        error = (a.cpu().float() - b.float()).abs()
        # of keys that all but tie, devices may choose different ones
        assert (error.mean() if name != "csla" else error.max()) < bound


@pytest.mark.gpu
def test_a_gpu_runs_on_the_current_stream():
    q, k, v = tensors(10, 5, "cuda", torch.bfloat16, channels=64)
    expected = sparvar.attention(q, k, v, plan=CSLA)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # 0.1 s: what is enqueued elsewhere would be done long before
        late = q * 0 + torch.randn_like(q)
        got = sparvar.attention(late, k, v, plan=CSLA)
    stream.synchronize()
    assert torch.equal(got, sparvar.attention(late, k, v, plan=CSLA))
    assert not torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_a_cuda_graph_replays_it(name):
    caches = [torch.randn(2, 3, KEYS[-1], 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def run():
        state, out = sparvar.AttentionState(), []
        for scale in range(3, 6):
            first, keys = KEYS[scale] - TOKENS[scale], KEYS[scale]
            q = caches[0][:, :, first:keys].contiguous()
            parts = (q, caches[1][:, :, :keys], caches[2][:, :, :keys])
            out.append(sparvar.attention(*parts, plan=PLANS[name], state=state))
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    for cache in caches:
        cache.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(recorded, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_gpu_keeps_no_memory():
    q, k, v = tensors(11, 5, "cuda", torch.bfloat16, batch=8, heads=16, channels=64)
    for name, plan in PLANS.items():
        state = sparvar.AttentionState()
        if name == "cs4a":
            sparvar.attention(
                *tensors(11, 3, "cuda", torch.bfloat16, batch=8, heads=16, channels=64), plan=plan, state=state
            )
        sparvar.attention(q, k, v, plan=plan, state=state)
        gc.collect()  # what other tests left
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        held = torch.cuda.memory_allocated()
        for _ in range(20):
            sparvar.attention(q, k, v, plan=plan, state=state)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == held, name
        assert torch.cuda.mem_get_info()[0] >= free - (2 << 20), name


def test_which_dense_scales_are_the_kernels(monkeypatch):
    from sparvar._torch import _dense_is_ours as ours

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    q = torch.empty(2, 16, 1024, 128, dtype=torch.bfloat16)
    cache = torch.empty(2, 16, 2530, 128, dtype=torch.bfloat16)
    k = cache[:, :, :2521]
    assert ours(q, k, k)
    assert not torch.compile(ours, fullgraph=True, backend="eager")(q, k, k), "the compiler cannot ask for the GPU"
    assert not ours(q[:, :, :512].contiguous(), k[:, :, :600], k[:, :, :600]), "little to do"
    assert not ours(q.float(), k.float(), k.float())
    assert not ours(q.transpose(1, 2).contiguous().transpose(1, 2), k, k)
    assert not ours(q, k, cache[:, :, :2521].contiguous()), "caches of two capacities"
    by_rows = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert not ours(q, by_rows, by_rows), "heads are the inner axis"
    offset = torch.empty(q.numel() + 1, dtype=torch.bfloat16)[1:].view(q.shape)
    assert not ours(offset, k, k), "2 bytes beside a multiple of 16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not ours(q, k, k)


@pytest.mark.gpu
def test_large_dense_scales_on_a_gpu():
    schedule = [(side, side) for side in (1, 2, 4, 8, 16, 24, 32)]
    keys = sum(h * w for h, w in schedule)
    q = torch.randn(2, 16, 32 * 32, 128, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(2, 2, 16, keys + 7, 128, device="cuda", dtype=torch.bfloat16)
    k, v = cache[0, :, :, :keys], cache[1, :, :, :keys]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    plan = plans.dense(schedule)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)  # for PyTorch's own
    for queries in (q, strided):
        got = sparvar.attention(queries, k, v, plan=plan, scale_index=6)
        assert (got.float() - expected.float()).abs().max() < 1e-2


@pytest.mark.gpu
def test_a_gpu_compiles_too():
    torch._dynamo.reset()
    q, k, v = tensors(12, 5, "cuda", torch.bfloat16, channels=64)
    compiled = torch.compile(lambda q, k, v: sparvar.attention(q * 2, k, v, plan=CSLA), fullgraph=True)
    assert torch.equal(compiled(q, k, v), sparvar.attention(q * 2, k, v, plan=CSLA))


@pytest.mark.gpu
def test_what_a_gpu_does_not_take_is_said():
    q, k, v = tensors(13, 5, "cuda", torch.bfloat16, channels=64)
    with pytest.raises(sparvar.UsageError, match="make it contiguous"):
        sparvar.attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, plan=CSLA)
    with pytest.raises(sparvar.UsageError, match="k on cpu"):
        sparvar.attention(q, k.cpu(), v, plan=CSLA)
