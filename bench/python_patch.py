#!/usr/bin/env python3
"""What sparvar.patch is worth: a whole picture of a model that runs as upstream's Infinity does, eager PyTorch with
random weights, as it is (SDPA) and patched with attention plans, in turn.

    PYTHONPATH=build/cuda/python python3 bench/python_patch.py --geometry infinity-8b --attention dense,csla,sparvar

The model is python/tests/upstream_like.py: blocks in bf16, the rest in f32, under bf16 autocast, guidance. One picture
of 1024 x 1024; the text's states are given. Upstream's gc.collect() and torch.cuda.empty_cache() before every block are
left out, for both. Medians after a warm-up; how many times as fast: the median of the turns' ratios, as the host's
times come and go; peak memory is PyTorch's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "tests"))

from gpu_tables import patched_rows
from peer_pytorch_gpu import GEOMETRIES, SCALES, TEXT_CHANNELS, decoder

import sparvar
from upstream_like import InfinityLike

TINY = (2, 64, 2, 16, False, (1, 1))  # to see that all of it runs
TINY_SCALES = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16]


class Drawing:
    """One model, and how long each part of a picture takes."""

    def __init__(self, options: argparse.Namespace) -> None:
        tiny = options.geometry == "tiny"
        depth, width, heads, codes, self.patchify, mult = TINY if tiny else GEOMETRIES[options.geometry]
        sides = TINY_SCALES if tiny else SCALES
        self.device, self.backends = torch.device(options.device), options.sdpa
        bits = codes * (4 if self.patchify else 1)
        with self.device:
            self.model = InfinityLike(
                depth, width, heads, bits, TEXT_CHANNELS, [(side, side) for side in sides], chunks=1 if tiny else 4
            ).eval()
            self.decoder = (decoder(codes, mult, 32, 0) if tiny else decoder(codes, mult)).eval()
            self.text = torch.randn(options.text_tokens, TEXT_CHANNELS) * 0.3
        if self.device.type == "cuda":  # the CPU's autocast does not take norms of bf16
            for block in self.model.all_blocks():
                block.bfloat16()

    def moment(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @torch.no_grad()
    def draw(self) -> dict[str, object]:
        """Seconds of the whole, of every scale and of the decoder; peak bytes (0 on the CPU)."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        moments: list[torch.cuda.Event | float] = []
        only = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.backends == "flash" else contextlib.nullcontext()
        started = time.perf_counter()
        with only, torch.autocast(self.device.type, torch.bfloat16):
            summed, _ = self.model.draw([self.text], on_scale=lambda _: moments.append(self.moment()), keep=False)
            moments.append(self.moment())
            picture = self.decoder(functional.pixel_shuffle(summed, 2) if self.patchify else summed)
            picture = picture.clamp(-1, 1).add(1).mul(127.5).to(torch.uint8)
            moments.append(self.moment())
        picture.cpu()
        total = time.perf_counter() - started
        parts = [a.elapsed_time(b) * 1e-3 if on_gpu else b - a for a, b in pairwise(moments)]
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return {"seconds": total, "scales": parts[:-1], "decode": parts[-1], "peak_bytes": peak}


def measure(drawing: Drawing, names: list[str], repeat: int) -> list[dict[str, object]]:
    """Of the model as it is ("unpatched") and of every plan: the run of the median, and all totals."""
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in ["unpatched", *names]}
    for turn in range(repeat + 1):
        for name, of in runs.items():
            if name != "unpatched":
                sparvar.patch(drawing.model, name)
            run = drawing.draw()
            if name != "unpatched":
                sparvar.unpatch(drawing.model)
            if turn:  # the first one warms up
                of.append(run)
    rows = []
    for name, of in runs.items():
        totals = [run["seconds"] for run in of]
        middle = min(of, key=lambda run: abs(run["seconds"] - statistics.median(totals)))
        rows.append({**middle, "attention": name, "seconds": statistics.median(totals), "all_seconds": totals})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=[*GEOMETRIES, "tiny"], required=True)
    parser.add_argument("--attention", default="dense,csla,sparvar", help="presets or *.json, with commas")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sdpa", choices=["flash", "auto"], default="auto", help="which of PyTorch's kernels")
    parser.add_argument("--text-tokens", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="one object on standard output, in place of the table")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat: at least 1")
    torch.manual_seed(0)
    rows = measure(Drawing(options), options.attention.split(","), options.repeat)
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else None
    about = {"geometry": options.geometry, "sdpa": options.sdpa, "torch": torch.__version__, "gpu": gpu}
    report = {**about, "repeat": options.repeat, "rows": rows}
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{options.geometry}, {gpu or 'CPU'}, PyTorch {torch.__version__}, SDPA {options.sdpa}\n")
        patched_rows([report])


if __name__ == "__main__":
    main()
