#!/usr/bin/env python3
"""Makes bench/prompts/tuning.txt and bench/prompts/held-out.txt from the lists of training/lists: prompts.py [FOLDER]

Prompts are the captions of the bundled model's drawings, "name, style style". No name is in both files, so that a plan that
was searched on the one can be judged on the other.
"""
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEED = 20261124
# From each list of training/lists: names drawn in the style noto, and names in any style that training left out.
COUNTS = {"tuning": {"validation": 24, "unseen": 16}, "held-out": {"noto": 60, "unseen": 40}}


def keys_of(name):
    lines = (ROOT / "training" / "lists" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return sorted(line for line in lines if line and not line.startswith("#"))


def make_prompts():
    rng, taken, files = random.Random(SEED), set(), {}
    for file, counts in COUNTS.items():
        prompts = []
        for source, count in counts.items():
            keys = keys_of(source)
            for key in rng.sample(keys, len(keys)):
                style, name = key.split("/", 1)
                if count == 0 or name in taken:
                    continue
                taken.add(name)
                prompts.append(f"{name}, {style} style")
                count -= 1
            if count:
                sys.exit(f"training/lists/{source}.txt: {count} names too few for {file}.txt")
        files[file] = rng.sample(prompts, len(prompts))  # the first few are of all kinds
    return files


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench" / "prompts"
    folder.mkdir(exist_ok=True)
    for file, prompts in make_prompts().items():
        (folder / f"{file}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        print(f"{folder / file}.txt: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
