#!/usr/bin/env python3
"""Puts the tables of what bench/gpu.sh measured into its part of docs/benchmarks.md: gpu_tables.py FOLDER DOCUMENT."""
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tables import header, load, put_part, row


def commit():
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def gib(count):
    return f"{count / 2**30:.1f}"


def times(scales):
    later = [f"{1e3 * s:.1f}" for s in scales[9:]]
    return [f"{1e3 * sum(scales[:9]):.1f}", *later, *[""] * (4 - len(later))]


def pictures(folder):
    print("\n### One 1024x1024 picture with guidance, random weights, bf16 but where it says fp8, without the text encoder\n")
    print("Milliseconds; share: the time that the linear layers alone need at the rate of a large product (8192^3) in the same process.\n")
    header("", "total", "scales 0-8", "9", "10", "11", "12", "decode", "peak GiB", "linear layers' share", "against PyTorch")
    for size, name in (("8b", "Infinity-8B"), ("2b", "Infinity-2B"), ("125m", "Infinity-125M")):
        peer = None
        if (folder / f"peer-{size}.json").exists():
            peer = load(folder, f"peer-{size}")
            row(f"{name}, PyTorch", f"{1e3 * peer['total_seconds']:.0f}", *times(peer["scale_seconds"]), f"{1e3 * peer['decode_seconds']:.1f}",
                gib(peer["peak_bytes"]), "", "1.0x")
        for kind in ("", "-products", "-csla", "-published", "-sparvar", "-csla-fp8", "-sparvar-fp8", "-dense-skip", "-sparvar-skip"):
            if not (folder / f"{size}{kind}.json").exists():
                continue
            own = load(folder, f"{size}{kind}")
            how = ", fp8" if own.get("weights") == "fp8" else ""
            if kind == "-products":
                how += ", the fastest products (SPARVAR_PRODUCTS)"
            if kind.endswith("-skip"):
                how += ", the last two scales left out"
            row(f"{name}, {own['attention']}{how}", f"**{1e3 * own['total_seconds']:.0f}**", *times([s["seconds"] for s in own["scales"]]),
                f"{1e3 * own['decode_seconds']:.1f}", gib(own["device_bytes"]),
                f"{100 * own['share_of_product_rate']:.0f} % of {own['product_tflops']:.0f} TFLOP/s",
                f"{peer['total_seconds'] / own['total_seconds']:.2f}x" if peer else "")


def small(folder):
    own = load(folder, "emoji")
    starts = [int(line) * 1e-9 for line in (folder / "start-nanoseconds.txt").read_text().split()][1:]
    print("\n### The bundled model's geometry, one 512x512 picture\n")
    print(f"{1e3 * own['total_seconds']:.1f} ms a picture (scales {1e3 * sum(s['seconds'] for s in own['scales']):.1f}, decode {1e3 * own['decode_seconds']:.1f}), "
          f"{own['device_bytes'] / 2**20:.0f} MiB. From the start of the process to the first written picture: {statistics.median(starts):.2f} s "
          f"(median of {len(starts)}, files in the page cache).")


def batches(folder):
    print("\n### Infinity-2B, several pictures at once\n")
    header("pictures", "total ms", "ms a picture", "peak GiB")
    for batch in (1, 2, 4, 8):
        own = load(folder, f"2b-batch-{batch}")
        row(batch, f"{1e3 * own['total_seconds']:.0f}", f"{1e3 * own['total_seconds'] / batch:.0f}", gib(own["device_bytes"]))


def kernels(folder):
    all_rows = load(folder, "kernels")
    rate = all_rows["product_tflops"]
    print(f"\n### Kernels beside cuDNN {all_rows['cudnn']}\n")
    print(f"Share: of {rate:.0f} TFLOP/s, a product of 8192^3 in the same process. The engine takes cuDNN for large convolutions, and its own kernel for dense attention, in the tiles of queries that it deems best.\n")
    header("", "own us", "own TFLOP/s", "share", "cuDNN us", "cuDNN TFLOP/s")
    for r in all_rows["convolutions"]:
        row(r["layer"], f"{r['own_us']:.0f}", f"{r['own_tflops']:.0f}", f"{100 * r['own_share']:.0f} %",
            f"{r.get('cudnn_us', float('nan')):.0f}", f"{r.get('cudnn_tflops', float('nan')):.0f}")
    print()
    header("", "own us", "own TFLOP/s", "share", "tiles of 64", "of 128", "of 192", "cuDNN us", "cuDNN TFLOP/s", "against cuDNN")
    for r in all_rows["attention"]:
        row(r["attention"], f"{r['own_us']:.1f}", f"{r['own_tflops']:.0f}", f"{100 * r['own_share']:.0f} %",
            *[f"{r[f'tiles_of_{tile}_us']:.1f}" for tile in (64, 128, 192)],
            f"{r['cudnn_us']:.1f}", f"{r['cudnn_tflops']:.0f}", f"{r['cudnn_over_own']:.2f}x")
    print("\n### Attention of tiles to lists of keys, against dense attention\n")
    print("csla: exact lists of 8x16 tiles; csla-blocks: the published 128x128 blocks; others: so many keys drawn for each head and tile.\n")
    header("", "pairs computed", "us", "TFLOP/s", "share", "sm_80 kernel us", "dense us", "speed-up")
    for r in all_rows["lists"]:
        row(r["lists"], f"{100 * r['share_of_pairs']:.1f} %", f"{r['own_us']:.0f}", f"{r['own_tflops']:.0f}", f"{100 * r['own_tflops'] / rate:.0f} %",
            f"{r['sm80_us']:.0f}", f"{r['dense_us']:.0f}", f"{r['dense_over_own']:.1f}x")
    print("\n### CS4A's decision: dense attention with statistics, column sums, choice of keys\n")
    header("", "groups", "us", "dense us", "column sums us")
    for r in all_rows["decisions"]:
        row(r["decision"], str(r["groups"]), f"{r['own_us']:.0f}", f"{r['dense_us']:.0f}", f"{r['column_sums_us']:.0f}")
    print("\n### Residual, gate and LayerNorm in one kernel, 3584 channels\n")
    header("rows", "us", "GB/s")
    for r in all_rows["norms"]:
        row(r["norm"].split()[0], f"{r['own_us']:.1f}", f"{r['own_gb_s']:.0f}")
    if "fp8" not in all_rows:
        return
    print("\n### Linear layers of Infinity-8B, bf16 and fp8 (e4m3), weights read from memory every time\n")
    header("rows x in -> out", "bf16 us", "fp8 us", "bf16 TFLOP/s", "fp8 TFLOP/s", "fp8 weights GB/s", "speed-up")
    for r in all_rows["fp8"]:
        row(r["layer"], f"{r['bf16_us']:.1f}", f"{r['fp8_us']:.1f}", f"{r['bf16_tflops']:.0f}", f"{r['fp8_tflops']:.0f}",
            f"{r['fp8_weights_gb_s']:.0f}", f"{r['bf16_us'] / r['fp8_us']:.2f}x")
    print("\n### Rows to e4m3\n")
    header("rows x channels", "us", "GB/s")
    for r in all_rows["quantise"]:
        row(r["quantise"], f"{r['own_us']:.1f}", f"{r['own_gb_s']:.0f}")


class Peers:
    """PyTorch's kernels at one shape of sparvar's table; `best`: of the machine, measured with sparvar's rows."""

    def __init__(self, report, heads, own):
        self.best, self.report = own[0], report
        self.rows = [r for r in report["rows"] if r["heads"] == heads and r["scale"] == own[0]["scale"]]
        shares = {r["attention"]: r["pairs_percent"] for r in own}
        for r in self.rows:
            if abs(r["pairs_percent"] - shares.get(r["same_as"], r["pairs_percent"])) > 0.01:
                sys.exit(f"{r['kernel']}, scale {r['scale']}: computes {r['pairs_percent']:.2f} % of the pairs, {r['same_as']} {shares[r['same_as']]:.2f} %")

    def gb(self, r):
        return 4e-9 * self.report["batch"] * r["heads"] * self.report["dim"] * (r["queries"] + r["keys"])

    def floor_ms(self, r):
        flops = r["tflops"] * r["ms"]  # 1e9
        return max(flops / self.best["product_tflops"], 1e3 * self.gb(r) / self.best["copy_gb_s"])

    def faster(self, kernel, ms, same_as="dense"):
        found = [r["ms"] for r in self.rows if r["kernel"] == kernel and r["same_as"] == same_as]
        return f"{found[0] / ms:.1f}x" if found else ""

    def ratios(self, plan, ms):
        return self.faster("SDPA flash", ms), self.faster("SDPA cuDNN", ms), self.faster("FlexAttention", ms, plan)

    def print(self):
        for r in self.rows:
            name = r["kernel"] + ("" if r["same_as"] == "dense" else f", {r['same_as']}")
            row(name, f"{r['pairs_percent']:.1f} %", f"{r['ms']:.3f}", f"{r['tflops']:.0f}", f"{1e3 * self.gb(r) / r['ms']:.0f}",
                f"{100 * self.floor_ms(r) / r['ms']:.0f} %", f"{r['error']:.1e}", *self.ratios(r["same_as"], r["ms"]))


def attention_row(r, peers):
    """Two rows where choosing keys comes on top of attention to them."""
    plan = Path(r["attention"]).stem
    whole = (f"{r['pairs_percent']:.1f} %", f"**{r['ms']:.3f}**", f"{r['gflops'] * 1e-3:.0f}", f"{r['gb_s']:.0f}", f"{r['percent_of_floor']:.0f} %")
    if r["kernel_ms"] is None:
        row(f"{plan}, deciding", *whole, "", *peers.ratios(plan, r["ms"]))
    elif plan.startswith(("dense", "csla")):
        row(plan, *whole, f"{r['kernel_error']:.1e}", *peers.ratios(plan, r["ms"]))
    else:
        row(f"{plan}, {r['kernel_keys']:.0f} keys: attention to the lists", f"{100 * r['kernel_keys'] / r['keys']:.1f} %", f"**{r['kernel_ms']:.3f}**",
            f"{r['kernel_gflops'] * 1e-3:.0f}", f"{r['gb_s'] * r['ms'] / r['kernel_ms']:.0f}", f"{r['kernel_percent_of_floor']:.0f} %",
            f"{r['kernel_error']:.1e}", *peers.ratios(plan, r["kernel_ms"]))
        row(f"{plan}, everything", *whole, "", *peers.ratios(plan, r["ms"]))


def attention_calls(folder):
    if not (folder / "attention-8b.json").exists():
        return
    peer = load(folder, "peer-attention")
    print("\n### Attention of one layer beside PyTorch's\n")
    print(f"B = {peer['batch']}, heads of {peer['dim']}, bf16. Own rows by `sparvar bench attention --device cuda`, PyTorch's by `bench/peer_attention_gpu.py` ({peer['torch']}, FlexAttention compiled).")
    print("TFLOP/s: of the pairs computed; GB/s: q, k, v and the output once; floor: the larger of those pairs at the rate of a large product and of those bytes at the rate of a copy;")
    print("error: relative, against double precision on sampled rows. csla: exact lists of 8x16 tiles; csla-blocks: the published 128x128 blocks; cs4a-112: the published form, in multiples of 112 keys;")
    print("everything: from q, k, v to the output, keys chosen and residual added; deciding: dense attention, column sums, choice and residual. FlexAttention is compared where it computes the same pairs.")
    print("More than 100 % of the floor: faster than a large product of cuBLASLt, at the clock that the card's power left that product.")
    for size, name, heads in (("8b", "Infinity-8B", 28), ("2b", "Infinity-2B", 16)):
        rows = load(folder, f"attention-{size}")["rows"]
        best = rows[0]
        print(f"\n{name}, {heads} heads; products {best['product_tflops']:.0f} TFLOP/s, copies {best['copy_gb_s'] * 1e-3:.2f} TB/s\n")
        header("", "pairs computed", "ms", "TFLOP/s", "GB/s", "share of the floor", "error", "against SDPA flash", "SDPA cuDNN", "FlexAttention")
        for scale in sorted({r["scale"] for r in rows}):
            own = [r for r in rows if r["scale"] == scale]
            peers = Peers(peer, heads, own)
            row(f"**{own[0]['queries']} x {own[0]['keys']}**", *[""] * 9)
            peers.print()
            for r in own:
                attention_row(r, peers)


def call_rows(rows, addition_seconds):
    """Of bench/python_attention.py; on the CPU there is no graph and no count of bytes."""
    def us(seconds):
        return "" if seconds is None else f"{1e6 * seconds:.1f}"

    header("", "program us", "stream us", "more us", "graph us", "paced us", "host us", "beside MiB")
    for r in rows:
        row(f"{r['attention']}, {r['queries']} x {r['keys']}", us(r["program_seconds"]), us(r["seconds"]), f"{1e6 * (r['seconds'] - r['program_seconds']):+.1f}",
            us(r["graph_seconds"]), us(r["paced_seconds"]), us(r["host_seconds"]), "" if r["bytes_beside"] is None else f"{r['bytes_beside'] / 2**20:.1f}")
    print(f"\nPyTorch's own addition of one number: {us(addition_seconds)} us a call, one after the other.")


def calls_from_pytorch(folder):
    if not (folder / "python-attention.json").exists():
        return
    report = load(folder, "python-attention")
    print("\n### sparvar.attention on torch tensors\n")
    print(f"`bench/python_attention.py`: {report['geometry']}, B = {report['batch']}, bf16. Program: `sparvar bench attention` before and after PyTorch's calls, mean of both medians;")
    print("stream: a few calls that were enqueued while the GPU was waiting; graph: the same in a CUDA graph; paced: calls that find an empty stream; host: until a call returns to Python; beside: memory of a call above its tensors and its output.\n")
    call_rows(report["rows"], report["addition_seconds"])


def patched_rows(reports):
    """Of bench/python_patch.py; its first row is the model as it is. The host of the GPU has times at which it takes
    half as long again, which last some pictures: what is compared are pictures of one turn."""
    header("attention", "seconds", "against unpatched", "scales but the last 4", "last 4", "decode", "peak memory")
    for report in reports:
        for r in report["rows"]:
            ratio = statistics.median(whole / part for whole, part in zip(report["rows"][0]["all_seconds"], r["all_seconds"], strict=True))
            row(r["attention"] + (", flash" if report["sdpa"] == "flash" else ""), f"{r['seconds']:.3f}", f"{ratio:.2f}x",
                f"{sum(r['scales'][:-4]):.3f}", f"{sum(r['scales'][-4:]):.3f}", f"{r['decode']:.3f}", f"{gib(r['peak_bytes'])} GiB" if r["peak_bytes"] else "")


def patched(folder):
    reports = [load(folder, f"python-patch-{kind}") for kind in ("auto", "flash") if (folder / f"python-patch-{kind}.json").exists()]
    if not reports:
        return
    print("\n### Upstream's model, patched\n")
    print(f"`bench/python_patch.py --geometry {reports[0]['geometry']}`: a model of random weights that runs as upstream's does (eager, its own KV cache), one 1024x1024 picture with guidance, in seconds: medians of {reports[0]['repeat']} pictures of each, in turn; against unpatched: the median of the turns.")
    print("Patched layers normalise, rotate and store keys in one kernel, so `dense` gains too, and only the layer that runs has room for those of the last scale. Flash: PyTorch held to FlashAttention.\n")
    patched_rows(reports)


def tables(folder):
    own, peer = load(folder, "8b"), load(folder, "peer-8b")
    print("## On a GPU\n")
    print(f"Made by `bench/gpu.sh` on {time.strftime('%Y-%m-%d')}: {own['backend']}; commit {commit()}; PyTorch {peer['torch']} on the same card, in the same run.")
    print(f"Medians of {own['repeat']} pictures after one that records programs and chooses algorithms (the first picture of Infinity-8B takes {own['first_seconds']:.1f} s).")
    print("PyTorch's model is `bench/peer_pytorch_gpu.py`: eager, autocast, as upstream runs it; its small scales wait for the host, whose speed varies from run to run.")
    for part in (pictures, small, batches, attention_calls, kernels, calls_from_pytorch, patched):
        part(folder)
    print()


def main():
    folder, document = sys.argv[1:]
    put_part(document, "bench/gpu.sh", lambda: tables(Path(folder)))


if __name__ == "__main__":
    main()
