#!/usr/bin/env python3
"""Puts the tables of what bench/run.sh measured into its part of docs/benchmarks.md: tables.py FOLDER DOCUMENT."""
import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path


def load(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def put_part(document, name, printed):
    """Replaces what stands between the marks of part `name` of a document by what `printed` prints; `-`: prints it."""
    if document == "-":
        return printed()
    path = Path(document)
    text = path.read_text()
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        sys.exit(f"{document}: has no part {begin.strip()} ... {end}")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        printed()
    whole = text[:text.index(begin)] + begin + out.getvalue() + text[text.index(end):]
    aside = path.with_suffix(".new")  # never half a document
    aside.write_text(whole)
    aside.replace(path)


def cpu_name():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def commit():
    def git(*arguments):
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", "../src", "../include")
    name = git("rev-parse", "--short", "HEAD") or "unknown"
    return name + (" with changes" if dirty else "")


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def header(*cells):
    row(*cells)
    row(*["---"] * len(cells))


def attention_tables(folder):
    peer = load(folder, "attention-peer")
    for dtype in ("bf16", "f32"):
        own = load(folder, f"attention-{dtype}")
        reference = peer[dtype]["attention_seconds"] * 1e3
        print(f"\n### Attention, {dtype}: B = {own['batch']}, {own['heads']} heads of {own['dim']}, {own['queries']} queries, {own['keys']} keys\n")
        print(f"Matrix products of this machine: {own['gemm_gflops']:.0f} GFLOP/s (2048^3, oneDNN).\n")
        header("", "ms", "pairs computed", "GFLOP/s", "share of the GEMM rate", "against SDPA")
        row("PyTorch SDPA", f"{reference:.0f}", "100 %", f"{peer[dtype]['attention_gflops']:.0f}", f"{100 * peer[dtype]['attention_gflops'] / own['gemm_gflops']:.0f} %", "1.0x")
        for r in own["rows"]:
            row(r["name"], f"{r['ms']:.1f}", f"{100 * r['share']:.1f} %", f"{r['gflops']:.0f}", f"{100 * r['share_of_gemm']:.0f} %", f"{reference / r['ms']:.1f}x")


def model_tables(folder):
    for dtype in ("bf16", "f32"):
        peer = load(folder, f"model-{dtype}-peer")
        stages = peer["stages_of_the_median"]
        print(f"\n### One 512x512 picture of the bundled model, guidance on, {dtype}\n")
        header("", "cold s", "warm s", "scales 0-9", "10", "11", "12", "decode", "peak MiB", "against PyTorch")

        def line(name, cold, warm, scales, decode, peak):
            seconds = [s["seconds"] for s in scales]
            row(name, f"{cold:.2f}", f"**{warm:.2f}**", f"{sum(seconds[:-3]):.2f}", *[f"{s:.2f}" for s in seconds[-3:]], f"{decode:.2f}", f"{peak:.0f}",
                f"{peer['warm_seconds'] / warm:.1f}x")

        line("PyTorch eager", peer["cold_seconds"], peer["warm_seconds"], stages["scales"], stages["decode"], peer["peak_rss_bytes"] / 2**20)
        for attention in ("dense", "csla", "published", "sparvar"):
            own = load(folder, f"model-{dtype}-{attention}")
            line(attention, own["cold"]["total"], own["warm"]["total"], own["warm"]["scales"], own["warm"]["decode"], own["peak_mib"])


def tables(folder):
    own = load(folder, "model-bf16-dense")
    peer = load(folder, "model-bf16-peer")
    print("## On the CPU\n")
    print(f"Made by `bench/run.sh` on {time.strftime('%Y-%m-%d')}: {cpu_name()}, {own['backend']}; commit {commit()}; PyTorch {peer['torch']} on the same threads, in the same run.")
    print(f"Every figure is the median of {own['repeat']} runs after a warm-up; cold is the first picture of a process, primitives and pages included.")
    print("PyTorch's model is `bench/peer_pytorch.py`: eager, bf16 by autocast. Column \"pairs computed\": query-key pairs over all pairs.")
    attention_tables(folder)
    model_tables(folder)
    print()


def main():
    folder, document = sys.argv[1:]
    put_part(document, "bench/run.sh", lambda: tables(Path(folder)))


if __name__ == "__main__":
    main()
