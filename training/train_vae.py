"""Trains the BSQ-VAE: whole pictures, all scales, some pictures with the last scales left out."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import Folders, resume, save
from .config import Preset
from .errors import TrainingError
from .files import load_shards
from .graphs import Recorder
from .loop import Clock, SaveTimer, State, StepTimer, compile_parts, cosine, eager
from .progress import Log
from .quantise import Pyramid
from .render import PictureStore
from .sheets import write_sheet
from .team import Team
from .vae import BsqVae, psnr, reconstruction_loss, straight_through

COMMITMENT = 0.5
# How many of the last scales a picture is decoded without, and how often.
DROPPED = {0: 0.62, 1: 0.10, 2: 0.18, 3: 0.04, 4: 0.02, 5: 0.02, 6: 0.02}


def load_vae(preset: Preset, folder: Path, device: torch.device) -> BsqVae:
    """The averaged VAE of a folder with `vae-*.safetensors`."""
    vae = BsqVae(preset.vae).to(device).eval().requires_grad_(False)
    tensors = load_shards(folder, "vae")
    if not tensors:
        raise TrainingError(f"{folder}: no vae-0.safetensors; run the stage `vae` first")
    vae.load_state_dict(tensors)
    return vae


def kept_scales(batch: int, scales: int, device: torch.device) -> Tensor:
    """Scales to keep of each picture [B]; some lose their last ones."""
    drop = torch.multinomial(torch.tensor(list(DROPPED.values()), device=device), batch, replacement=True)
    return (scales - drop).clamp_min(1)


@torch.no_grad()
def reconstruct(vae: BsqVae, pyramid: Pyramid, pictures: Tensor, dropped: int = 0) -> Tensor:
    """Pictures [B, 3, H, W] to pictures, without the last `dropped` scales."""
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=pictures.is_cuda):
        features = vae.encoder(pictures).float()
        return vae.decoder(pyramid.quantise(features, dropped)).float()


def measure(vae: BsqVae, pyramid: Pyramid, store: PictureStore, index: Tensor, dropped: int) -> float:
    """Mean PSNR in dB over the pictures of `index`."""
    values = []
    for part in index.split(16):
        x = store.batch(part)
        values.append(psnr(reconstruct(vae, pyramid, x, dropped), x))
    return torch.cat(values).mean().item()


class VaeTraining:
    """The model with its average and optimizer."""

    def __init__(self, preset: Preset, device: torch.device, folders: Folders, state: State, team: Team) -> None:
        self.team = team
        self.preset, self.device, self.folders, self.state = preset, device, folders, state
        self.pyramid = Pyramid(preset.scales, device)
        self.vae = BsqVae(preset.vae).to(device)
        self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = list(self.vae.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=preset.vae_lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=device.type == "cuda"
        )
        self.ema = resume(folders, "vae", self.vae, self.optimizer, 0.999, 10_000, device)
        team.align([*self.vae.state_dict().values(), *self.ema.tensors.values()])
        torch.manual_seed(1000 * state.runs + team.rank)
        if device.type == "cuda":
            compile_parts(list(self.vae.res_blocks()))
        self._recorder = Recorder(self.parameters, device)

    def step(self, x: Tensor) -> Tensor:
        """One step on pictures x; returns the loss, on the device."""
        kept = kept_scales(len(x), len(self.pyramid.scales), self.device)
        (loss,) = self._recorder.run(x.shape, self._differentiate, x, kept)
        self.team.average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step()
        return loss

    def _differentiate(self, x: Tensor, kept: Tensor) -> tuple[Tensor]:
        """Gradients of a step, and its loss. It is recorded: nothing in it may copy from the host or depend on a
        value."""
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=x.is_cuda, cache_enabled=False):
            features = self.vae.encoder(x).float()
            summed, whole = self.pyramid.quantise_both(features, kept)
            z = straight_through(features, summed).contiguous(memory_format=torch.channels_last)
            picture = self.vae.decoder(z).float()
        loss = reconstruction_loss(picture, x) + COMMITMENT * F.mse_loss(features, whole)
        loss.backward()
        return (loss.detach(),)

    def save(self) -> None:
        """Everything into the work folder, the average as bf16 into the output folder."""
        save(self.folders, "vae", self.vae, self.optimizer, self.ema, self.state, self.team)


def train_vae(
    preset: Preset, store: PictureStore, held_out: set[str], device: torch.device, folders: Folders, state: State,
    clock: Clock, log: Log, reserve: float, team: Team,
) -> None:  # fmt: skip
    """Trains until the stage's seconds are spent or `reserve` seconds of the clock are left, and saves."""
    training = VaeTraining(preset, device, folders, state, team)
    stage, timer, saves = state.stage("vae"), StepTimer(preset.step_seconds), SaveTimer()
    rng = np.random.default_rng((stage.steps + 1, team.rank))
    weights = store.training_weights(held_out)
    unseen = torch.tensor([i for i, d in enumerate(store.drawings) if d.key in held_out][:48] or [0], device=device)
    here, losses = 0, torch.zeros((), device=device)
    (left,) = team.agreed(clock.left())
    while stage.seconds < preset.vae_seconds and left > reserve:
        rate = cosine(preset.vae_lr, preset.vae_lr * 0.01, stage.seconds / preset.vae_seconds)
        for group in training.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (here + 1) / preset.warm_steps)
        index = torch.from_numpy(rng.choice(len(weights), preset.vae_batch, p=weights))
        losses += training.step(store.batch(index))
        here, stage.steps, stage.pictures = here + 1, stage.steps + 1, stage.pictures + preset.vae_batch * team.size
        if here % 10 == 0 or here < 5:
            losses.item()  # so that the clock tells what was done, not what was asked for
        lap, left, due = team.agreed(timer.lap(), clock.left(), saves.due())
        stage.seconds += lap * team.size
        if due:
            training.save()
        if here % 250 == 0:
            log.write("vae", seconds=stage.seconds, steps=stage.steps, loss=losses.item() / 250, rate=rate,
                      left=left)  # fmt: skip
            losses.zero_()
    if team.lead:
        _show(training, store, unseen, log)
    training.save()


def _show(training: VaeTraining, store: PictureStore, unseen: Tensor, log: Log) -> None:
    """Measures the average on pictures that training never saw, and draws some."""
    stage, folders = training.state.stage("vae"), training.folders
    with training.ema.applied(), eager(list(training.vae.res_blocks())):
        training.vae.eval()
        figures = [measure(training.vae, training.pyramid, store, unseen, d) for d in range(4)]
        log.write("vae held out", seconds=stage.seconds, steps=stage.steps, psnr_dropped_0_1_2_3=figures)
        x = store.batch(unseen[:8])
        rows = [x, *(reconstruct(training.vae, training.pyramid, x, d) for d in (0, 2, 3))]
        write_sheet(torch.cat(rows), folders.out / "sheet-vae.jpg", columns=len(x))
        training.vae.train()
