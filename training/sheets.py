"""Contact sheets."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .files import write_bytes


def to_bytes(pictures: Tensor) -> Tensor:
    """-1..1 to uint8, truncated as the engine does."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).floor().byte()


def sheet(pictures: Tensor, columns: int, side: int) -> Image.Image:
    """Pictures [N, 3, H, W] in -1..1 in rows of `columns`, each `side` pixels wide."""
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * side, rows * side), "white")
    for i, picture in enumerate(to_bytes(pictures).permute(0, 2, 3, 1).cpu().numpy()):
        small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(small, (i % columns * side, i // columns * side))
    return canvas


def write_sheet(pictures: Tensor, path: Path, columns: int = 8, side: int = 192) -> None:
    """Writes a JPEG or PNG."""
    buffer = io.BytesIO()
    picture = sheet(pictures, columns, side)
    if path.suffix == ".png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=88)
    write_bytes(path, buffer.getvalue())


def smaller(pictures: Tensor, side: int = 64) -> Tensor:
    """Area means [N, 3, side, side]: what pictures are compared in."""
    if pictures.shape[-1] <= side:
        return pictures
    return torch.nn.functional.interpolate(pictures, size=(side, side), mode="area")
