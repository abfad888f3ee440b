"""What the training stages share: clock, moving averages, rates, and the state that lets runs continue each other."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn

from .config import Preset
from .errors import TrainingError
from .files import Tensors, write_json

# A step that takes longer has compiled something; only so much of it counts as training. One step in ten waits for the
# other nine.
LONGEST_STEP = 3.0


class Clock:
    """The end of a run in wall time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the end."""
        return self._end - time.monotonic()


@dataclass
class StageState:
    """How far a stage has come."""

    seconds: float = 0.0
    steps: int = 0
    pictures: int = 0


@dataclass
class State:
    """How far the training has come: `state.json`."""

    preset: str
    stages: dict[str, StageState] = field(default_factory=dict)
    runs: int = 0

    def stage(self, name: str) -> StageState:
        """The state of a stage, a fresh one if it has not begun."""
        return self.stages.setdefault(name, StageState())

    def total(self) -> float:
        """Seconds of training in all."""
        return sum(stage.seconds for stage in self.stages.values())

    def save(self, folder: Path) -> None:
        """Writes `state.json`."""
        stages = {name: vars(stage) for name, stage in self.stages.items()}
        write_json(folder / "state.json", {"preset": self.preset, "runs": self.runs, "stages": stages})

    @staticmethod
    def load(folder: Path, preset: Preset) -> "State | None":
        """The state in `folder`, or none."""
        path = folder / "state.json"
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text())
            stages = {name: StageState(**stage) for name, stage in value["stages"].items()}
            state = State(value["preset"], stages, value["runs"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path}: not a state of this program ({error!r}); remove it to start afresh"
            ) from error
        if state.preset != preset.name:
            raise TrainingError(
                f"{path}: belongs to the preset {state.preset}, not {preset.name}; name another folder", 2
            )
        return state


class Ema:
    """Moving average of a module's state, in f32."""

    def __init__(self, module: nn.Module, decay: float, steps: int = 0) -> None:
        self.module, self.decay, self.steps = module, decay, steps
        self._live = {name: t for name, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()}
        self.tensors: Tensors = {name: t.detach().float().clone() for name, t in self._live.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Takes the module's weights in; the average follows faster in the first steps."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        live = [t.detach() for t in self._live.values()]
        torch._foreach_lerp_(list(self.tensors.values()), live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the average inside."""
        kept = {name: t.detach().clone() for name, t in self._live.items()}
        self.module.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self.module.load_state_dict(kept)


def cosine(first: float, last: float, progress: float) -> float:
    """From `first` to `last` over progress 0 to 1."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


class SaveTimer:
    """Says when it is time to save once more in a long stage: what is lost with a machine are minutes at most."""

    def __init__(self, every: float = 150.0) -> None:
        self._every, self._last = every, time.monotonic()

    def due(self) -> bool:
        """True once in the interval."""
        now = time.monotonic()
        if now - self._last < self._every:
            return False
        self._last = now
        return True


class StepTimer:
    """Seconds that count for a stage: those of compiling do not."""

    def __init__(self, step_seconds: float | None) -> None:
        self._last, self._fixed = time.monotonic(), step_seconds

    def lap(self) -> float:
        """Seconds since the last lap, capped."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return min(seconds, LONGEST_STEP) if self._fixed is None else self._fixed


def compile_parts(modules: list[nn.Module]) -> None:
    """Compiles each part of a model on its own: equal parts share code, and it takes a minute instead of several."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
    for limit in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 64)
    for module in modules:
        module.compile(dynamic=False)


@contextmanager
def eager(modules: list[nn.Module]) -> Iterator[None]:
    """Runs compiled modules as plain ones inside: other shapes would be compiled for a single use."""
    kept = [module._compiled_call_impl for module in modules]
    for module in modules:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in zip(modules, kept, strict=True):
            module._compiled_call_impl = call


def set_up_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda`, with the fast settings for products and convolutions."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise TrainingError("there is no CUDA device here; use --device cpu", 2)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return torch.device(name)
