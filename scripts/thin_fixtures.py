#!/usr/bin/env python3
"""Thins the golden fixtures into tests/data: same files, same format, under 7 MB in all.

    scripts/thin_fixtures.py FIXTURES [OUT]      OUT: tests/data of this repository

Needs numpy and safetensors; takes a minute. Two things make them smaller:
- Repetition goes: several scales or blocks of one kind of tensor. A missing tensor is not compared.
- Weights are rounded to F16, and what the model computes from them is computed anew in float64 by reference.py, which
  first has to reproduce the original outputs from the original weights. Fixtures without weights keep their values.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import reference

LIMIT = 7_000_000
LAST_GRID = {1.0: (64, 64), 0.666: (52, 78)}  # of the 1M schedule, by h_div_w_template

INFINITY_DROP = [
    r"hidden\.s6\..*",
    r"logits_(cond|uncond)\.s[456]",
    r"logits_cfg\.s[45]",
    r"summed_codes\.s[0-5]",
    r"next_features\.s[45]",
]

# fixture -> file -> patterns of tensors left out (a whole name must match)
FILES = {
    # No picture here: bsq-vae has a decoder of the same stride.
    "infinity-tiny-f16": {"weights": [], "io": INFINITY_DROP + [r"image_.*"]},
    "infinity-tiny-patchify": {"weights": [], "vae": [], "io": INFINITY_DROP + [r"logits_cfg\.s6"]},
    "bsq-vae": {"weights": [], "io": []},
    "t5-tiny": {"weights": [], "io": [r"hidden\.(04|10|11|13|18|23|28)", r"debug\.layer_out\.[0-2]"]},
    "csla-mask": {"io": [r"(?!square1M\.k10).*\.visible_per_(key|query)"]},
    "cs4a": {"io": [r"o_dense\.s6", r"o_cache_resized\.s6", r"(grid|ratio)\.(out|indices)\.s6"]},
}
# The bundled model's fixture is not here: training/bundle makes it with the model.
PLAIN = ["config.json", "prompts.json", "spiece.model"]


def compute(folder: str, config: dict, files: dict) -> dict:
    """All outputs of the fixture from the weights in `files`."""
    wide = {
        stem: {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in tensors.items()}
        for stem, tensors in files.items()
        if stem != "io"
    }
    io = files["io"]
    if folder == "bsq-vae":
        return reference.run_vae(wide["weights"], config, io)
    if folder == "t5-tiny":
        return reference.run_t5(wide["weights"], config, io)
    last_grid = LAST_GRID[config["h_div_w_template"]]
    out, closest = reference.run_infinity(wide["weights"], wide.get("vae"), config, io, last_grid)
    print(f"{folder}: the closest two logits differ by {closest:.2g}")
    if closest < 5e-4:  # float32 differs from float64 by 1.4e-4 at most
        raise SystemExit("too close a call for exact comparison of bits: round the weights in another way")
    return out


def like(value: np.ndarray, model: np.ndarray) -> np.ndarray:
    """In the type and shape of the fixture, whose last scale holds sample 0 only."""
    if value.shape != model.shape:
        value = value[[0, len(value) // 2]]
    assert value.shape == model.shape
    return np.ascontiguousarray(value.astype(model.dtype))


def check(folder: str, out: dict, io: dict) -> None:
    for name, expected in io.items():
        found = like(out[name], expected)
        difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
        allowed = 1 if name.startswith("image_u8") else 0 if name.startswith("bits") else 2e-4
        if difference > allowed:
            raise SystemExit(f"{folder}: {name}: reference.py differs from upstream by {difference}")


def recompute(folder: str, config: dict, files: dict) -> dict:
    check(folder, compute(folder, config, files), files["io"])
    small = {"io": files["io"]}
    for stem in files.keys() - {"io"}:
        small[stem] = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in files[stem].items()}
    out = compute(folder, config, small)
    small["io"] = {name: like(out[name], expected) for name, expected in files["io"].items()}
    return small


def thin(source: Path, target: Path) -> None:
    for folder, drop in FILES.items():
        out = target / folder
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        for name in PLAIN:
            if (source / folder / name).exists():
                shutil.copyfile(source / folder / name, out / name)
        config = json.loads((source / folder / "config.json").read_text())
        files = {}
        for stem, patterns in drop.items():
            tensors = load_file(source / folder / f"{stem}.safetensors")
            files[stem] = {k: v for k, v in tensors.items() if not any(re.fullmatch(p, k) for p in patterns)}
        if "weights" in files:
            files = recompute(folder, config, files)
        for stem, tensors in files.items():
            save_file(tensors, out / f"{stem}.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).resolve().parent.parent / "tests" / "data")
    arguments = parser.parse_args()
    thin(arguments.fixtures, arguments.out)
    total = 0
    for folder in FILES:
        size = sum(f.stat().st_size for f in (arguments.out / folder).iterdir())
        total += size
        print(f"{size:>9,}  {folder}")
    print(f"{total:>9,}  of {LIMIT:,}")
    return 0 if total <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
