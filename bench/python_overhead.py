#!/usr/bin/env python3
"""What the Python package costs over the program: loading a model and drawing one picture, in turn, each in a process
of its own. Makes its part of docs/benchmarks.md; takes 4 to 8 minutes.

    PYTHONPATH=build/release/python .venv/bin/python bench/python_overhead.py --program build/release/apps/cli/sparvar

Seconds from the start of loading to the finished pixels, and of the processor for the whole process. The best of each
are compared: what else runs on a machine only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tables import commit, cpu_name, header, put_part, row

ROOT = Path(__file__).resolve().parents[1]
PROMPT, SEED = "red apple, 3d style", 7
CHILD = f"""
import sys, time
import sparvar
start = time.perf_counter()
pipe = sparvar.Pipeline.from_pretrained(sys.argv[1], device="cpu", dtype="bfloat16")
pipe.set_progress_bar_config(disable=True)
out = pipe({PROMPT!r}, seed={SEED})
print(time.perf_counter() - start)
"""


def run(*command: str) -> tuple[str, float]:
    """What the command printed, and its seconds of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def program(path: str, model: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        text, processor = run(
            path, "generate", PROMPT, "--seed", str(SEED), "--device", "cpu", "--dtype", "bf16", "--model", model,
            "-o", folder, "--json",
        )  # fmt: skip
    timings = json.loads(text)["timings"]
    return timings["load_seconds"] + timings["total_seconds"], processor


def package(model: str) -> tuple[float, float]:
    text, processor = run(sys.executable, "-c", CHILD, model)
    return float(text), processor


def table(seconds: dict[str, list[float]], processor: dict[str, list[float]]) -> None:
    repeat, best = len(seconds["program"]), min(seconds["program"])
    print("## The Python package beside the program\n")
    print(
        f"Made by `bench/python_overhead.py` on {time.strftime('%Y-%m-%d')}: {cpu_name()}, {os.cpu_count()} threads; "
        f"commit {commit()}. The bundled model loaded and one 512x512 picture\ndrawn, bf16, each time in a process of "
        f"its own, {repeat} times in turn. Compared by the best of each, as what else runs on the machine only adds;\n"
        "processor: of the whole process, its best.\n"
    )
    header("", "best s", "against the program", "median s", "processor s")
    for name, times in seconds.items():
        more = 100 * (min(times) / best - 1)
        median, cpu = statistics.median(times), min(processor[name])
        row(name, f"{min(times):.3f}", f"{more:+.1f} %", f"{median:.3f}", f"{cpu:.2f}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="sparvar, of the same build as the package")
    parser.add_argument("--model", default=str(ROOT / "models" / "emoji"))
    parser.add_argument("--repeat", type=int, default=25)
    parser.add_argument("--document", default=str(ROOT / "docs" / "benchmarks.md"), help="-: standard output")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat: at least 1")
    program(options.program, options.model), package(options.model)  # files into the page cache
    turns = [(*program(options.program, options.model), *package(options.model)) for _ in range(options.repeat)]
    columns = [list(column) for column in zip(*turns, strict=True)]
    seconds, processor = ({"program": columns[i], "package": columns[i + 2]} for i in (0, 1))
    put_part(options.document, "bench/python_overhead.py", lambda: table(seconds, processor))


if __name__ == "__main__":
    main()
