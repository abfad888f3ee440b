"""Trains text encoder and transformer together on the bits of the trained VAE, phase by phase: short prefixes first."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import Folders, resume, save
from .config import Phase, Preset
from .errors import TrainingError
from .files import load_shards
from .graphs import Recorder
from .loop import Clock, SaveTimer, State, StepTimer, compile_parts, cosine, eager
from .progress import Log
from .quantise import Pyramid
from .render import PictureStore
from .sampling import Settings, walk
from .sheets import write_sheet
from .team import Team
from .text_encoder import PAD, T5Encoder
from .tokens import Tokenizer, caption_table
from .transformer import Infinity, Layout
from .vae import BsqVae

SELF_CORRECTION = 0.3
GUIDANCE_DROPOUT = 0.1
WEIGHT_DECAY = 0.03
SHEET_PROMPTS = (
    "red heart, noto style",
    "grinning face, 3d style",
    "rocket, 3d style",
    "snowman, flat style",
    "pizza, twitter style",
    "cat face, noto style",
    "sailboat, noto style",
    "fish, noto style",
    "bicycle, flat style",
    "hamburger, 3d style",
    "house, noto style",
    "crying face, blob style",
    "flag japan, twitter style",
    "woman astronaut, noto style",
    "evergreen tree, fx style",
    "purple heart",
)


class TextToBits(nn.Module):
    """Text encoder and transformer: what is trained here, what is saved as `ar-*.safetensors`."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.text_encoder, self.transformer = T5Encoder(preset.text), Infinity(preset)

    @staticmethod
    def load(preset: Preset, folder: Path, device: torch.device) -> "TextToBits":
        """The averaged model of a folder."""
        model = TextToBits(preset).to(device).eval().requires_grad_(False)
        tensors = load_shards(folder, "ar")
        if not tensors:
            raise TrainingError(f"{folder}: no ar-0.safetensors; run the stage `transformer` first")
        model.load_state_dict(tensors)
        return model

    @torch.no_grad()
    def draw(
        self, vae: BsqVae, pyramid: Pyramid, tokenizer: Tokenizer, prompts: list[str], settings: Settings,
        scales: int | None = None, device: torch.device | None = None,
    ) -> Tensor:  # fmt: skip
        """Prompts to pictures [N, 3, H, W] in -1..1."""
        ids = tokenizer.batch(prompts).to(device or next(self.parameters()).device)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            states = self.text_encoder(ids).float()
            summed, _ = walk(self.transformer, pyramid, states, ids != PAD, settings, scales)
            return vae.decoder(summed).float()


@torch.no_grad()
def encode_pictures(vae: BsqVae, store: PictureStore, log: Log, team: Team) -> Tensor:
    """Features [N, d, n, n] f16 of all pictures; each process encodes its share."""
    count, side = len(store.drawings), store.pictures.shape[-1] // vae.size.patch
    features = torch.zeros(count, vae.size.bits, side, side, dtype=torch.float16, device=store.device)
    for part in torch.arange(count).split(64)[team.rank :: team.size]:
        x = store.batch(part)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            features[part[0] : part[-1] + 1] = vae.encoder(x).half()
    log.write("features", pictures=count)
    return team.sum(features)  # zero where others were at work


def scale_weights(sides: tuple[int, ...], device: torch.device) -> Tensor:
    """Weight of each token [L]: a scale as a whole counts with the square root of its side, so early ones matter."""
    parts = [torch.full((s * s,), s**0.5 / s**2) for s in sides]
    weights = torch.cat(parts).to(device)
    return weights / weights.sum()


def parameter_groups(model: TextToBits, preset: Preset) -> list[dict]:
    """Matrices decay, the rest does not; what reads the text learns faster, since each caption is seen more seldom."""
    undecayed = ("embed", "cfg_uncond", "pos_start", "ada_gss", "scale_mul", "shared.", "relative_attention_bias")
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        text = name.startswith("text_encoder") or ".text_" in name or ".cfg_uncond" in name
        decays = parameter.ndim >= 2 and not any(part in name for part in undecayed)
        groups.setdefault((text, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": WEIGHT_DECAY if decays else 0.0,
            "factor": preset.text_lr_factor if text else 1.0,
        }
        for (text, decays), parameters in groups.items()
    ]


class TransformerTraining:
    """The model with its average, optimizer and data."""

    def __init__(
        self, preset: Preset, vae: BsqVae, store: PictureStore, features: Tensor, tokenizer: Tokenizer,
        held_out: set[str], device: torch.device, folders: Folders, state: State, team: Team,
    ) -> None:  # fmt: skip
        self.team = team
        self.preset, self.device, self.folders, self.state = preset, device, folders, state
        self.vae, self.tokenizer, self.features = vae, tokenizer, features
        if len(tokenizer) > preset.text.vocab:
            raise TrainingError(
                f"the tokenizer has {len(tokenizer)} pieces, the text encoder of the preset {preset.name} has room for "
                f"{preset.text.vocab}"
            )
        self.pyramid = Pyramid(preset.scales, device)
        self.model = TextToBits(preset).to(device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, preset), lr=1e-3, betas=(0.9, 0.95), fused=device.type == "cuda"
        )
        self.parameters = list(self.model.parameters())
        self.ema = resume(folders, "ar", self.model, self.optimizer, 0.9995, 20_000, device)
        team.align([*self.model.state_dict().values(), *self.ema.tensors.values()])
        torch.manual_seed(1000 * state.runs + team.rank)
        self.compiled: list[nn.Module] = list(self.model.transformer.all_blocks())
        if device.type == "cuda":
            compile_parts(self.compiled)
        self.captions = caption_table(
            tokenizer, store.drawings, preset.captions_a_picture, preset.text_tokens, seed=state.runs
        ).to(device)
        self._probability = store.training_weights(held_out)
        self._rng = np.random.default_rng((1000 + state.runs, team.rank))
        self._recorder = Recorder(self.parameters, device)
        self._layouts: dict[int, tuple[Layout, Tensor]] = {}

    def _layout(self, scales: int) -> tuple[Layout, Tensor]:
        if scales not in self._layouts:
            layout = self.model.transformer.layout(scales, self.device)
            self._layouts[scales] = (layout, scale_weights(self.preset.scales[:scales], self.device))
        return self._layouts[scales]

    def _batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Features [B, d, n, n] and caption ids [B, T]."""
        index = torch.from_numpy(self._rng.choice(len(self._probability), count, p=self._probability)).to(self.device)
        variant = torch.randint(0, self.captions.shape[1], (count,), device=self.device)
        return self.features[index].float(), self.captions[index, variant].long()

    def step(self, scales: int, count: int) -> tuple[Tensor, Tensor]:
        """One step on `count` pictures of this process; returns the loss and the share of right bits of each scale."""
        loss, right = self._recorder.run((scales, count), partial(self._differentiate, scales), *self._batch(count))
        self.team.average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step()
        return loss, right

    def _differentiate(self, scales: int, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a step, its loss, and the share of right bits of each scale.

        It is recorded: nothing in it may copy from the host or depend on a value.
        """
        words, bits = self.pyramid.training_inputs(features, scales, SELF_CORRECTION)
        layout, weights = self._layout(scales)
        mask = ids != PAD
        on_gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            states = self.model.text_encoder(ids).float()
            dropped = torch.rand(len(ids), device=self.device) < GUIDANCE_DROPOUT
            text = self.model.transformer.read_text(states, mask, dropped)
            logits = self.model.transformer(text, words, layout)
        errors = F.binary_cross_entropy_with_logits(logits.float(), bits.float(), reduction="none").mean(-1)
        loss = (errors * weights).sum(1).mean()
        loss.backward()
        with torch.no_grad():
            right = ((logits > 0) == bits).float().mean((0, 2))
            parts = right.split([s * s for s in self.preset.scales[:scales]])
            return loss.detach(), torch.stack([part.mean() for part in parts])

    def set_rate(self, rate: float) -> None:
        """The rate of the transformer; groups with a factor get a multiple."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]

    def save(self) -> None:
        """Everything into the work folder, the average as bf16 into the output folder."""
        save(self.folders, "ar", self.model, self.optimizer, self.ema, self.state, self.team)

    def write_samples(self, name: str, scales: int) -> None:
        """A sheet of the same prompts as ever, drawn by the average."""
        with self.ema.applied(), eager(self.compiled):
            self.model.eval()
            prompts = list(SHEET_PROMPTS if self.device.type == "cuda" else SHEET_PROMPTS[:4])
            pictures = [
                self.model.draw(self.vae, self.pyramid, self.tokenizer, prompts, settings, scales)
                for settings in (Settings(cfg=3, tau=0.7), Settings(cfg=5, tau=0.5))
            ]
            self.model.train()
        write_sheet(torch.cat(pictures), self.folders.out / f"sheet-{name}.jpg", columns=min(8, len(prompts)))


def train_phase(training: TransformerTraining, phase: Phase, clock: Clock, log: Log, reserve: float) -> None:
    """Trains until the phase's seconds are spent or `reserve` seconds of the clock are left; saves, draws samples."""
    stage, timer, here = training.state.stage(phase.name), StepTimer(training.preset.step_seconds), 0
    rng, saves = np.random.default_rng(stage.steps + 17), SaveTimer()
    shares = np.array([share for _, _, share in phase.mix])
    losses: dict[int, list[tuple[Tensor, Tensor]]] = {}
    team = training.team
    (left,) = team.agreed(clock.left())
    while stage.seconds < phase.seconds and left > reserve:
        progress = stage.seconds / phase.seconds
        training.set_rate(
            cosine(phase.lr_first, phase.lr_last, progress) * min(1.0, (here + 1) / training.preset.warm_steps)
        )
        scales, count, _ = phase.mix[rng.choice(len(shares), p=shares / shares.sum())]
        figures = training.step(scales, count)
        losses.setdefault(scales, []).append(figures)
        here, stage.steps, stage.pictures = here + 1, stage.steps + 1, stage.pictures + count * team.size
        if here % 10 == 0 or here < 5:
            figures[0].item()  # so that the clock tells what was done, not what was asked for
        lap, left, due = team.agreed(timer.lap(), clock.left(), saves.due())
        stage.seconds += lap * team.size
        if due:
            training.save()
        if here % 200 == 0:
            _report(phase.name, training, stage.seconds, stage.steps, losses, clock, log)
            losses = {}
    _report(phase.name, training, stage.seconds, stage.steps, losses, clock, log)
    training.save()
    if team.lead:
        training.write_samples(phase.name, phase.scales)
    team.wait()


def _report(
    name: str, training: TransformerTraining, seconds: float, steps: int,
    losses: dict[int, list[tuple[Tensor, Tensor]]], clock: Clock, log: Log,
) -> None:  # fmt: skip
    pictures = training.state.stage(name).pictures
    for scales, figures in sorted(losses.items()):
        loss = torch.stack([loss for loss, _ in figures]).mean().item()
        right = torch.stack([right for _, right in figures]).mean(0).tolist()
        log.write(name, seconds=seconds, steps=steps, pictures=pictures, scales=scales, loss=loss,
                  right=[round(r, 4) for r in right], left=clock.left())  # fmt: skip
