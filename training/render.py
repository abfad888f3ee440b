"""Draws the SVG files into shards: `shard-00000.npy` [n, 3, size, size] uint8 and `shard-00000.json` (keys)."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .data import STYLE_WEIGHT, TONE_WEIGHT, Drawing
from .drawing import draw_shard
from .errors import TrainingError
from .progress import Progress

SHARD = 128  # drawings


def render(drawings: list[Drawing], folder: Path, size: int, workers: int | None = None, quiet: bool = False) -> None:
    """Renders what is missing in `folder`. Safe to interrupt and call again with the same drawings and size."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise TrainingError("rendering needs the Python package resvg-py: pip install resvg-py") from error
    folder.mkdir(parents=True, exist_ok=True)
    stamp, about = folder / "pictures.json", {"size": size, "drawings": len(drawings)}
    if stamp.exists() and json.loads(stamp.read_text()) != about:
        raise TrainingError(
            f"{folder}: holds other pictures ({stamp.read_text()}, now {about}); name another folder or remove it"
        )
    stamp.write_text(json.dumps(about))
    starts = range(0, len(drawings), SHARD)
    missing = [n for n in range(len(starts)) if not (folder / f"shard-{n:05}.json").exists()]
    progress = Progress("render", len(starts), quiet, len(starts) - len(missing))
    failed: list[str] = []
    with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        jobs = []
        for n in missing:
            rows = [(d.key, d.svg) for d in drawings[n * SHARD : (n + 1) * SHARD]]
            jobs.append(pool.submit(draw_shard, folder, n, rows, size))
        for job in as_completed(jobs):
            failed += job.result()
            progress.step()
    progress.end(f"{len(drawings) - len(failed)} pictures, {len(failed)} drawings empty or unreadable")


class PictureStore(NamedTuple):
    """Rendered pictures, in the host's memory: 14 GB of a GPU's would be gone."""

    pictures: torch.Tensor  # [N, 3, size, size] uint8
    drawings: list[Drawing]  # of each picture
    device: torch.device  # of batches

    @staticmethod
    def load(folder: Path, drawings: list[Drawing], device: torch.device) -> "PictureStore":
        """Reads all shards of `folder`."""
        by_key = {d.key: d for d in drawings}
        shards = sorted(folder.glob("shard-*.json"))
        if not shards:
            raise TrainingError(f"{folder}: no pictures; run the stage `render` first")
        keys = [json.loads(path.read_text()) for path in shards]
        first = np.load(shards[0].with_suffix(".npy"), mmap_mode="r")
        count = sum(map(len, keys))
        pictures = torch.empty((count, *first.shape[1:]), dtype=torch.uint8)
        begin = 0
        for path, names in zip(shards, keys, strict=True):
            pictures[begin : begin + len(names)] = torch.from_numpy(np.load(path.with_suffix(".npy")))
            begin += len(names)
        return PictureStore(pictures, [by_key[key] for names in keys for key in names], device)

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, size, size] in -1..1, on the device."""
        return self.pictures[index.cpu()].to(self.device).float().div_(127.5).sub_(1)

    def training_weights(self, held_out: set[str]) -> np.ndarray:
        """Probability of each picture to be drawn in training; zero for those held out."""
        weights = np.array(
            [
                0.0 if d.key in held_out else STYLE_WEIGHT.get(d.style, 1.0) * (TONE_WEIGHT if d.toned else 1.0)
                for d in self.drawings
            ]
        )
        return weights / weights.sum()
