#!/usr/bin/env python3
"""What the Python package costs over the program: loading a model and drawing one picture, in turn, each in a process
of its own.

    PYTHONPATH=build/release/python .venv/bin/python bench/python_overhead.py --program PROGRAM --model MODEL

Seconds from the start of loading to the finished pixels, and of the processor for the whole process. The best of each
are compared: what else runs on a machine only adds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="sparvar, of the same build as the package")
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeat", type=int, default=25)
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat: at least 1")
    program(options.program, options.model), package(options.model)  # files into the page cache
    turns = [(*program(options.program, options.model), *package(options.model)) for _ in range(options.repeat)]
    columns = list(zip(*turns, strict=True))
    seconds, processor = (dict(zip(("program", "package"), columns[i::2], strict=True)) for i in (0, 1))
    if options.json:
        print(json.dumps({"repeat": options.repeat, "seconds": seconds, "processor_seconds": processor}))
        return
    for name in seconds:
        cpu = f"processor {min(processor[name]):.2f} s"
        print(f"{name}: best {min(seconds[name]):.3f} s, median {statistics.median(seconds[name]):.3f} s, {cpu}")
    print(f"package: {100 * (min(seconds['package']) / min(seconds['program']) - 1):+.1f} % by the best")


if __name__ == "__main__":
    main()
