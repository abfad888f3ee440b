"""Files that are whole or not there, and safetensors in shards that fit through a narrow way."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .errors import TrainingError

Tensors = dict[str, torch.Tensor]
SHARD_BYTES = 15_000_000


def write_bytes(path: Path, data: bytes) -> None:
    """Writes aside and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a newline at the end."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def save_tensors(path: Path, tensors: Tensors) -> None:
    """One safetensors file, on the CPU and contiguous."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part)
    part.chmod(0o644)  # the library leaves a file that only its owner can read
    os.replace(part, path)


def save_shards(folder: Path, name: str, tensors: Tensors) -> None:
    """`NAME-0.safetensors` and further ones of at most 15 MB each in bf16; shards of a larger save are removed."""
    shards: list[Tensors] = [{}]
    size = 0
    for key, tensor in tensors.items():
        small = tensor.detach().to(torch.bfloat16)
        if size + 2 * small.numel() > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = small
        size += 2 * small.numel()
    for i, shard in enumerate(shards):
        save_tensors(folder / f"{name}-{i}.safetensors", shard)
    for path in folder.glob(f"{name}-*.safetensors"):
        if int(path.stem.rsplit("-", 1)[1]) >= len(shards):
            path.unlink()


def load_shards(folder: Path, name: str) -> Tensors:
    """Tensors of `save_shards` in f32; empty if there are none."""
    out: Tensors = {}
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        try:
            out.update({key: t.float() for key, t in load_file(path).items()})
        except Exception as error:  # safetensors has no exception of its own that is stable
            raise TrainingError(f"{path}: cannot be read as safetensors: {error}") from error
    return out
