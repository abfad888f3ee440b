"""Binary spherical quantisation over a pyramid of scales: features [B, d, n, n] to bits and back.

A code is +-1/sqrt(d) in each of d channels. The residual is reduced by area means to each scale in turn, its signs are
the scale's bits, and the codes, resized bilinearly to the last grid, are summed. Resizing is two small products.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _matrix(source: int, target: int, mode: str) -> Tensor:
    """[target, source] matrix of one axis of `F.interpolate`."""
    eye = torch.eye(source, dtype=torch.float64)[None]  # each channel is a unit vector
    if mode == "area":
        return F.interpolate(eye, size=target, mode="area")[0].T.float().contiguous()
    return F.interpolate(eye, size=target, mode="linear", align_corners=False)[0].T.float().contiguous()


class Inputs(NamedTuple):
    """What a transformer is trained on."""

    words: Tensor  # [B, L - 1, d] inputs of scales 1 and up
    bits: Tensor  # [B, L, d] bool, what is to be predicted


class Pyramid:
    """The scales of a model, with the matrices that go between them, on one device."""

    def __init__(self, scales: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        last = scales[-1]
        self.scales = scales
        self.tokens = [s * s for s in scales]
        self._down = [_matrix(last, s, "area").to(device) for s in scales]
        self._up = [_matrix(s, last, "bilinear").to(device) for s in scales]
        self._step = [_matrix(last, s, "bilinear").to(device) for s in scales]

    @staticmethod
    def _apply(matrix: Tensor, x: Tensor) -> Tensor:
        if matrix.shape[0] == matrix.shape[1]:
            return x
        with torch.autocast(x.device.type, enabled=False):  # codes are summed exactly
            return matrix @ x @ matrix.T

    def down(self, x: Tensor, k: int) -> Tensor:
        """Area means of [B, d, n, n] on scale k."""
        return self._apply(self._down[k], x)

    def up(self, codes: Tensor, k: int) -> Tensor:
        """Codes of scale k on the last grid."""
        return self._apply(self._up[k], codes)

    def words(self, summed: Tensor, k: int) -> Tensor:
        """Summed codes as the input of scale k: [B, tokens, d]."""
        return self._apply(self._step[k], summed).flatten(2).transpose(1, 2)

    @staticmethod
    def codes(bits: Tensor) -> Tensor:
        """Bits [B, d, h, w] as codes on the unit sphere."""
        return torch.where(bits, 1.0, -1.0) / math.sqrt(bits.shape[1])

    @torch.no_grad()
    def quantise_both(self, features: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the codes of `features` [B, d, n, n] f32: of the first `kept[b]` scales of picture b, and of all."""
        summed = torch.zeros_like(features)
        out = summed
        for k in range(len(self.scales)):
            codes = self.codes(self.down(features - summed, k) > 0)
            summed = summed + self.up(codes, k)
            out = torch.where((kept > k)[:, None, None, None], summed, out)
        return out, summed

    def quantise(self, features: Tensor, dropped: int = 0) -> Tensor:
        """Sum of the codes without those of the last `dropped` scales."""
        kept = torch.full((len(features),), len(self.scales) - dropped, device=features.device)
        return self.quantise_both(features, kept)[0]

    @torch.no_grad()
    def bits(self, features: Tensor, scales: int | None = None) -> list[Tensor]:
        """Bits of each scale as [B, tokens, d] bool, without errors put in."""
        summed, out = torch.zeros_like(features), []
        for k in range(len(self.scales) if scales is None else scales):
            bit = self.down(features - summed, k) > 0
            out.append(bit.flatten(2).transpose(1, 2))
            summed = summed + self.up(self.codes(bit), k)
        return out

    @torch.no_grad()
    def training_inputs(self, features: Tensor, scales: int, strength: float) -> Inputs:
        """Inputs and targets of the first `scales` scales with bitwise self-correction (Infinity).

        Each bit of an input is flipped at a rate drawn for each picture up to `strength`; the targets of later scales
        are those that repair it.
        """
        batch = features.shape[0]
        rate = torch.rand(batch, 1, 1, 1, device=features.device) * strength
        summed, words, targets = torch.zeros_like(features), [], []
        for k in range(scales):
            bit = self.down(features - summed, k) > 0
            targets.append(bit.flatten(2).transpose(1, 2))
            if k + 1 == scales:
                break
            flipped = bit ^ (torch.rand(bit.shape, device=features.device) < rate)
            summed = summed + self.up(self.codes(flipped), k)
            words.append(self.words(summed, k + 1))
        return Inputs(torch.cat(words, 1), torch.cat(targets, 1))
