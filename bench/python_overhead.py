#!/usr/bin/env python3
"""What the Python package costs over the program: loading a model and drawing one picture, in turn, each in a process
of its own.

    PYTHONPATH=build/release/python .venv/bin/python bench/python_overhead.py PROGRAM MODEL [REPEATS]

Seconds from the start of loading to the finished pixels, and of the processor for the whole process. The best of each
are compared: what else runs on a machine only adds.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile

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


def main() -> None:
    path, model = sys.argv[1:3]
    repeats = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    program(path, model), package(model)  # files into the page cache
    rows = [(*program(path, model), *package(model)) for _ in range(repeats)]
    for seconds, processor, python_seconds, python_processor in rows:
        ours = f"package {python_seconds:.3f} s ({python_processor:.2f} s CPU)"
        print(f"program {seconds:.3f} s ({processor:.2f} s CPU)   {ours}")
    best = [min(column) for column in zip(*rows, strict=True)]
    print(f"best: program {best[0]:.3f} s, package {best[2]:.3f} s: {100 * (best[2] / best[0] - 1):+.1f} %")
    print(f"processor, whole process: {best[1]:.2f} s and {best[3]:.2f} s")


if __name__ == "__main__":
    main()
