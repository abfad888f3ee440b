"""One SVG file to pixels, and a shard of them to a file. Free of PyTorch: worker processes start with it."""

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image


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


def draw_shard(folder: Path, number: int, rows: list[tuple[str, str]], size: int) -> list[str]:
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
