#!/usr/bin/env python3
"""PyTorch's attention at the shapes of `sparvar bench attention`: one call, random numbers, bf16.

    python3 bench/peer_attention_gpu.py --heads 28 --scales 10,11,12 --repeat 5

SDPA through FlashAttention and through cuDNN (dense), and compiled FlexAttention with the masks of the presets `csla`
(what each 8x16 tile of queries reads) and `csla-blocks` (whole 128x128 blocks, as published). The masks are worked out here
from the schedule; the share of pairs is printed, and bench/gpu_tables.py refuses figures whose share is not sparvar's.
Prints one JSON object: medians after a warm-up, error against double precision on sampled rows. Whole blocks
need a compiled FlexAttention. `--device cpu --schedule 1,2,4,6,8,12 --scales 5 --heads 1` runs it anywhere.
"""
import argparse
import functools
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SCALES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
WINDOWS = (1, 1, 3, 5, 7)  # of the last key scales; none before
SINK_SCALES = 5
BLOCK = 128
TILE = (8, 16)


def centres(size, key_size):
    """Of every position of an axis on the axis of a key scale, in float32 as the authors compute it."""
    return torch.round(torch.arange(size, dtype=torch.float32) / size * key_size)


def window(schedule, scale, key_scale):
    """Does a position of one axis see one of the key scale? bool [size, key size]"""
    size, key_size = schedule[scale], schedule[key_scale]
    if key_scale < SINK_SCALES:
        return torch.ones(size, key_size, dtype=torch.bool)
    at = key_scale - (len(schedule) - len(WINDOWS))
    if at < 0:
        return torch.zeros(size, key_size, dtype=torch.bool)
    return (centres(size, key_size)[:, None] - torch.arange(key_size)).abs() <= WINDOWS[at] // 2


@functools.cache
def token_mask(schedule, scale):
    """bool [queries, keys] of CSLA; square maps in row order."""
    parts = []
    for j in range(scale + 1):
        seen = window(schedule, scale, j)
        parts.append((seen[:, None, :, None] & seen[None, :, None, :]).reshape(schedule[scale] ** 2, schedule[j] ** 2))
    return torch.cat(parts, 1)


def tile_of(side):
    """The tile that each query lies in, int64 [queries]."""
    y, x = torch.arange(side * side) // side, torch.arange(side * side) % side
    return y // TILE[0] * -(-side // TILE[1]) + x // TILE[1]


def tile_mask(mask, side):
    """bool [tiles, keys]: what any query of the tile sees."""
    tiles = tile_of(side)
    seen = torch.zeros(int(tiles.max()) + 1, mask.shape[1], dtype=torch.int32)
    return seen.index_add_(0, tiles, mask.int()) > 0


def block_mask(mask):
    """bool [blocks of queries, blocks of keys]: blocks with any visible pair."""
    rows, columns = -(-mask.shape[0] // BLOCK), -(-mask.shape[1] // BLOCK)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.bool)
    padded[:mask.shape[0], :mask.shape[1]] = mask
    return padded.view(rows, BLOCK, columns, BLOCK).any(3).any(1)


def whole_blocks(blocks, queries, keys, device):
    """A BlockMask that computes its blocks whole: full blocks, no partial ones."""
    count = blocks.sum(1).int()[None, None]
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True).int()[None, None]
    none = torch.zeros_like(count)
    return BlockMask.from_kv_blocks(none.to(device), torch.zeros_like(order).to(device), count.to(device), order.to(device),
                                    BLOCK_SIZE=BLOCK, seq_lengths=(queries, keys))


def spread(blocks, queries, keys):
    """bool [queries, keys] of whole blocks."""
    return blocks.repeat_interleave(BLOCK, 0)[:queries].repeat_interleave(BLOCK, 1)[:, :keys]


def relative_error(out, q, k, v, mask):
    """|out - exact| / |exact| over rows of some heads; exact: double precision of the same numbers."""
    heads = q.shape[0] * q.shape[1]
    wrong = size = 0.0
    rows = torch.arange(0, q.shape[2], max(q.shape[2] // 8, 1))
    for head in range(0, heads, max(heads // 4, 1)):
        b, h = divmod(head, q.shape[1])
        logits = q[b, h, rows].double() @ k[b, h].double().T
        if mask is not None:
            logits = logits.masked_fill(~mask[rows].to(logits.device), float("-inf"))
        exact = logits.softmax(-1) @ v[b, h].double()
        wrong += float((out[b, h, rows].double() - exact).square().sum())
        size += float(exact.square().sum())
    return (wrong / size) ** 0.5


def seconds_of(call, repeat, device):
    """Median seconds of a call; a sample on a GPU is some 5 ms of calls."""
    if device == "cpu":
        call()
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def sample(calls):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3 / calls

    sample(2)
    calls = min(max(int(5e-3 / sample(2)), 1), 50)
    return statistics.median(sample(calls) for _ in range(repeat))


class Shape:
    """Inputs of one scale; measures kernels on them."""

    def __init__(self, options, schedule, heads, scale):
        self.options, self.schedule, self.heads, self.scale, self.side = options, schedule, heads, scale, schedule[scale]
        self.queries, self.keys = self.side ** 2, sum(s * s for s in schedule[:scale + 1])
        torch.manual_seed(scale)
        make = functools.partial(torch.randn, dtype=torch.bfloat16, device=options.device)
        self.q = make(options.batch, heads, self.queries, options.dim)
        self.k = make(options.batch, heads, self.keys, options.dim) * 0.1
        self.v = make(options.batch, heads, self.keys, options.dim)

    def row(self, kernel, same_as, call, mask):
        share = 1.0 if mask is None else float(mask.float().mean())
        seconds = seconds_of(call, self.options.repeat, self.options.device)
        flops = 4.0 * self.options.batch * self.heads * self.options.dim * self.queries * self.keys * share
        return {"kernel": kernel, "same_as": same_as, "heads": self.heads, "scale": self.scale, "queries": self.queries, "keys": self.keys,
                "ms": seconds * 1e3, "pairs_percent": 100 * share, "tflops": flops / seconds * 1e-12,
                "error": relative_error(call(), self.q, self.k, self.v, mask)}

    def dense(self, name, backend):
        with sdpa_kernel(backend):
            return self.row(name, "dense", lambda: F.scaled_dot_product_attention(self.q, self.k, self.v, scale=1.0), None)

    def flex(self, compiled, preset):
        device, tokens = self.options.device, token_mask(self.schedule, self.scale)
        torch.compiler.reset()  # or it stops compiling after some shapes
        if preset == "csla-blocks":
            blocks = block_mask(tokens)
            mask, made = spread(blocks, self.queries, self.keys), whole_blocks(blocks, self.queries, self.keys, device)
        else:
            seen, tiles = tile_mask(tokens, self.side), tile_of(self.side)
            mask, here, at = seen[tiles], seen.to(device), tiles.to(device)
            made = create_block_mask(lambda b, h, q, kv: here[at[q], kv], None, None, self.queries, self.keys, device=device)
        return self.row("FlexAttention", preset, lambda: compiled(self.q, self.k, self.v, block_mask=made, scale=1.0), mask)


def kernels(options):
    """(name, scale, heads, measure): dense ones first, those that are compiled last, the largest scale first."""
    schedule = tuple(int(s) for s in options.schedule.split(",")) if options.schedule else SCALES
    shapes = [(int(h), int(s)) for h in options.heads.split(",") for s in options.scales.split(",")]
    backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    if options.device == "cpu":
        del backends["SDPA cuDNN"]
    for heads, scale in shapes:
        for name, backend in backends.items():
            yield name, scale, heads, lambda: Shape(options, schedule, heads, scale).dense(name, backend)
    compiled = flex_attention if options.eager else torch.compile(flex_attention, dynamic=False)
    for heads, scale in sorted(shapes, key=lambda shape: -shape[1]):
        for preset in ("csla-blocks", "csla"):
            yield f"FlexAttention, {preset}", scale, heads, lambda: Shape(options, schedule, heads, scale).flex(compiled, preset)


def measured(options):
    """What this PyTorch has no kernel for, and what comes too late, is left out with a line on standard error."""
    started, rows = time.monotonic(), []
    for name, scale, heads, measure in kernels(options):
        if time.monotonic() - started > options.seconds:
            why = f"not begun after {options.seconds:.0f} s"
        else:
            try:
                rows.append(measure())
                continue
            except RuntimeError as error:  # also what the compiler throws
                why = str(error).splitlines()[0]
        print(f"{name}, {heads} heads, scale {scale}: left out: {why}", file=sys.stderr)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="28,16", help="one number or a list (28,16)")
    parser.add_argument("--dim", type=int, default=128, help="channels of a head (128)")
    parser.add_argument("--batch", type=int, default=2, help="pictures and their unconditional halves (2)")
    parser.add_argument("--scales", default="10,11,12", help="counted from 0 (10,11,12)")
    parser.add_argument("--schedule", default="", help="sides of the scales (those of 1024x1024 pictures)")
    parser.add_argument("--repeat", type=int, default=5, help="samples, of which the median counts (5)")
    parser.add_argument("--seconds", type=float, default=25, help="no kernel is begun after these (25)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--eager", action="store_true", help="FlexAttention without compiling: no time, and blocks are not whole")
    options = parser.parse_args()
    with torch.inference_mode():
        rows = measured(options)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(json.dumps({"torch": torch.__version__, "device": name, "batch": options.batch, "dim": options.dim, "repeat": options.repeat, "rows": rows}))


if __name__ == "__main__":
    main()
