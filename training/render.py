"""Draws the SVG files into shards: `shard-00000.npy` [n, 3, size, size] uint8 and `shard-00000.json` (keys)."""

import io
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .data import Drawing
from .errors import TrainingError
from .progress import Progress

SHARD = 128  # drawings


def draw(svg: str, size: int) -> np.ndarray:
    """[3, size, size] uint8: the drawing on white with a margin of a sixteenth on each side."""
    import resvg_py

    inner = size - 2 * (size // 16)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=inner, background="#ffffff", skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if picture.height > inner:
        picture.thumbnail((inner, inner))
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(canvas).transpose(2, 0, 1)


def _draw_shard(folder: Path, number: int, rows: list[tuple[str, str]], size: int) -> list[str]:
    """Writes one shard, pictures first and keys last: a shard with keys is whole. Returns the keys left out."""
    pictures, keys, failed = [], [], []
    for key, svg in rows:
        try:
            picture = draw(svg, size)
        except (ValueError, OSError):
            failed.append(key)
            continue
        if picture.min() < 250:  # else it is empty
            pictures.append(picture)
            keys.append(key)
        else:
            failed.append(key)
    path = folder / f"shard-{number:05}.npy"
    with open(f"{path}.part", "wb") as file:
        np.save(file, np.stack(pictures) if pictures else np.zeros((0, 3, size, size), np.uint8))
    os.replace(f"{path}.part", path)
    keys_path = path.with_suffix(".json")
    (part := keys_path.with_suffix(".json.part")).write_text(json.dumps(keys))
    os.replace(part, keys_path)
    return failed


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
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        jobs = []
        for n in missing:
            rows = [(d.key, d.svg) for d in drawings[n * SHARD : (n + 1) * SHARD]]
            jobs.append(pool.submit(_draw_shard, folder, n, rows, size))
        for job in as_completed(jobs):
            failed += job.result()
            progress.step()
    progress.end(f"{len(drawings) - len(failed)} pictures, {len(failed)} drawings empty or unreadable")


class PictureStore(NamedTuple):
    """Rendered pictures on a device."""

    pictures: torch.Tensor  # [N, 3, size, size] uint8
    drawings: list[Drawing]  # of each picture

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
        pictures = torch.empty((count, *first.shape[1:]), dtype=torch.uint8, device=device)
        begin = 0
        for path, names in zip(shards, keys, strict=True):
            pictures[begin : begin + len(names)] = torch.from_numpy(np.load(path.with_suffix(".npy"))).to(device)
            begin += len(names)
        return PictureStore(pictures, [by_key[key] for names in keys for key in names])

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, size, size] in -1..1."""
        return self.pictures[index].float().div_(127.5).sub_(1)

    def training_weights(self, held_out: set[str]) -> np.ndarray:
        """Probability of each picture to be drawn in training; zero for those held out."""
        from .data import TONE_WEIGHT

        weights = np.array([0.0 if d.key in held_out else TONE_WEIGHT if d.toned else 1.0 for d in self.drawings])
        return weights / weights.sum()
