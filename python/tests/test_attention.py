"""The kernels on numpy arrays, against attention written out in double precision."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import sparvar
from conftest import GRIDS, KEYS, TOKENS, arrays, probabilities, reference
from sparvar import plans

CSLA = plans.csla(GRIDS, scales=(3, -1), windows=[-1, -1, -1, 3, 3, 5], sink_scales=2, tile=(4, 5))


@pytest.mark.parametrize("scale", [0, 2, 4, 5])
def test_csla_is_attention_over_its_lists(scale):
    q, k, v = arrays(1, scale)
    out = sparvar.attention(q, k, v, plan=CSLA)
    expected = reference(q, k, v, CSLA.lists(0, scale).mask())
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert out.dtype == np.float32 and out.shape == q.shape


def test_the_scale_of_the_logits_is_the_callers():
    q, k, v = arrays(2, 5)
    out = sparvar.attention(q, k, v, plan=plans.dense(GRIDS), scale=0.5)
    np.testing.assert_allclose(out, reference(q * np.float32(0.5 * np.sqrt(32)), k, v), atol=3e-6)


def test_strides_of_any_kind_without_a_copy():
    q, k, v = arrays(3, 5)
    expected = sparvar.attention(q, k, v, plan=CSLA)

    def rows_apart(x):
        """The same numbers in memory as [B, n, H, D + 3]."""
        batch, heads, tokens, channels = x.shape
        memory = np.zeros((batch, tokens, heads, channels + 3), np.float32)
        memory[..., :channels] = x.transpose(0, 2, 1, 3)
        return memory[..., :channels].transpose(0, 2, 1, 3)

    out = np.empty((2, 3, TOKENS[5], 64), np.float32)[..., 5:37]
    got = sparvar.attention(rows_apart(q), rows_apart(k), rows_apart(v), plan=CSLA, out=out)
    assert got is out
    assert np.array_equal(out, expected)
    one_head = np.broadcast_to(k[:, :1], k.shape)  # stride 0: shared by all heads
    shared = sparvar.attention(q, one_head, np.broadcast_to(v[:, :1], v.shape), plan=CSLA)
    mask = CSLA.lists(0, 5).mask()
    np.testing.assert_allclose(shared, reference(q, one_head, np.broadcast_to(v[:, :1], v.shape), mask), atol=2e-6)


def test_read_only_arrays_are_read():
    q, k, v = arrays(4, 5)
    expected = sparvar.attention(q, k, v, plan=CSLA)
    for array in (q, k, v):
        array.flags.writeable = False
    assert np.array_equal(sparvar.attention(q, k, v, plan=CSLA), expected)


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    words = [array.astype(ml_dtypes.bfloat16) for array in arrays(5, 5)]
    wide = [array.astype(np.float32) for array in words]
    mask = CSLA.lists(0, 5).mask()
    out = sparvar.attention(*words, plan=CSLA)
    assert out.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), reference(*wide, mask), atol=0.02)
    state = sparvar.AttentionState()
    plan = plans.cs4a(GRIDS, decision_scale=5, share=1.0)
    near = sparvar.attention(*words, plan=plan, state=state)
    np.testing.assert_allclose(near.astype(np.float32), reference(*wide), atol=0.02)


def walk(plan, seed, state, batch_of=lambda scale: 2):
    """The outputs of all scales with one cache of keys."""
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((2, 3, KEYS[-1], 32)).astype(np.float32) for _ in range(3))
    out = []
    for scale in range(len(GRIDS)):
        b, first = batch_of(scale), KEYS[scale] - TOKENS[scale]
        own = np.ascontiguousarray(q[:b, :, first : KEYS[scale]])
        parts = (own, k[:b, :, : KEYS[scale]], v[:b, :, : KEYS[scale]])
        out.append((parts, sparvar.attention(*parts, plan=plan, layer=1, state=state)))
    return out


def test_cs4a_is_its_definition():
    """One group a scale: the keys with the largest column sums at scale 3 are all that scales 4 and 5 read."""
    plan = plans.cs4a(
        GRIDS, decision_scale=3, share=0.3, tile=(64, 64), own_windows=(0,), residual=False, name="one group"
    )
    steps = walk(plan, 6, sparvar.AttentionState())
    (q, k, _), _ = steps[3]
    kept = round(0.3 * KEYS[3])
    chosen = np.argsort(-probabilities(q, k).sum(2), axis=-1, kind="stable")[..., :kept]  # (B, H, kept)
    for scale, ((q, k, v), out) in enumerate(steps):
        expected = reference(q, k, v)
        if scale > 3:
            for b in range(2):
                for h in range(3):
                    at = chosen[b, h]
                    expected[b, h] = reference(q[b, h], k[b, h, at], v[b, h, at])
        np.testing.assert_allclose(out, expected, atol=3e-6, err_msg=f"scale {scale}")


def test_cs4a_residual_is_dense_minus_sparse_resized():
    """With a decision scale's own grid again (no scale above is larger), the residual restores dense attention."""
    grids = (*GRIDS[:4], (7, 6))
    plan = plans.cs4a(grids, decision_scale=3, share=0.2, tile=(3, 3), own_windows=(0,))
    random = np.random.default_rng(7)
    q = random.standard_normal((1, 2, 42, 16)).astype(np.float32)
    k = random.standard_normal((1, 2, KEYS[3] + 42, 16)).astype(np.float32)
    v = random.standard_normal(k.shape).astype(np.float32)
    state = sparvar.AttentionState()
    dense = sparvar.attention(q, k[:, :, : KEYS[3]], v[:, :, : KEYS[3]], plan=plan, scale_index=3, state=state)
    again = sparvar.attention(q, k, v, plan=plan, scale_index=4, state=state)
    # the same queries, the same chosen keys, and the difference to dense, resized from 7x6 to 7x6
    np.testing.assert_allclose(again, dense, atol=3e-6)
    choice, residual = state.layers[0]
    assert choice.shape == (2, 6, round(0.2 * KEYS[3])) and choice.dtype == np.int32
    assert residual.shape == (1, 42, 2, 16)


def test_guidance_may_end_on_the_way():
    plan = plans.cs4a(GRIDS, decision_scale=3, share=0.3, tile=(3, 3))
    both = walk(plan, 8, sparvar.AttentionState())
    ended = walk(plan, 8, sparvar.AttentionState(), batch_of=lambda scale: 2 if scale < 5 else 1)
    assert np.array_equal(ended[5][1], both[5][1][:1])


def test_probe_with_all_keys_is_dense():
    q, k, v = arrays(9, 5)
    near = sparvar.attention(q, k, v, plan=plans.probe(GRIDS, scales=(5, -1), stride=3, share=1.0, tile=(4, 4)))
    np.testing.assert_allclose(near, reference(q, k, v), atol=3e-6)
    few = sparvar.attention(
        q, k, v, plan=plans.probe(GRIDS, scales=(5, -1), stride=3, share=0.1, tile=(4, 4), window=3)
    )
    assert np.abs(few - reference(q, k, v)).max() > 0.01


def test_lists_of_ones_own():
    q, k, v = arrays(10, 5)
    bsr = CSLA.lists(0, 5).to_bsr((16, 16))
    lists = sparvar.KeyLists.from_bsr(bsr.indptr, bsr.indices, bsr.shape, bsr.block)
    np.testing.assert_allclose(sparvar.attention(q, k, v, plan=lists), reference(q, k, v, lists.mask()), atol=2e-6)


def test_many_threads_at_once():
    q, k, v = arrays(11, 5)
    expected = sparvar.attention(q, k, v, plan=CSLA)
    results = [None] * 6

    def run(i):
        results[i] = sparvar.attention(q, k, v, plan=CSLA, threads=1)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_wrong_arguments_are_refused_by_name():
    q, k, v = arrays(12, 5)
    attend = sparvar.attention
    refused = [
        (lambda: attend(q[0], k, v, plan=CSLA), "q: expected 4 dimensions"),
        (lambda: attend(q, k[:, :, :-1], v, plan=CSLA), "no scale of the plan's schedule has 156 queries and 323 keys"),
        (lambda: attend(q, k[:, :, :-1], v, plan=CSLA, scale_index=5), r"k: expected \(2, 3, 324, 32\), found"),
        (lambda: attend(q, k, v[:, :2], plan=CSLA), r"v: expected \(2, 3, 324, 32\), found \(2, 2, 324, 32\)"),
        (lambda: attend(q, k, v[..., :16], plan=CSLA), "v: expected"),
        (lambda: attend(q, k, v.astype(np.float64), plan=CSLA), "v is float64"),
        (lambda: attend(*(x.astype(np.float16) for x in (q, k, v)), plan=CSLA), "q: expected float32 or bfloat16"),
        (lambda: attend(q.swapaxes(2, 3).copy().swapaxes(2, 3), k, v, plan=CSLA), "next to each other"),
        (lambda: attend([1], k, v, plan=CSLA), "q is list"),
        (lambda: attend(q, k, v, plan="csla"), "plan: expected a plan"),
        (lambda: attend(q, k, v, plan=CSLA, scale=0.0), "other than 0"),
        (lambda: attend(q, k, v, plan=CSLA, scale_index=9), "scale 9"),
        (lambda: attend(q, k, v, plan=plans.preset("fastvar", [*range(1, 12), (9, 11), (12, 13)])), "156 queries"),
        (lambda: attend(q, k, v, plan=plans.csla()), "plan.bind"),
        (lambda: attend(q, k, v, plan=CSLA, out=np.empty_like(q)[:1]), "out: expected"),
    ]
    for call, message in refused:
        with pytest.raises(sparvar.UsageError, match=message):
            call()


def test_cs4a_needs_its_state_and_its_order():
    plan = plans.cs4a(GRIDS, decision_scale=4, share=0.3)
    q, k, v = arrays(13, 5)
    with pytest.raises(sparvar.UsageError, match=r"pass state=sparvar.AttentionState"):
        sparvar.attention(q, k, v, plan=plan)
    with pytest.raises(sparvar.UsageError, match="scales must come in order"):
        sparvar.attention(q, k, v, plan=plan, state=sparvar.AttentionState())
    state = sparvar.AttentionState()
    sparvar.attention(*arrays(13, 4), plan=plan, state=state)
    choice, residual = state.layers[0]
    state.layers[0] = (np.full_like(choice, KEYS[4]), residual)
    with pytest.raises(sparvar.UsageError, match="a carried key"):
        sparvar.attention(q, k, v, plan=plan, state=state)
    state.layers[0] = (choice[:, :1], residual)
    with pytest.raises(sparvar.UsageError, match=r"contiguous|does not belong"):
        sparvar.attention(q, k, v, plan=plan, state=state)
    with pytest.raises(sparvar.UsageError, match="make it contiguous"):
        sparvar.attention(q[:, :, ::-1], k, v, plan=plan, state=state)


def test_plans_that_prune_are_the_pipelines():
    plan = plans.from_json({"rules": [], "pruning": {"first_scale": 4}}, GRIDS)
    q, k, v = arrays(14, 5)
    with pytest.raises(sparvar.UsageError, match="prunes"):
        sparvar.attention(q, k, v, plan=plan)
