#!/usr/bin/env python3
"""What a call of sparvar.attention on torch tensors takes beside the same kernel in the program's own bench, on one
machine in one run.

    PYTHONPATH=build/cuda/python python3 bench/python_attention.py --program build/cuda/apps/cli/sparvar

Rows: a plan at a scale of a geometry, batch 2, bf16. Program: `sparvar bench attention`, before and after PyTorch's
calls, the mean of both medians. On a GPU a call is the time on the stream, of a few calls that were enqueued while the GPU
was waiting, and of the same calls in a CUDA graph: few, as the program measures few, since a GPU that has been busy for
some milliseconds lowers its clock. paced: of calls that find the stream empty at first, so that Python may give the pace;
host: until a call returns to Python, nothing waited for. What a call costs PyTorch on that machine is said by an addition
of one number. Memory: the most that PyTorch's allocator holds in a call above its tensors and its output: the engine's
working memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import torch
from gpu_tables import call_rows
from peer_attention_gpu import seconds_of
from peer_pytorch_gpu import GEOMETRIES, SCALES

import sparvar

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 2
CALLS = 4  # on the stream, after a wait
SAMPLES = 15


def host_seconds(call: Callable[[], object], repeat: int, on_gpu: bool) -> float:
    """Until the call returns, the stream being empty before it."""
    times = []
    for _ in range(repeat):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def waiting_seconds(work: Callable[[], object]) -> float:
    """Of `work` on the stream, the GPU waiting until the host has enqueued all of it. Median."""
    cycles = 20_000_000
    times: list[float] = []
    while len(times) < SAMPLES:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        start.record()
        work()
        stop.record()
        late = start.query()  # the GPU has come so far already
        stop.synchronize()
        if late:
            cycles *= 2
        else:
            times.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(times)


def stream_seconds(call: Callable[[], object]) -> float:
    return waiting_seconds(lambda: [call() for _ in range(CALLS)]) / CALLS


def graph_seconds(call: Callable[[], object]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return waiting_seconds(graph.replay) / CALLS


def program_seconds(options: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Of the program: (plan, scale) -> seconds, lists chosen in it where the plan chooses."""
    run = subprocess.run(
        [options.program, "bench", "attention", "--device", options.device, "--geometry", options.geometry, "--scale",
         options.scales, "--attention", options.attention, "--batch", str(BATCH), "-r", str(options.repeat), "--json",
         "--quiet"],
        stdout=subprocess.PIPE, check=False,
    )  # fmt: skip
    if run.returncode:
        sys.exit(run.returncode)
    return {(row["attention"], row["scale"]): row["ms"] * 1e-3 for row in json.loads(run.stdout)["rows"]}


def measure(options: argparse.Namespace, name: str, scale: int) -> dict[str, object]:
    """Of PyTorch's calls."""
    device, repeat = torch.device(options.device), options.repeat
    on_gpu = device.type == "cuda"
    _, width, heads, *_ = GEOMETRIES[options.geometry]
    channels = width // heads
    plan = sparvar.plans.preset(name, [(side, side) for side in SCALES])
    state = sparvar.AttentionState()
    torch.manual_seed(0)

    def tensors(at: int) -> list[torch.Tensor]:
        tokens = [side * side for side in SCALES[: at + 1]]
        shapes = [(tokens[-1], 1.0), (sum(tokens), 0.1), (sum(tokens), 1.0)]
        return [(torch.randn(BATCH, heads, n, channels, device=device) * size).bfloat16() for n, size in shapes]

    decision = min((rule.decision_scale for rule in plan.rules if rule.decision_scale is not None), default=scale)
    if decision < scale:
        sparvar.attention(*tensors(decision), plan=plan, scale=1.0, state=state)
    q, k, v = tensors(scale)

    def call() -> torch.Tensor:
        return sparvar.attention(q, k, v, plan=plan, scale_index=scale, scale=1.0, state=state)

    call()
    row: dict[str, object] = {
        "attention": name, "scale": scale, "queries": q.shape[2], "keys": k.shape[2],
        "seconds": stream_seconds(call) if on_gpu else seconds_of(call, repeat, options.device),
        "graph_seconds": graph_seconds(call) if on_gpu else None,
        "paced_seconds": seconds_of(call, repeat, options.device) if on_gpu else None,
        "host_seconds": host_seconds(call, repeat, on_gpu), "bytes_beside": None,
    }  # fmt: skip
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = call()
        torch.cuda.synchronize()
        row["bytes_beside"] = torch.cuda.max_memory_allocated() - before - out.nbytes
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="infinity-8b")
    parser.add_argument("--attention", default="csla,csla-blocks,cs4a,probe,sparvar", help="presets, with commas")
    parser.add_argument("--scales", default="10,11,12")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one object on standard output, in place of the table")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat: at least 1")
    before = program_seconds(options)
    rows = [
        measure(options, name, int(scale)) for scale in options.scales.split(",") for name in options.attention.split(",")
    ]
    after = program_seconds(options)
    one = torch.zeros(1, device=options.device)
    addition = seconds_of(lambda: one + one, options.repeat, options.device)
    for row in rows:
        key = row["attention"], row["scale"]
        row["program_seconds"] = (before[key] + after[key]) / 2
    if options.json:
        about = {"geometry": options.geometry, "torch": torch.__version__, "repeat": options.repeat, "batch": BATCH}
        print(json.dumps({**about, "addition_seconds": addition, "rows": rows}))
    else:
        call_rows(rows, addition)


if __name__ == "__main__":
    main()
