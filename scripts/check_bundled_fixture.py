#!/usr/bin/env python3
"""Checks the bundled model's fixture, which PyTorch computed, with reference.py: float64 NumPy, another implementation.

    scripts/check_bundled_fixture.py [--model models/emoji] [tests/data/emoji]

From the stored token ids on: text states, guidance, every scale's logits given the stored bits of the scales before, the
bits, the sum of codes, the picture. Needs numpy and safetensors; a prompt of the bundled model takes a minute or two, and
2 GB. Exit code 0: all within what float32 differs from float64 by.
"""

import argparse
import json
import struct
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import reference

ROOT = Path(__file__).resolve().parent.parent
CLEAR = 1e-3  # a bit with a larger margin must be the same, where logits differ by 50 at most; else in proportion
# The largest difference allowed: of numbers as large as `unit`, in its share. float32 stays well below these.
TEXT, POOLED, LOGITS, CODES = 1e-5, 1e-5, 3e-5, 1e-5
CLOSE_CALLS = 2e-4  # share of bits that may differ, all of them close calls


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file as float64. NumPy has no bf16: it is float32 without its lower half."""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    if all(entry["dtype"] != "BF16" for name, entry in header.items() if name != "__metadata__"):
        return {name: t.astype(np.float64) for name, t in load_file(path).items()}
    data = np.memmap(path, np.uint8, "r", 8 + size)
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        part = np.array(data[begin:end])
        if entry["dtype"] == "BF16":
            values = (part.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] == "F32":
            values = part.view(np.float32)
        else:
            raise SystemExit(f"{path}: {name}: type {entry['dtype']}; expected BF16 or F32")
        out[name] = values.astype(np.float64).reshape(entry["shape"])
    return out


class Checks:
    """Compares, prints a line each, and remembers what failed."""

    def __init__(self) -> None:
        self.failed = 0

    def line(self, good: bool, name: str, text: str) -> None:
        self.failed += not good
        print(f"{'ok' if good else 'FAILED'}  {name}: {text}", flush=True)

    def near(self, name: str, found: np.ndarray, expected: np.ndarray, share: float) -> None:
        if found.shape != expected.shape:
            return self.line(False, name, f"shape {expected.shape}, computed {found.shape}")
        unit = max(1.0, float(np.abs(found).max()))
        difference = float(np.abs(found - expected.astype(np.float64)).max())
        self.line(difference <= share * unit, name, f"differs by {difference:.2g} (of {unit:.3g}; allowed {share * unit:.2g})")


def packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits.astype(np.uint8), axis=-1)


def grid_of(scale: int | list[int]) -> tuple[int, int]:
    return (scale, scale) if isinstance(scale, int) else (scale[0], scale[1])


class Model:
    """A model folder for the reference: weights, and the configuration under the names that reference.py knows."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        if config["transformer"].get("apply_spatial_patchify"):
            raise SystemExit(f"{folder}: patchify; this check is for models of one pixel of codes a token")
        self.text, self.weights, vae = (read_weights(folder / f"{n}.safetensors") for n in ("text_encoder", "transformer", "vae"))
        self.text_config, self.grids = config["text_encoder"], [grid_of(scale) for scale in config["scales"]]
        # Where rope_grid is missing (docs/model-format.md): the last grid of the square 1M schedule.
        rope_grid = grid_of(config.get("rope_grid", 64))
        self.infinity = reference.Infinity(self.weights, {"rope_base": 10000.0, **config["transformer"]}, rope_grid)
        v = config["vae"]
        self.vae = reference.Vae(vae, {**v, "group_norm_groups": v["norm_num_groups"], "group_norm_eps": v["norm_eps"]})

    def encode(self, ids: np.ndarray) -> np.ndarray:
        return reference.t5_encode(self.text, self.text_config, ids)[0][-1]


def check_prompt(model: Model, io: dict[str, np.ndarray], cfg: float, checks: Checks) -> None:
    infinity, w, config = model.infinity, model.weights, model.infinity.c
    states = model.encode(io["ids"])
    checks.near("text_hidden", states, io["text_hidden"], TEXT)
    normed = [reference.rms_norm(x, w["text_norm.weight"], config["norm_eps"]) for x in (states, w["cfg_uncond"][: len(states)])]
    texts = [infinity.project("text_proj_for_ca.2", reference.gelu_tanh(infinity.project("text_proj_for_ca.0", x))) for x in normed]
    pooled = np.stack([infinity.pool(x) for x in normed])
    checks.near("cond_BD", pooled, io["cond_BD"], POOLED)
    gss = reference.linear(reference.silu(pooled), w["shared_ada_lin.1.weight"], w["shared_ada_lin.1.bias"]).reshape(2, 6, -1)

    caches: list[list[list]] = [[[] for _ in range(config["depth"])] for _ in range(2)]
    x = [p[None] + w["pos_start"][0] for p in pooled]
    largest = max(float(np.abs(t).max()) for name, t in io.items() if name.startswith("logit_difference"))
    clear = CLEAR * max(1.0, largest / 50)
    summed, differing, unclear, total = np.zeros(()), 0, 0, 0
    for k, grid in enumerate(model.grids):
        halves = []
        for half in range(2):
            y = x[half] + w["lvl_embed.weight"][k]
            for i in range(config["depth"]):
                y = infinity.block(i, y, gss[half], texts[half], grid, caches[half][i])[0]
            halves.append(infinity.head(y, pooled[half]))
        guided = cfg * halves[0] + (1 - cfg) * halves[1]
        margin = guided[:, 1::2] - guided[:, 0::2]
        if (name := f"logit_difference.s{k}") in io:
            step = -(-len(margin) // len(io[name]))
            checks.near(name, margin[::step], io[name], LOGITS)
        bits = np.unpackbits(io[f"bits.s{k}"], axis=-1)
        wrong = (margin > 0) != bits.astype(bool)
        differing, total = differing + int(wrong.sum()), total + wrong.size
        unclear += int((wrong & (np.abs(margin) >= clear)).sum())
        summed = summed + reference.resize(reference.bits_to_codes(bits, grid, False), model.grids[-1], reference.linear_matrix)
        if k + 1 < len(model.grids):
            words = reference.codes_to_words(summed, model.grids[k + 1], False)
            x = [infinity.project("word_embed", words)] * 2
    checks.line(unclear == 0, f"bits with a margin of {clear:.2g}", f"{unclear} of {total} differ")
    allowed = max(2, int(CLOSE_CALLS * total))
    checks.line(differing <= allowed, "bits", f"{differing} of {total} differ; allowed {allowed}")
    if "summed_codes" in io:
        checks.near("summed_codes", summed, io["summed_codes"].reshape(summed.shape), CODES)
    if "image_u8_rgb_hwc" in io:
        picture = reference.picture_tensors(model.vae.decode(summed))["u8"].astype(int)
        expected = io["image_u8_rgb_hwc"].reshape(picture.shape).astype(int)
        worst = int(np.abs(picture - expected).max())
        checks.line(worst <= 1, "image_u8_rgb_hwc", f"differs by {worst} of 255; allowed 1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fixture", type=Path, nargs="?", default=ROOT / "tests" / "data" / "emoji")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "emoji")
    arguments = parser.parse_args()
    model, checks = Model(arguments.model), Checks()
    for prompt, entry in json.loads((arguments.fixture / "config.json").read_text()).items():
        print(f"{prompt!r}, guidance {entry['cfg']:g}")
        check_prompt(model, load_file(arguments.fixture / entry["file"]), entry["cfg"], checks)
    print(f"{arguments.fixture}: {checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
