"""The three properties that sparse attention lives on, per layer, at the last scale (SparVAR, section 3)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .quantise import Pyramid
from .sampling import Settings, walk
from .transformer import Infinity

SINK_SCALES = 5
WINDOWS = (-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 3, 5, 7)  # published, for 13 scales
SAMPLED_SIDE = 8  # queries looked at: 8x8 places of the map


@dataclass
class LayerFigures:
    """Means over heads, queries and prompts."""

    sinks: list[float] = field(default_factory=list)  # share of the weight on the first five scales
    windows: list[float] = field(default_factory=list)  # share inside the published windows, sinks included
    similarity: list[float] = field(default_factory=list)  # correlation of A(k, i) with upsampled A(k - 1, i - 1)

    def means(self) -> dict[str, float]:
        """As numbers for a report."""
        return {name: round(sum(v) / len(v), 4) if v else float("nan") for name, v in vars(self).items()}


def windows_of(scales: int) -> list[int]:
    """The published windows, which belong to the last scales, for a schedule of `scales`."""
    windows = list(WINDOWS[-scales:])
    return [-1 if k < SINK_SCALES else w for k, w in enumerate(windows)]


def window_mask(scales: tuple[int, ...], places: Tensor) -> Tensor:
    """CSLA's mask [queries, keys] bool of the last scale's queries at all pairs of `places` (an index on an axis)."""
    last = scales[-1]
    parts = []
    for j, (side, window) in enumerate(zip(scales, windows_of(len(scales)), strict=True)):
        if j < SINK_SCALES:
            near = torch.ones(len(places), side, dtype=torch.bool)
        else:
            centre = (places.float() / last * side).round()
            near = (centre[:, None] - torch.arange(side)[None]).abs() <= math.floor(window / 2)
        both = near[:, None, :, None] & near[None, :, None, :]
        parts.append(both.reshape(len(places) ** 2, side * side))
    return torch.cat(parts, 1)


def _interpolation(source: int, target: int, rows: Tensor | None = None) -> Tensor:
    """[target or rows, source] bilinear matrix of one axis."""
    eye = torch.eye(source)[None]
    matrix = torch.nn.functional.interpolate(eye, size=target, mode="linear", align_corners=False)[0].T
    return matrix if rows is None else matrix[rows]


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten(1).double(), b.flatten(1).double()
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)).mean().item()


class _Watch:
    """Collects figures while pictures are drawn; looks at the conditional half of the first picture only."""

    def __init__(self, scales: tuple[int, ...], depth: int) -> None:
        self.scales, self.layers = scales, [LayerFigures() for _ in range(depth)]
        last = scales[-1]
        self.places = ((torch.arange(min(SAMPLED_SIDE, last)) + 0.5) * (last / min(SAMPLED_SIDE, last))).long()
        self.ends = torch.tensor([0, *(s * s for s in scales)]).cumsum(0).tolist()
        self._mask = window_mask(scales, self.places)
        self._before: dict[int, Tensor] = {}  # layer: attention of the scale before the last

    def __call__(self, k: int, layer: int, q: Tensor, keys: Tensor) -> None:
        if k < len(self.scales) - 2:
            return
        with torch.autocast(q.device.type, enabled=False):
            self._look(k, layer, q, keys)

    def _look(self, k: int, layer: int, q: Tensor, keys: Tensor) -> None:
        queries = q[0].float()
        if k == len(self.scales) - 1:
            rows = (self.places[:, None] * self.scales[-1] + self.places[None]).flatten().to(q.device)
            queries = queries[:, rows]
        attention = (queries @ keys[0].float().transpose(-1, -2)).softmax(-1).cpu()
        if k == len(self.scales) - 2:
            self._before[layer] = attention
            return
        figures = self.layers[layer]
        figures.sinks.append(attention[..., : self.ends[SINK_SCALES]].sum(-1).mean().item())
        figures.windows.append((attention * self._mask).sum(-1).mean().item())
        figures.similarity.append(self._similarity(attention, self._before.pop(layer)))

    def _similarity(self, attention: Tensor, before: Tensor) -> float:
        """Mean over the key scales of the correlation of a block with the block one scale lower on both sides."""
        k = len(self.scales) - 1
        up = _interpolation(self.scales[k - 1], self.scales[k], self.places)
        queries = torch.kron(up, up)  # [sampled queries, queries of scale k - 1]
        values = []
        for i in range(max(1, k - 3), k + 1):
            block = attention[..., self.ends[i] : self.ends[i + 1]]
            side = self.scales[i - 1]
            lower = queries @ before[..., self.ends[i - 1] : self.ends[i]]
            lower = lower.unflatten(-1, (side, side))
            grow = _interpolation(side, self.scales[i])
            values.append(_correlation(block, (grow @ lower @ grow.T).flatten(-2)))
        return sum(values) / len(values)


def attention_properties(
    model: Infinity, pyramid: Pyramid, states: list[Tensor], settings: Settings
) -> list[dict[str, float]]:
    """One dictionary a layer; `states` holds text states [1, T, D], one of each prompt."""
    watch = _Watch(model.scales, model.depth)
    for state in states:
        mask = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        walk(model, pyramid, state, mask, settings, on_attention=watch)
    return [layer.means() for layer in watch.layers]
