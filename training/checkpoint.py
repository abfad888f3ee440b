"""What a stage of training leaves behind and goes on from: everything on one machine, the average alone on the way
home."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from .errors import TrainingError
from .files import load_shards, save_shards, write_bytes
from .loop import Ema, State
from .team import Team


@dataclass
class Folders:
    """Where a run keeps things: `work` on this machine, `out` for the way home, `resume` what came from there."""

    work: Path
    out: Path
    resume: Path | None


def resume(
    folders: Folders, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float, steps: int,
    device: torch.device,
) -> Ema:  # fmt: skip
    """Fills model and optimizer with what `save` left, and returns the average. What came from another machine is the
    average alone, which then counts as one of `steps` steps."""
    full = folders.work / f"{name}.pt"
    compact = load_shards(folders.resume, name) if folders.resume else {}
    ema = Ema(model, decay)
    if full.exists():
        value = _load_full(full, device)
        model.load_state_dict(value["weights"])
        optimizer.load_state_dict(value["optimizer"])
        ema.tensors = value["average"]
        ema.steps = value["average_steps"]
    elif compact:
        model.load_state_dict(compact)
        ema = Ema(model, decay, steps=steps)
    return ema


def save(
    folders: Folders, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, state: State,
    team: Team,
) -> None:  # fmt: skip
    """Everything into the work folder, the average as bf16 into the output folder too. The whole team calls it: the
    lead writes, and its weights become everyone's, in case that roundings drifted apart."""
    team.align(model.state_dict().values())
    if not team.lead:
        return
    value = {
        "weights": model.state_dict(),
        "average": ema.tensors,
        "average_steps": ema.steps,
        "optimizer": optimizer.state_dict(),
    }
    _save_full(folders.work / f"{name}.pt", value)
    for folder in (folders.work, folders.out):
        save_shards(folder, name, ema.tensors)
        state.save(folder)


def _save_full(path: Path, value: dict[str, object]) -> None:
    """A checkpoint with everything (weights, average, optimizer): for the disk of one machine."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def _load_full(path: Path, device: torch.device) -> dict:
    """What `_save_full` wrote."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise TrainingError(
            f"{path}: cannot be read: {error}; remove it to go on from the compact checkpoint"
        ) from error
