"""BSQ-VAE of Infinity as a trainable module. Names of the state dict are those of the public checkpoints."""

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .config import VaeSize


class _Conv(nn.Module):
    """A convolution whose weights are called `conv.weight`, as upstream's wrapper calls them."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _NormSilu(nn.Module):
    """Group norm, then SiLU. Moments in f32 whatever the input is."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x))


class ResBlock(nn.Module):
    """norm, SiLU, 3x3, twice, and a way around them."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _NormSilu(inputs, groups), _Conv(inputs, outputs, 3, 1, 1)
        self.norm2, self.conv2 = _NormSilu(outputs, groups), _Conv(outputs, outputs, 3, 1, 1)
        if inputs != outputs:
            self.nin_shortcut = _Conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class _Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as upstream


class _Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResBlock(channels, channels, groups), ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class _Level(nn.Module):
    """Residual blocks of one resolution, and the way to the next one."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """Picture [B, 3, H, W] in -1..1 to features [B, bits, H/patch, W/patch]."""

    def __init__(self, size: VaeSize) -> None:
        super().__init__()
        widths = [size.channels * m for m in size.multipliers]
        self.conv_in = _Conv(3, widths[0], 3, 1, 1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = _Level(widths[max(i - 1, 0)], width, size.res_blocks, size.groups)
            if i + 1 < len(widths):
                level.downsample = _Down(width)
            self.down.append(level)
        self.mid = _Middle(widths[-1], size.groups)
        self.norm_out = _NormSilu(widths[-1], size.groups)
        self.conv_out = _Conv(widths[-1], size.bits, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    """Summed codes [B, bits, h, w] to a picture [B, 3, h*patch, w*patch], about -1..1."""

    def __init__(self, size: VaeSize) -> None:
        super().__init__()
        widths = [size.channels * m for m in size.multipliers]
        self.conv_in = _Conv(size.bits, widths[-1], 3, 1, 1)
        self.mid = _Middle(widths[-1], size.groups)
        levels: list[nn.Module] = []
        for i in reversed(range(len(widths))):
            level = _Level(widths[min(i + 1, len(widths) - 1)], widths[i], size.res_blocks + 1, size.groups)
            if i > 0:
                level.upsample = _Up(widths[i])
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = _NormSilu(widths[0], size.groups)
        self.conv_out = _Conv(widths[0], 3, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(self.norm_out(h))


class BsqVae(nn.Module):
    """Encoder and decoder; quantisation between them is `Pyramid.quantise`."""

    def __init__(self, size: VaeSize) -> None:
        super().__init__()
        self.size = size
        self.encoder, self.decoder = Encoder(size), Decoder(size)

    def res_blocks(self) -> Iterator[ResBlock]:
        """The parts worth compiling: ten different shapes, where the whole is one large graph."""
        return (m for m in self.modules() if isinstance(m, ResBlock))


def straight_through(features: Tensor, summed: Tensor) -> Tensor:
    """`summed` with the gradient of `features`: one straight-through step over the whole pyramid."""
    return features + (summed - features).detach()


def reconstruction_loss(picture: Tensor, target: Tensor) -> Tensor:
    """Squares for PSNR, absolute values for clean areas, differences of neighbours for edges."""
    error = picture - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return 0.5 * error.abs().mean() + 2.0 * error.square().mean() + 0.25 * edges


def psnr(picture: Tensor, target: Tensor) -> Tensor:
    """dB of each picture [B], values in -1..1."""
    mse = (picture.float().clamp(-1, 1) - target).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp_min(1e-10) / 4)
