"""Evaluation report of a trained model: reconstruction, prompt following, attention, a sample sheet."""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_report import attention_properties
from .config import Preset
from .data import read_list
from .errors import TrainingError
from .files import write_bytes, write_json
from .progress import Log, Progress
from .quantise import Pyramid
from .render import PictureStore
from .sampling import Settings
from .sheets import smaller, write_sheet
from .team import Team
from .tokens import Tokenizer
from .train_transformer import TextToBits
from .train_vae import measure
from .vae import BsqVae

BARS = {
    "psnr_all_scales": 27.0,
    "psnr_without_last_two": 25.0,
    "noto_top5": 0.70,
    "unseen_top5": 0.40,
}
GUIDANCE = (1.5, 2.0, 3.0, 4.0)
TEMPERATURE = (0.3, 0.5, 0.7, 1.0)


class Following(NamedTuple):
    """How often the named picture is among the nearest of its style."""

    top1: float
    top5: float
    prompts: int
    ranks: dict[str, int]  # of each key: pictures of the style that are nearer than the named one


class Evaluator:
    """A model with the pictures that its drawings are compared with."""

    def __init__(
        self, preset: Preset, model: TextToBits, vae: BsqVae, tokenizer: Tokenizer, store: PictureStore,
        device: torch.device, log: Log, team: Team, batch: int = 32,
    ) -> None:  # fmt: skip
        self.team = team
        self.preset, self.model, self.vae, self.tokenizer, self.store = preset, model, vae, tokenizer, store
        self.device, self.log, self.batch = device, log, batch
        self.pyramid = Pyramid(preset.scales, device)
        self.where = {d.key: i for i, d in enumerate(store.drawings)}
        index = torch.arange(len(store.drawings), device=device)
        self.small = torch.cat([smaller(store.batch(part)).flatten(1) for part in index.split(256)])  # [N, 3*64*64]
        styles = sorted({d.style for d in store.drawings})
        self.of_style = {
            s: torch.tensor([i for i, d in enumerate(store.drawings) if d.style == s], device=device) for s in styles
        }

    def known(self, name: str, limit: int | None = None) -> list[str]:
        """Keys of a stored list that were rendered."""
        keys = [key for key in read_list(name) if key in self.where][:limit]
        if not keys:
            raise TrainingError(f"none of the drawings of training/lists/{name}.txt is in the data folder")
        return keys

    def draw(self, prompts: list[str], settings: Settings, scales: int | None = None) -> Tensor:
        """Prompts to small pictures [N, 3*64*64]; the team shares the work, and pictures are the same in any team."""
        drawn = torch.zeros(len(prompts), self.small.shape[1], device=self.device)
        progress = Progress(f"drawing {len(prompts)} prompts", len(prompts), quiet=not self.team.lead)
        for begin in range(self.batch * self.team.rank, len(prompts), self.batch * self.team.size):
            some = prompts[begin : begin + self.batch]
            pictures = self.model.draw(
                self.vae, self.pyramid, self.tokenizer, some, settings._replace(seed=settings.seed + begin), scales
            )
            drawn[begin : begin + len(some)] = smaller(pictures.clamp(-1, 1)).flatten(1)
            progress.step(len(some) * self.team.size)
        return self.team.sum(drawn)

    def rank(self, keys: list[str], drawn: Tensor) -> Following:
        """Ranks each drawn picture's named picture among all pictures of its style by L2 of 64x64 RGB."""
        ranks: dict[str, int] = {}
        for key, picture in zip(keys, drawn, strict=True):
            target = self.where[key]
            others = self.small[self.of_style[self.store.drawings[target].style]]
            distance = (others - picture).square().sum(1)
            own = (self.small[target] - picture).square().sum()
            ranks[key] = int((distance < own * (1 - 1e-6)).sum())  # the same drawing under two names ties
        values = list(ranks.values())
        count = max(len(values), 1)
        top1, top5 = sum(r < 1 for r in values) / count, sum(r < 5 for r in values) / count
        return Following(top1, top5, len(values), ranks)

    def follow(self, keys: list[str], settings: Settings, scales: int | None = None) -> Following:
        """Draws the prompt of each key and ranks it."""
        prompts = [self.store.drawings[self.where[key]].prompt for key in keys]
        return self.rank(keys, self.draw(prompts, settings, scales))

    def choose_defaults(self, limit: int | None = None) -> tuple[Settings, list[dict]]:
        """Guidance and temperature by names that no other figure uses; the last scales hardly change 64x64 pictures."""
        keys, table = self.known("validation", limit), []
        scales = min(10, len(self.preset.scales))
        for cfg in GUIDANCE:
            for tau in TEMPERATURE:
                result = self.follow(keys, Settings(cfg=cfg, tau=tau, seed=7), scales)
                table.append({"cfg": cfg, "tau": tau, "top1": result.top1, "top5": result.top5})
                self.log.write("defaults", **table[-1])
        best = max(table, key=lambda row: (row["top1"] + row["top5"], -row["cfg"]))
        return Settings(cfg=best["cfg"], tau=best["tau"]), table

    def reconstruction(self, held_out: set[str], limit: int = 200) -> dict[str, float]:
        """Mean PSNR in dB on pictures that training never saw, without the last 0 to 3 scales."""
        index = [i for i, d in enumerate(self.store.drawings) if d.key in held_out][:limit]
        where = torch.tensor(index or [0], device=self.device)
        return {
            str(dropped): measure(self.vae, self.pyramid, self.store, where, dropped)
            for dropped in range(min(4, len(self.preset.scales)))
        }

    def attention(self, keys: list[str], settings: Settings) -> list[dict[str, float]]:
        """The three properties per layer over a few prompts."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"), torch.no_grad():
            states = [
                self.model.text_encoder(
                    self.tokenizer.batch([self.store.drawings[self.where[k]].prompt]).to(self.device)
                ).float()
                for k in keys
            ]
            return attention_properties(self.model.transformer, self.pyramid, states, settings)

    def sample_sheet(self, path: Path, settings: Settings, seed: int = 11) -> list[str]:
        """6x6 drawings of prompts drawn by lot from the training names; returns the prompts, row by row."""
        unseen = set(read_list("unseen"))
        base = [d for d in self.store.drawings if not d.toned and d.key not in unseen]
        prompts = [d.prompt for d in random.Random(seed).sample(base, min(36, len(base)))]
        pictures = [
            self.model.draw(self.vae, self.pyramid, self.tokenizer, prompts[i : i + 12], settings).cpu()
            for i in range(0, len(prompts), 12)
        ]
        write_sheet(torch.cat(pictures), path, columns=6, side=160)
        return prompts


def evaluate(evaluator: Evaluator, out: Path, settings: Settings | None, limit: int | None = None) -> dict:
    """Writes report.json, report.md and sheet-36.jpg into `out`; `limit` shortens every list (for tests).

    The whole team draws, the lead does the rest and has the report; the others get an empty one.
    """
    report: dict = {"preset": evaluator.preset.name}
    if settings is None:
        settings, report["defaults_table"] = evaluator.choose_defaults(limit)
    report["defaults"] = {"cfg": settings.cfg, "tau": settings.tau}
    for name in ("noto", "unseen"):
        following = evaluator.follow(evaluator.known(name, limit), settings)
        report[name] = following._asdict()
        evaluator.log.write("following", list=name, top1=following.top1, top5=following.top5, prompts=following.prompts)
    if not evaluator.team.lead:
        return {}
    report["psnr"] = evaluator.reconstruction(set(read_list("unseen")), limit or 200)
    if len(evaluator.preset.scales) > 5:
        report["attention"] = evaluator.attention(evaluator.known("validation", 4), settings)
    report["sheet_prompts"] = evaluator.sample_sheet(out / "sheet-36.jpg", settings)
    dropped_two = report["psnr"].get("2", float("nan"))
    reached = {
        "psnr_all_scales": report["psnr"]["0"],
        "psnr_without_last_two": dropped_two,
        "noto_top5": report["noto"]["top5"],
        "unseen_top5": report["unseen"]["top5"],
    }
    report["bars"] = {
        name: {"bar": bar, "reached": reached[name], "met": reached[name] >= bar} for name, bar in BARS.items()
    }
    write_json(out / "report.json", report)
    write_bytes(out / "report.md", as_markdown(report).encode())
    return report


def as_markdown(report: dict) -> str:
    """The report for people."""
    lines = ["# Evaluation", "", "| bar | wanted | reached | met |", "|---|---|---|---|"]
    for name, row in report["bars"].items():
        lines.append(f"| {name} | {row['bar']} | {row['reached']:.3f} | {'yes' if row['met'] else 'no'} |")
    psnr = ", ".join(f"{value:.2f} dB without the last {d}" for d, value in report["psnr"].items())
    lines += [
        "",
        f"Held-out pictures through the VAE: {psnr}.",
        f"Drawn at cfg {report['defaults']['cfg']}, tau {report['defaults']['tau']}.",
        "",
        "| list | prompts | top-1 | top-5 |",
        "|---|---|---|---|",
    ]
    for name in ("noto", "unseen"):
        row = report[name]
        lines.append(f"| {name} | {row['prompts']} | {row['top1']:.3f} | {row['top5']:.3f} |")
    if "attention" in report:
        lines += ["", "| layer | first five scales | inside the windows | cross-scale correlation |"]
        lines.append("|---|---|---|---|")
        for i, row in enumerate(report["attention"]):
            lines.append(f"| {i} | {row['sinks']:.3f} | {row['windows']:.3f} | {row['similarity']:.3f} |")
    return "\n".join(lines) + "\n"
