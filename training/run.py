"""Continues the whole training for a number of seconds, from whatever is there: what `h100.sh` calls."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import Folders
from .config import Preset
from .data import read_drawings, read_list
from .errors import TrainingError
from .evaluate import Evaluator, evaluate
from .files import load_shards, save_shards
from .loop import Clock, State, set_up_device
from .progress import Log
from .render import PictureStore, render
from .team import Team, size_for, start
from .tokens import Tokenizer
from .train_transformer import TextToBits, TransformerTraining, encode_pictures, train_phase
from .train_vae import load_vae, train_vae

# Seconds that a stage needs before and after its training: compiling, saving, samples.
START_SECONDS = {"cuda": 60.0, "cpu": 1.0}
VAE_START_SECONDS = {"cuda": 120.0, "cpu": 1.0}
RESERVE_SECONDS = {"cuda": 30.0, "cpu": 2.0}
EVALUATION_SECONDS = {"cuda": 300.0, "cpu": 5.0}  # of all processes together


@dataclass
class Run:
    """The arguments of a run."""

    preset: Preset
    data: Path
    tokenizer: Path
    folders: Folders
    seconds: float
    device: str = "auto"
    workers: int | None = None
    list_limit: int | None = None  # of the lists that evaluation reads: a rehearsal needs a few only
    goal: str = "run"  # or vae, transformer, evaluate: one stage only
    processes: int | None = None  # none: one for each GPU

    @property
    def pictures(self) -> Path:
        """Folder of the rendered pictures."""
        return self.folders.work / f"pictures-{self.preset.pixels}"


def newest_state(preset: Preset, folders: Folders) -> State:
    """The state of the folder that has come further; compact checkpoints of the other one are not used.

    If the work folder is behind (this machine has trained less than what was carried here), its checkpoints go.
    """
    here = State.load(folders.work, preset)
    carried = State.load(folders.resume, preset) if folders.resume else None
    if folders.resume and carried is not None and (here is None or carried.total() > here.total()):
        for name in ("vae.pt", "ar.pt", "features.pt"):
            (folders.work / name).unlink(missing_ok=True)
        for name in ("vae", "ar"):
            if tensors := load_shards(folders.resume, name):
                save_shards(folders.work, name, tensors)
        if (folders.resume / "log.jsonl").exists():
            shutil.copyfile(folders.resume / "log.jsonl", folders.work / "log.jsonl")
        carried.save(folders.work)
        return carried
    return here or State(preset.name)


def _carry_forward(folders: Folders) -> None:
    """What this run does not change goes home as well: the output folder holds a whole checkpoint from the start."""
    folders.out.mkdir(parents=True, exist_ok=True)
    for path in [*folders.work.glob("*-[0-9].safetensors"), folders.work / "state.json", folders.work / "log.jsonl"]:
        if path.exists() and not (folders.out / path.name).exists():
            shutil.copyfile(path, folders.out / path.name)


class Runner:
    """The stages of one run, in each process of a team."""

    def __init__(self, team: Team, run: Run, clock: Clock) -> None:
        self.team, self.run, self.clock = team, run, clock
        self.device = set_up_device(run.device)
        self.kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.folders = run.folders
        if team.lead:
            self.state = newest_state(run.preset, self.folders)
            self.state.runs += 1
            _carry_forward(self.folders)
        self.state = team.same(self.state if team.lead else None)
        names = [self.folders.work / "log.jsonl", self.folders.out / "log.jsonl"] if team.lead else []
        self.log = Log(*names, quiet=not team.lead)
        self.held_out = set(read_list("unseen"))

    def pictures(self) -> PictureStore:
        """Loads what `run_all` rendered."""
        store = PictureStore.load(self.run.pictures, read_drawings(self.run.data), self.device)
        self.log.write("pictures", count=len(store.drawings), processes=self.team.size, left=self.clock.left())
        return store

    def _time_for(self, stage_left: float, start: dict[str, float] = START_SECONDS) -> bool:
        (left,) = self.team.agreed(self.clock.left())
        return stage_left > 0 and left > start[self.kind] + RESERVE_SECONDS[self.kind]

    def _features(self, store: PictureStore) -> torch.Tensor:
        path = self.folders.work / "features.pt"
        vae = load_vae(self.run.preset, self.folders.work, self.device)
        if path.exists():
            features = torch.load(path, map_location=self.device, weights_only=True)
            if len(features) == len(store.drawings):
                return features
        features = encode_pictures(vae, store, self.log, self.team)
        self.team.wait()  # so that no one finds half a file
        if self.team.lead:
            torch.save(features, path)
        return features

    def train(self, store: PictureStore) -> None:
        """All stages that are not complete, one after another, until the time is over."""
        preset, reserve = self.run.preset, RESERVE_SECONDS[self.kind]
        vae_left = self._vae_left()
        if self.run.goal == "transformer" and vae_left > 0:
            raise TrainingError(f"the VAE has {vae_left:.0f} seconds of its training left; run the stage `vae` first")
        if self._time_for(vae_left, VAE_START_SECONDS):
            if self.team.lead:
                (self.folders.work / "features.pt").unlink(missing_ok=True)
            train_vae(
                preset, store, self.held_out, self.device, self.folders, self.state, self.clock, self.log, reserve,
                self.team,
            )  # fmt: skip
        if self.run.goal == "vae" or self._vae_left() > 0:
            return
        left = [p for p in preset.phases if self.state.stage(p.name).seconds < p.seconds]
        if not left or not self._time_for(1):
            return
        training = TransformerTraining(
            preset, load_vae(preset, self.folders.work, self.device), store, self._features(store),
            Tokenizer(self.run.tokenizer), self.held_out, self.device, self.folders, self.state, self.team,
        )  # fmt: skip
        for phase in left:
            if not self._time_for(phase.seconds - self.state.stage(phase.name).seconds):
                return
            train_phase(training, phase, self.clock, self.log, reserve)

    def _vae_left(self) -> float:
        """Seconds of its training; none once the transformer has begun to learn its bits, whatever the budget is."""
        if any(self.state.stage(phase.name).steps for phase in self.run.preset.phases):
            return 0.0
        return max(0.0, self.run.preset.vae_seconds - self.state.stage("vae").seconds)

    def complete(self) -> bool:
        """Whether every stage has had its seconds."""
        return self._vae_left() == 0 and all(
            self.state.stage(phase.name).seconds >= phase.seconds for phase in self.run.preset.phases
        )

    def evaluate(self, store: PictureStore) -> None:
        """The report, if there is a model and time."""
        (left,) = self.team.agreed(self.clock.left())
        if left * self.team.size < EVALUATION_SECONDS[self.kind] and self.run.goal == "run":
            self.log.write("evaluation", skipped="too little time is left; run again")
            return
        preset, work = self.run.preset, self.folders.work
        evaluator = Evaluator(
            preset, TextToBits.load(preset, work, self.device), load_vae(preset, work, self.device),
            Tokenizer(self.run.tokenizer), store, self.device, self.log, self.team,
        )  # fmt: skip
        evaluate(evaluator, self.folders.out, None, limit=self.run.list_limit)

    def all(self) -> None:
        """One run."""
        store = self.pictures()
        if self.run.goal != "evaluate":
            self.train(store)
        if self.run.goal == "evaluate" or (self.run.goal == "run" and self.complete()):
            self.evaluate(store)
        if self.team.lead:
            self.state.save(self.folders.work)
            self.state.save(self.folders.out)
        seconds = {name: round(stage.seconds) for name, stage in self.state.stages.items()}
        self.log.write("end", complete=self.complete(), **seconds, left=self.clock.left())


def run_all(run: Run) -> None:
    """Continues the training."""
    if run.seconds <= 0:
        raise TrainingError(f"--seconds {run.seconds:g}: a run takes more than 0 seconds", 2)
    clock, size = Clock(run.seconds), size_for(run.device, run.processes)
    for folder in (run.folders.work, run.folders.out):
        folder.mkdir(parents=True, exist_ok=True)
    render(read_drawings(run.data), run.pictures, run.preset.pixels, run.workers)
    start(size, _run, run, clock)


def _run(team: Team, run: Run, clock: Clock) -> None:
    Runner(team, run, clock).all()
