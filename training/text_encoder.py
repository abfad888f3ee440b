"""T5 v1.1 encoder. Names of the state dict are those of Hugging Face's `T5EncoderModel`."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .config import TextSize

PAD, EOS = 0, 1


class RmsNorm(nn.Module):
    """x / rms(x) * weight, in f32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class _SelfAttention(nn.Module):
    def __init__(self, size: TextSize, has_bias: bool) -> None:
        super().__init__()
        inner = size.heads * size.head_dim
        self.heads, self.head_dim = size.heads, size.head_dim
        self.q, self.k, self.v = (nn.Linear(size.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, size.width, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(size.buckets, size.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, self.heads, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


class _AttentionLayer(nn.Module):
    def __init__(self, size: TextSize, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(size, has_bias)
        self.layer_norm = RmsNorm(size.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias).float()


class _Dense(nn.Module):
    def __init__(self, size: TextSize) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.wo = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class _DenseLayer(nn.Module):
    def __init__(self, size: TextSize) -> None:
        super().__init__()
        self.DenseReluDense = _Dense(size)
        self.layer_norm = RmsNorm(size.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x)).float()


class _Block(nn.Module):
    def __init__(self, size: TextSize, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(size, first), _DenseLayer(size)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class _Stack(nn.Module):
    def __init__(self, size: TextSize) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(size, i == 0) for i in range(size.layers))
        self.final_layer_norm = RmsNorm(size.width)


def relative_buckets(tokens: int, buckets: int, max_distance: int) -> Tensor:
    """[tokens, tokens] bucket of key minus query: half of them per direction, exact near, logarithmic far (T5)."""
    place = torch.arange(tokens)
    relative = place[None] - place[:, None]
    half = buckets // 2
    exact = half // 2
    distance = relative.abs()
    far = exact + (
        torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    ).long().clamp(max=half - exact - 1)
    return (relative > 0).long() * half + torch.where(distance < exact, distance, far)


class T5Encoder(nn.Module):
    """Token ids [B, T] (0 is padding) to states [B, T, width] in f32."""

    def __init__(self, size: TextSize) -> None:
        super().__init__()
        self.size = size
        self.shared = nn.Embedding(size.vocab, size.width)
        self.encoder = _Stack(size)
        self._buckets = torch.empty(0, 0, dtype=torch.long)
        # T5's unit variance would freeze rare words: each time they are seen they move by hundredths only.
        nn.init.normal_(self.shared.weight, std=0.1)
        inner = size.heads * size.head_dim
        for name, weight in self.encoder.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                nn.init.normal_(weight, std=(size.width * size.head_dim) ** -0.5)
            elif name.endswith("SelfAttention.o.weight"):
                nn.init.normal_(weight, std=0.1 * inner**-0.5)
            elif name.endswith("wo.weight"):
                nn.init.normal_(weight, std=0.1 * size.hidden**-0.5)
            elif name.endswith("relative_attention_bias.weight"):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=size.width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        size = self.size
        if self._buckets.shape[0] != ids.shape[1] or self._buckets.device != ids.device:  # kept: a step copies nothing
            self._buckets = relative_buckets(ids.shape[1], size.buckets, size.max_distance).to(ids.device)
        bias = (
            self.encoder.block[0]
            .get_submodule("layer.0.SelfAttention.relative_attention_bias")(self._buckets)
            .permute(2, 0, 1)[None]
        )  # [1, heads, T, T]
        bias = bias.float().masked_fill((ids == PAD)[:, None, None], -1e9)
        x = self.shared(ids).float()
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
