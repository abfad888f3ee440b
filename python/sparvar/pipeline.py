"""Pictures from prompts, in the manner of diffusers."""

from __future__ import annotations

import contextlib
import operator
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import _engine, plans
from .analysis import counter
from .errors import UsageError
from .report import Report

_DTYPES = {"bfloat16": True, "bf16": True, "float32": False, "f32": False, "float": False}
_WEIGHTS = {
    "auto": _engine.WeightFormat.as_stored,
    "plain": _engine.WeightFormat.plain,
    "fp8": _engine.WeightFormat.fp8,
}
_OUTPUTS = ("pil", "np", "pt")
_SEEDS = 1 << 64


class Seed(NamedTuple):
    """What draws one picture again: `pipe(prompt, seed=out.seeds[3])`."""

    seed: int
    picture: int  # its number in the run, which its random numbers are counted by


@dataclass(frozen=True)
class ScaleTiming:
    """One scale, summed over batches."""

    grid: tuple[int, int]  # height and width in tokens
    seconds: float
    cold_seconds: float  # the part in batches of a shape that this pipeline had not drawn before
    attention_seconds: float  # 0 on a GPU
    share_of_pairs: float  # of query-key pairs computed, mean over layers


@dataclass(frozen=True)
class Timings:
    """Where the time of a run went, in seconds."""

    scales: tuple[ScaleTiming, ...]
    text_seconds: float
    decode_seconds: float
    cold_decode_seconds: float
    preview_seconds: float
    total_seconds: float
    batches: int
    cold_batches: int
    recordings: int  # programs that a GPU recorded
    attention: str  # which attention ran where, and why


@dataclass
class PipelineOutput:
    """What a call of the pipeline returns."""

    images: Any
    """"pil": list of PIL.Image; "np": float32 (pictures, height, width, 3), 0 to 1; "pt": float32 tensor (pictures, 3,
    height, width), 0 to 1. Prompt 0's pictures, then prompt 1's, ..."""
    timings: Timings
    seeds: list[Seed]

    def __iter__(self) -> Iterator[Any]:
        yield self.images


@dataclass(frozen=True)
class ScaleState:
    """What a callback is told after a scale."""

    scale: int  # counted from 0
    scales: int  # of one batch
    batch: int
    batches: int
    grid: tuple[int, int]
    seconds: float
    previews: list[Image.Image] = field(default_factory=list)
    """The batch's pictures of the scales so far; empty unless `callback_previews` asks for them, before its first scale
    and after the last one, whose pictures are the result."""


Callback = Callable[["Pipeline", int, ScaleState], Any]
Numbers: TypeAlias = float | Sequence[float] | None


class Pipeline:
    """A loaded model. Make one with `Pipeline.from_pretrained`.

    May be called from several threads, which then draw one after the other. Ctrl-C stops a run within a layer or so on
    the CPU, after the scales that were enqueued on a GPU, and the pipeline can be used again.
    """

    def __init__(self, engine: _engine.Engine, dtype: str) -> None:
        self._engine = engine
        self._progress: dict[str, Any] = {}
        self.dtype = dtype
        info = engine.info()
        self.info: dict[str, Any] = info
        """model_dir, model_hash, layers, heads, head_dim, schedule, picture_height, picture_width, backend, ..."""
        self.device = "cuda" if info["on_gpu"] else "cpu"

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: Any = "bfloat16",
        weights: str = "auto",
        threads: int = 0,
        progress: bool = False,
    ) -> Pipeline:
        """Loads a model folder (docs/model-format.md); nothing is downloaded. None: the bundled model, where it is.

        device: "auto" (a GPU where there is a usable one), "cpu", "cuda" or "cuda:N". dtype: "bfloat16" or "float32",
        or PyTorch's. weights: "fp8" keeps the transformer's linear layers in 8 bits on Hopper GPUs, "plain" as dtype
        says, "auto" in 8 bits where the folder's files hold them so and the device can. threads: of the CPU; 0: all.
        progress: a bar of the bytes that are read.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise UsageError(f"dtype: expected bfloat16 or float32, found {dtype}")
        if weights not in _WEIGHTS:
            raise UsageError(f"weights: expected auto, plain or fp8, found {weights!r}")
        if threads < 0 or threads > 1024:
            raise UsageError(f"threads: expected 0 (all) to 1024, found {threads}")
        folder = "" if model is None else os.fspath(model)
        if folder and not os.path.isdir(folder):
            raise UsageError(f"{folder}: no such folder; a model is a folder on this machine, nothing is downloaded")
        bar = _Bar({"disable": not progress, "unit": "B", "unit_scale": True, "desc": "loading"})
        with contextlib.closing(bar):
            on_progress = bar.to if progress else None
            engine = _engine.Engine(folder, device, _DTYPES[name], _WEIGHTS[weights], threads, on_progress)
        return cls(engine, "bfloat16" if _DTYPES[name] else "float32")

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm's bar over the scales, as in diffusers: `disable=True` leaves it out."""
        self._progress = options

    @property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """The grids of a picture, (height, width) in tokens."""
        return tuple(self.info["schedule"])

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        *,
        guidance_scale: Numbers = None,
        tau: Numbers = None,
        top_k: int = 0,
        top_p: float = 0.97,
        greedy: bool = False,
        seed: int | Seed | None = None,
        generator: Any = None,
        first_picture: int = 0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        aspect: str | None = None,
        size: str | None = None,
        skip_scales: int = 0,
        uncond_until: int | None = None,
        attention: str | os.PathLike[str] | plans.Plan | None = None,
        batch_size: int = 0,
        output_type: str = "pil",
        callback_on_scale_end: Callback | None = None,
        callback_previews: int | bool = False,
    ) -> PipelineOutput:
        """Draws pictures.

        prompt: one, or several. negative_prompt: refused, as these models learned what "no prompt" means and take no
        other. guidance_scale, tau (temperature): one number or one per scale; None: the model's. top_p: a bit whose
        rarer value has a probability of at most 1 - top_p takes the other; 0: off. top_k: 1 takes the likelier value,
        others change nothing. greedy: the likelier value of every bit.

        seed: 0 to 2^64 - 1, or a `Seed` of an earlier output. generator: a `torch.Generator` or
        `numpy.random.Generator` that a seed is drawn from, or an int, which is the seed. Neither: a fresh seed, which
        `output.seeds` tells. first_picture: number of the first picture, which its random numbers are counted by.

        height, width: pixels of one of the model's sizes; or aspect, "W:H", and size, "0.06M", "0.25M", "0.60M", "1M".
        skip_scales: leave out the last 0 to 2. uncond_until: guidance ends at this scale.

        attention: a preset's name, the path of a JSON file (*.json), or a `sparvar.Plan`. None: the plan.json of the
        model's folder, for pictures of as many scales as the model has; where there is none, or for other sizes,
        sparvar on the CPU, dense on a GPU. batch_size: pictures that are drawn together; 0: as many as need little
        memory.

        output_type: "pil", "np" or "pt"; see `PipelineOutput`. callback_on_scale_end(pipe, scale, state) is called
        after every scale, with a `ScaleState`; what it raises ends the run. callback_previews: True, or the first scale
        to show: the state has pictures of the scales so far (each costs a run of the decoder).
        """
        if output_type not in _OUTPUTS:
            raise UsageError(f"output_type: expected pil, np or pt, found {output_type!r}")
        if output_type == "pt":
            _torch()  # said before the picture is drawn
        if negative_prompt:
            raise UsageError(
                "negative_prompt: these models learned what no prompt means and take no other; leave it out"
            )
        if callback_previews is not False and callback_on_scale_end is None:
            raise UsageError("callback_previews: there is no callback_on_scale_end to show them to")
        options = _engine.GenerateOptions()
        options.prompts = _prompts(prompt)
        options.pictures_per_prompt = _whole("num_images_per_prompt", num_images_per_prompt)
        options.aspect, options.size = self._shape(height, width, aspect or "", size or "")
        options.guidance_scale = _numbers("guidance_scale", guidance_scale)
        options.tau = _numbers("tau", tau)
        options.top_k = _whole("top_k", top_k)
        options.top_p = _number("top_p", top_p)
        options.greedy = bool(greedy)
        options.skip_scales = _whole("skip_scales", skip_scales)
        options.uncond_until = -1 if uncond_until is None else _whole("uncond_until", uncond_until)
        options.batch = _whole("batch_size", batch_size)
        if isinstance(seed, Seed):
            first_picture = seed.picture
        options.seed = _seed(seed, generator)
        options.first_picture = _whole("first_picture", first_picture, _SEEDS - 1)
        grids = _engine.picture_schedule(self.info["model_dir"], options.aspect, options.size)
        options.plan = self._plan(attention, grids)
        if callback_previews is not False:
            options.preview_from = 3 if callback_previews is True else int(callback_previews)

        bar = _Bar({"desc": "scales", **self._progress})
        watcher = _Watcher(self, bar, callback_on_scale_end, len(grids) - skip_scales)
        with contextlib.closing(bar):
            previews = None if callback_previews is False else watcher.preview
            pixels, timings = self._engine.generate(options, watcher.progress, previews)
        count = len(pixels)
        return PipelineOutput(
            images=_images(pixels, output_type),
            timings=_timings(timings),
            seeds=[Seed(options.seed, (first_picture + i) % _SEEDS) for i in range(count)],
        )

    def analyze(
        self, prompt: str | Sequence[str], *, scales: Sequence[int] | None = None, side: int = 16, seed: int = 0
    ) -> Report:
        """Draws with dense attention and looks at it: sinks, locality, similarity across scales, as `sparvar analyze`.

        prompt: one picture of each is drawn. scales: which are looked at; without, the last three. side: at most side x
        side queries of a scale, evenly spread, of the conditional half; they are counted on the CPU, wherever the
        pipeline is. `sparvar.analyze` is for other models.
        """
        count = counter(self.schedule, scales, side)
        prompts = _prompts(prompt)
        if not prompts:
            raise UsageError("analyze: no prompt; attention is that of pictures being drawn")
        bar = _Bar({"desc": "scales", **self._progress})
        steps = len(self.schedule)
        with contextlib.closing(bar):
            for number, one in enumerate(prompts):
                options = _engine.GenerateOptions()
                options.prompts = [one]
                options.seed, options.first_picture, options.batch = _seed(seed, None), number, 1
                options.plan = self._plan("dense", list(self.schedule))

                def show(_: str, done: int, *__: Any, before: int = number * steps) -> None:
                    bar.to(before + done, len(prompts) * steps)

                self._engine.generate(options, show, None, count.analyzer)
        return count.report(tuple(str(layer) for layer in range(self.info["layers"])))

    def _plan(self, attention: Any, grids: list[tuple[int, int]]) -> _engine.AttentionPlan:
        if attention is None:
            return self._engine.default_plan(len(grids))
        if isinstance(attention, plans.Plan):
            if attention.schedule is not None and list(attention.schedule) != [tuple(grid) for grid in grids]:
                raise UsageError(
                    f"attention: plan {attention.name} is made for another schedule than this picture's, of "
                    f"{len(grids)} scales up to {grids[-1][0]}x{grids[-1][1]}; make it for pipe.schedule"
                )
            return attention.handle
        name = os.fspath(attention)
        if name.endswith(".json"):
            return _engine.AttentionPlan.from_file(name)
        return _engine.AttentionPlan.preset(name, self.info["layers"], len(grids))

    def _shape(self, height: int | None, width: int | None, aspect: str, size: str) -> tuple[str, str]:
        """Ratio and size of a picture of so many pixels."""
        if height is None and width is None:
            return aspect, size
        if aspect or size:
            raise UsageError("height and width: give either them or aspect and size")
        own = (self.info["picture_height"], self.info["picture_width"])
        asked = (own[0] if height is None else height, own[1] if width is None else width)
        if asked == own:
            return "", ""
        pixels = own[0] // self.schedule[-1][0]  # a token's side
        found: dict[tuple[int, int], tuple[str, str]] = {}
        for name in _engine.aspect_names().split(", "):
            for megapixels in ("0.06M", "0.25M", "0.60M", "1M"):
                with contextlib.suppress(UsageError):  # a size that this model does not have
                    h, w = _engine.picture_schedule(self.info["model_dir"], name, megapixels)[-1]
                    found.setdefault((h * pixels, w * pixels), (name, megapixels))
        if asked not in found:
            nearest = min(found or [own], key=lambda shape: abs(shape[0] - asked[0]) + abs(shape[1] - asked[1]))
            raise UsageError(
                f"height, width: this model draws no pictures {asked[0]} high and {asked[1]} wide; the nearest are "
                f"{nearest[0]} high and {nearest[1]} wide"
            )
        return found[asked]


class _Bar:
    """tqdm's bar, where tqdm is installed and the bar not disabled."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.bar: Any = None
        self.made = False

    def to(self, done: int, total: int) -> None:
        if not self.made:
            self.made = True
            if not self.options.get("disable", False):
                with contextlib.suppress(ImportError):
                    from tqdm.auto import tqdm

                    self.bar = tqdm(total=total, **self.options)
        if self.bar is not None:
            self.bar.total = total
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _Watcher:
    """Hears of scales and previews, tells the bar and the callback."""

    def __init__(self, pipe: Pipeline, bar: _Bar, callback: Callback | None, scales: int) -> None:
        self.pipe, self.bar, self.callback, self.scales = pipe, bar, callback, scales
        self.previews: list[Image.Image] = []

    def preview(self, pixels: NDArray[np.uint8], prompt: int, picture: int, scale: int) -> None:
        self.previews.append(Image.fromarray(pixels))

    def progress(self, stage: str, done: int, total: int, grid: tuple[int, int], seconds: float) -> None:
        """`done` of `total` scales, all batches together."""
        self.bar.to(done, total)
        if stage != "scale":
            return
        previews, self.previews = self.previews, []
        if self.callback is None:
            return
        batch, scale = divmod(done - 1, self.scales)
        state = ScaleState(scale, self.scales, batch, total // self.scales, grid, seconds, previews)
        self.callback(self.pipe, scale, state)


def _prompts(prompt: Any) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    for one in prompts:
        if not isinstance(one, str):
            raise UsageError(f"prompt: expected a text or several, found {one!r}")
    return prompts


def _whole(name: str, given: Any, most: int = (1 << 31) - 1) -> int:
    try:
        number = operator.index(given)
    except TypeError as error:
        raise UsageError(f"{name}: expected a whole number, found {given!r}") from error
    if not 0 <= number <= most:
        raise UsageError(f"{name}: expected a whole number from 0 to {most}, found {number}")
    return number


def _number(name: str, given: Any) -> float:
    try:
        return float(given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: expected one number, found {given!r}") from error


def _numbers(name: str, given: Numbers) -> list[float]:
    """Nothing, one value, or one per scale."""
    if given is None:
        return []
    try:
        return [float(given)] if isinstance(given, (int, float)) else [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: expected a number or one per scale, found {given!r}") from error


def _seed(seed: int | Seed | None, generator: Any) -> int:
    if seed is not None and generator is not None:
        raise UsageError("seed and generator: give one of them")
    if isinstance(seed, Seed):
        seed = seed.seed
    if seed is None and generator is None:
        return secrets.randbits(63)
    if seed is None:
        if isinstance(generator, (int, np.integer)):
            seed = int(generator)
        elif isinstance(generator, np.random.Generator):
            seed = int(generator.integers(1 << 63))
        elif type(generator).__module__.startswith("torch"):
            import torch

            drawn = torch.randint((1 << 63) - 1, (1,), generator=generator, device=generator.device)
            seed = int(drawn.item())
        else:
            found = type(generator).__name__
            raise UsageError(f"generator: expected torch.Generator, numpy.random.Generator or a number, found {found}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < _SEEDS:
        raise UsageError(f"seed: expected a whole number from 0 to 2^64 - 1, found {seed!r}")
    return int(seed)


def _images(pixels: list[NDArray[np.uint8]], output_type: str) -> Any:
    if output_type == "pil":
        return [Image.fromarray(picture) for picture in pixels]
    floats = np.stack(pixels).astype(np.float32) / np.float32(255)
    if output_type == "np":
        return floats
    return _torch().from_numpy(np.ascontiguousarray(floats.transpose(0, 3, 1, 2)))


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UsageError('output_type "pt" needs PyTorch: pip install "sparvar[torch]"') from error
    return torch


def _timings(raw: dict[str, Any]) -> Timings:
    scales = tuple(ScaleTiming(**scale) for scale in raw.pop("scales"))
    return Timings(scales=scales, **raw)
