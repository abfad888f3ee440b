"""Sizes of the models and the plan of their training. Presets: `emoji`, the bundled model, and `tiny`, for tests."""

from dataclasses import dataclass, replace

from .errors import TrainingError


@dataclass(frozen=True)
class VaeSize:
    """BSQ-VAE; level i has `channels * multipliers[i]` channels, each level but the first halves the grid."""

    channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    res_blocks: int = 2
    # Not more: with a channel a group the colour of a picture is lost (17 dB).
    groups: int = 8
    bits: int = 16

    @property
    def patch(self) -> int:
        """Pixels of a token's side."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class TextSize:
    """T5 v1.1 encoder."""

    vocab: int = 4000
    width: int = 256
    head_dim: int = 64
    hidden: int = 512
    layers: int = 3
    heads: int = 4
    buckets: int = 32
    max_distance: int = 128


@dataclass(frozen=True)
class TransformerSize:
    """Infinity transformer."""

    depth: int = 8
    width: int = 256
    heads: int = 4
    chunks: int = 2
    text_maxlen: int = 64


@dataclass(frozen=True)
class Phase:
    """A part of the transformer's training. `mix` holds (scales, pictures a step of one process, share of
    the steps)."""

    name: str
    seconds: float
    lr_first: float
    lr_last: float
    mix: tuple[tuple[int, int, float], ...]

    @property
    def scales(self) -> int:
        """The most scales it trains."""
        return max(k for k, _, _ in self.mix)


@dataclass(frozen=True)
class Preset:
    """A whole model and how it is trained."""

    name: str
    scales: tuple[int, ...]
    rope_grid: int
    vae: VaeSize
    text: TextSize
    transformer: TransformerSize
    vae_seconds: float
    vae_batch: int
    vae_lr: float
    text_tokens: int
    phases: tuple[Phase, ...]
    text_lr_factor: float = 2.0
    captions_a_picture: int = 32
    warm_steps: int = 150  # over which the rate grows, at the start of every run
    step_seconds: float | None = None  # what a step counts as; none: what it took. Tests count, they do not measure

    @property
    def pixels(self) -> int:
        """Side of a picture."""
        return self.scales[-1] * self.vae.patch

    def with_budget(self, factor: float) -> "Preset":
        """The same training in `factor` of the seconds: a rehearsal, or a longer one."""
        phases = tuple(replace(phase, seconds=phase.seconds * factor) for phase in self.phases)
        return replace(self, vae_seconds=self.vae_seconds * factor, phases=phases)


# The phases are prefixes of one sequence: the first 7 scales of a 512 pixel picture are the same tokens in all of them,
# so nothing has to be learnt again. Shorter prefixes stay in the mix because there the text is learnt 20 times faster.
EMOJI = Preset(
    name="emoji",
    scales=(1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64),
    rope_grid=64,
    vae=VaeSize(),
    text=TextSize(),
    transformer=TransformerSize(),
    vae_seconds=480,
    vae_batch=8,
    vae_lr=1.5e-3,
    text_tokens=24,
    phases=(
        Phase("ar7", 1080, 2e-3, 2e-3, ((7, 64, 1.0),)),
        Phase("ar10", 600, 2e-3, 1.2e-3, ((10, 32, 0.6), (7, 64, 0.4))),
        Phase("ar13", 1080, 1.2e-3, 1e-5, ((13, 8, 0.5), (10, 32, 0.2), (7, 64, 0.3))),
    ),
)

TINY = Preset(
    name="tiny",
    scales=(1, 2, 4, 6, 8),
    rope_grid=64,
    vae=VaeSize(channels=8, multipliers=(1, 2, 2, 4), res_blocks=1, groups=4, bits=16),
    text=TextSize(vocab=200, width=128, head_dim=32, hidden=128, layers=2, heads=2),
    transformer=TransformerSize(depth=2, width=64, heads=2, chunks=1, text_maxlen=32),
    vae_seconds=6,
    vae_batch=4,
    vae_lr=2e-3,
    text_tokens=24,
    phases=(
        Phase("ar7", 8, 2e-3, 2e-3, ((3, 8, 1.0),)),
        Phase("ar10", 4, 2e-3, 1e-3, ((4, 8, 0.7), (3, 8, 0.3))),
        Phase("ar13", 4, 1e-3, 1e-5, ((5, 4, 0.6), (4, 4, 0.2), (3, 4, 0.2))),
    ),
    captions_a_picture=4,
    warm_steps=5,
    step_seconds=0.1,
)

PRESETS = {preset.name: preset for preset in (EMOJI, TINY)}


def preset(name: str) -> Preset:
    """The preset called `name`."""
    if name not in PRESETS:
        raise TrainingError(f"there is no preset {name}; there are {', '.join(PRESETS)}", 2)
    return PRESETS[name]
