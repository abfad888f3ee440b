"""Infinity's transformer as a trainable module. Names of the state dict are those of the public checkpoints."""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .config import Preset
from .text_encoder import RmsNorm

# Scales with fewer keys than this share one masked attention call: seven small calls cost more than their arithmetic.
MERGED_TOKENS = 600


class Condition(NamedTuple):
    """What the text says to every block."""

    pooled: Tensor  # [B, C]
    keys: Tensor  # [B, T, C]
    mask: Tensor  # [B, 1, 1, T] bool, true where a token is
    ada: Tensor  # [B, 1, 6, C]


class Layout(NamedTuple):
    """The tokens of a prefix of the scales, for training: all of them in one sequence."""

    rope: Tensor  # [2, L, head dim / 2]
    levels: Tensor  # [L]
    ends: tuple[int, ...]  # of each scale
    merged: int  # tokens at the start that go through one masked call
    mask: Tensor  # [merged, merged] bool


def rope_table(head_dim: int, scales: tuple[int, ...], grid: int, base: float = 10000.0) -> Tensor:
    """Cosine and sine [2, L, head_dim / 2]: half of the pairs by row, half by column, places mapped to `grid`."""
    half = head_dim // 2
    rate = base ** -(torch.arange(0, half, 2).float() / half)
    parts = []
    for n in scales:
        angle = torch.outer((torch.arange(n) * (grid / n)).round(), rate)
        both = torch.cat([angle[:, None].expand(n, n, -1), angle[None].expand(n, n, -1)], -1)
        parts.append(both.reshape(n * n, half))
    angles = torch.cat(parts)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates pairs (2i, 2i + 1) of x [B, H, L, head dim]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([table[0] * even - table[1] * odd, table[1] * even + table[0] * odd], -1).flatten(-2)


class SelfAttention(nn.Module):
    """Queries and keys of length one, a learned scale for each head."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def qkv(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [B, H, L, head dim] in the type that products are computed in."""
        b, length, _ = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(b, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = F.normalize(q.float(), dim=-1) * self.scale_mul_1H11.clamp_max(math.log(100)).exp()
        k = F.normalize(k.float(), dim=-1)
        return rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype), v.contiguous()


class CrossAttention(nn.Module):
    """Image tokens read the text; as a pool, one learned query a head does."""

    zero_k_bias: Tensor

    def __init__(self, width: int, text_width: int, heads: int, pool: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.mat_q: Any  # upstream's name for both
        if pool:
            self.mat_q = nn.Parameter(torch.randn(1, heads, self.head_dim) * math.sqrt(1 / width / 3))
        else:
            self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor | None, text: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, C], or none for a pool; text [B, T, D]; returns [B, L, C] or [B, 1, C]."""
        b, t, _ = text.shape
        kv = F.linear(text, self.mat_kv.weight, torch.cat((self.zero_k_bias, self.v_bias)))
        k, v = kv.view(b, t, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if x is None:
            q = self.mat_q.to(k.dtype)[:, :, None].expand(b, -1, 1, -1)
        else:
            q = self.mat_q(x).view(b, -1, self.heads, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Self attention, cross attention, feed forward; AdaLN terms are the text's plus the block's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.sa, self.ca = SelfAttention(width, heads), CrossAttention(width, width, heads)
        self.ffn = _FeedForward(width, round(width * 4 / 256) * 256)
        self.ca_norm = nn.LayerNorm(width, eps=1e-6)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (self.width,), eps=1e-6)

    def before(self, x: Tensor, ada: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, L, C]."""
        _, _, scale, _, shift, _ = (self.ada_gss + ada).unbind(2)
        return self.sa.qkv(self._norm(x) * (1 + scale) + shift, rope)

    def after(self, x: Tensor, attended: Tensor, text: Condition) -> Tensor:
        """The rest of the block; `attended` is [B, H, L, head dim]."""
        gamma1, gamma2, _, scale, _, shift = (self.ada_gss + text.ada).unbind(2)
        x = x + self.sa.proj(attended.transpose(1, 2).flatten(2)).float() * gamma1
        x = x + self.ca(self.ca_norm(x), text.keys, text.mask).float()
        return x + self.ffn(self._norm(x) * (1 + scale) + shift).float() * gamma2

    def forward(self, x: Tensor, text: Condition, layout: Layout) -> Tensor:
        """All scales of `layout` at once: a token sees the tokens of its own scale and of those before."""
        q, k, v = self.before(x, text.ada, layout.rope)
        m = layout.merged
        parts = [
            F.scaled_dot_product_attention(q[:, :, :m], k[:, :, :m], v[:, :, :m], attn_mask=layout.mask, scale=1.0)
        ]
        begin = m
        for end in layout.ends:
            if end > m:
                parts.append(
                    F.scaled_dot_product_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], scale=1.0)
                )
                begin = end
        return self.after(x, torch.cat(parts, 2), text)


class _HeadNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        scale, shift = self.ada_lin(pooled).view(-1, 1, 2, self.width).unbind(2)
        return F.layer_norm(x, (self.width,), eps=1e-6) * (1 + scale) + shift


class _Chunk(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class _Pool(nn.Module):
    def __init__(self, ca: CrossAttention) -> None:
        super().__init__()
        self.ca = ca


class Infinity(nn.Module):
    """Text states and the codes so far to two logits for each bit."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        size, text_width = preset.transformer, preset.text.width
        width, self.heads, self.bits = size.width, size.heads, preset.vae.bits
        self.width, self.depth, self.scales, self.rope_grid = width, size.depth, preset.scales, preset.rope_grid
        self.cfg_uncond = nn.Parameter(torch.randn(size.text_maxlen, text_width) * 1.2 / text_width**0.5)
        self.text_norm = RmsNorm(text_width)
        self.text_proj_for_sos = _Pool(CrossAttention(width, text_width, max(1, text_width // 128), pool=True))
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        std = math.sqrt(1 / width / 3)
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) * std)
        self.lvl_embed = nn.Embedding(max(15, len(preset.scales)), width)
        nn.init.normal_(self.lvl_embed.weight, std=std)
        self.word_embed = nn.Linear(self.bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        blocks = [Block(width, size.heads) for _ in range(size.depth)]
        each = size.depth // size.chunks
        if size.chunks == 1:
            self.blocks = nn.ModuleList(blocks)
        else:
            self.block_chunks = nn.ModuleList(_Chunk(blocks[i * each : (i + 1) * each]) for i in range(size.chunks))
        self.head_nm = _HeadNorm(width)
        self.head = nn.Linear(width, 2 * self.bits)
        self._initialise(blocks)

    def _initialise(self, blocks: list[Block]) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in blocks:
                for layer in (block.sa.proj, block.ca.proj, block.ffn.fc2):
                    layer.weight.mul_(1 / math.sqrt(2 * self.depth))
                block.ada_gss[:, :, 2:].mul_(0.5)
                block.ada_gss[:, :, :2].add_(0.3)
            self.head.weight.mul_(0.1)

    def all_blocks(self) -> list[Block]:
        """The blocks from the first to the last."""
        if hasattr(self, "blocks"):
            return cast(list[Block], list(self.blocks))
        return [block for chunk in cast(Any, self.block_chunks) for block in chunk.module]

    def layout(self, scales: int, device: torch.device | str) -> Layout:
        """The tokens of the first `scales` scales."""
        sides = self.scales[:scales]
        counts = torch.tensor([s * s for s in sides])
        ends = tuple(counts.cumsum(0).tolist())
        levels = torch.repeat_interleave(torch.arange(scales), counts)
        merged = max([e for e in ends if e <= MERGED_TOKENS], default=ends[0])
        first = levels[:merged]
        return Layout(
            rope_table(self.width // self.heads, sides, self.rope_grid).to(device),
            levels.to(device),
            ends,
            merged,
            (first[:, None] >= first[None]).to(device),
        )

    def read_text(self, states: Tensor, mask: Tensor, dropped: Tensor | None = None) -> Condition:
        """states [B, T, D], mask [B, T] bool; pictures `dropped` [B] bool are told nothing (for guidance)."""
        if dropped is not None:
            nothing = self.cfg_uncond[None, : states.shape[1]].to(states.dtype)
            states = torch.where(dropped[:, None, None], nothing, states)
        normed, mask = self.text_norm(states), mask[:, None, None]
        pooled = self.text_proj_for_sos.ca(None, normed, mask).squeeze(1).float()
        ada = self.shared_ada_lin(pooled).float().reshape(-1, 1, 6, self.width)
        return Condition(pooled, self.text_proj_for_ca(normed), mask, ada)

    def start(self, text: Condition) -> Tensor:
        """Input of scale 0, without its level: [B, 1, C]."""
        return text.pooled[:, None] + self.pos_start

    def embed(self, text: Condition, words: Tensor, levels: Tensor) -> Tensor:
        """Inputs of all scales: words [B, L - 1, d] to [B, L, C]."""
        return torch.cat([self.start(text), self.word_embed(words).float()], 1) + self.lvl_embed(levels)[None]

    def logits(self, x: Tensor, pooled: Tensor) -> Tensor:
        """[B, L, 2 * bits] in f32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.head_nm(x.float(), pooled.float()))

    def forward(self, text: Condition, words: Tensor, layout: Layout) -> Tensor:
        """Second minus first logit of each bit: [B, L, bits]."""
        x = self.embed(text, words, layout.levels)
        for block in self.all_blocks():
            x = block(x, text, layout)
        pairs = self.logits(x, text.pooled).unflatten(-1, (self.bits, 2))
        return pairs[..., 1] - pairs[..., 0]
