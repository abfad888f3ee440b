"""Doubles of upstream's PyTorch models, with random weights: the layout of their modules, the names that
`sparvar.patch` goes by, and the flow of numbers through self-attention, its roundings included. The code is ours.

`InfinityLike` draws pictures of text states, `VarLike` of classes; both walk their scales with a KV cache and guidance.
What upstream takes from flash-attn (texts of several lengths) is a loop here. `bench/python_patch.py` times them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def small(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.02)


class SelfAttention(nn.Module):
    """What both have in common: the projections, the KV cache, attention over it."""

    def __init__(self, width, heads, unit_length, plain_scale, flash=False):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.using_flash = flash
        if unit_length:
            self.scale = 1
            shape = (1, 1, heads, 1) if flash and isinstance(self, InfinityAttention) else (1, heads, 1, 1)
            self.scale_mul_1H11 = nn.Parameter(torch.full(shape, 4.0).log() + 0.3 * torch.randn(shape))
            self.max_scale_mul = math.log(100)
        else:
            self.scale = plain_scale / math.sqrt(self.head_dim)
        self.mat_qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = small(width), small(width)
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj_drop = nn.Identity()
        self.kv_caching(False)

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def product(self, x, flash):
        """q, k, v of (batch, heads, tokens, channels), with flash (batch, tokens, heads, channels)."""
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        return qkv.unbind(2) if flash else qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def cached(self, k, v, axis):
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat([self.cached_k, k], axis), torch.cat([self.cached_v, v], axis)
            self.cached_k, self.cached_v = k, v
        return k, v

    def attend(self, q, k, v, mask, flash):
        if flash:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale, attn_mask=mask)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(*out.shape[:1], out.shape[2], -1)))


class InfinityAttention(SelfAttention):
    def __init__(self, width, heads, cos_attn=True, flash=False):
        super().__init__(width, heads, cos_attn, 1.0, flash)
        self.cos_attn = cos_attn
        self.use_flex_attn = False

    def forward(
        self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0
    ):
        q, k, v = self.product(x, self.using_flash)
        dtype = v.dtype
        if self.cos_attn:
            factor = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp().to(dtype)
            q, k = F.normalize(q, dim=-1, eps=1e-12).mul(factor), F.normalize(k, dim=-1, eps=1e-12)
        q, k, v = (part.contiguous().to(dtype) for part in (q, k, v))
        if rope2d_freqs_grid is not None:
            before = sum(h * w for _, h, w in scale_schedule[:scale_ind])
            table = rope2d_freqs_grid[str(tuple(scale_schedule))].to(q.device)
            q, k = rotated(q, k, table[..., before : before + x.shape[1], :], self.using_flash)
        k, v = self.cached(k, v, 1 if self.using_flash else 2)
        return self.attend(q, k, v, attn_bias_or_two_vector, self.using_flash)


def rotated(q, k, table, flash):
    """Both at once, in their own type whatever autocast says; table: (2, 1, 1, 1, tokens, channels / 2)."""
    both = torch.stack([q, k])
    with torch.autocast(both.device.type, enabled=False):
        cosine, sine = (table.movedim(4, 3) if flash else table).to(both.dtype)
        even, odd = both.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([cosine * even - sine * odd, sine * even + cosine * odd], -1).flatten(-2).unbind(0)


class VarAttention(SelfAttention):
    def __init__(self, width, heads, attn_l2_norm=True, flash=False):
        super().__init__(width, heads, attn_l2_norm, 0.25, flash)
        self.attn_l2_norm, self.using_xform, self.attn_drop = attn_l2_norm, False, 0.0

    def forward(self, x, attn_bias):
        flash = self.using_flash and attn_bias is None and torch.is_autocast_enabled(x.device.type)
        q, k, v = self.product(x, flash)
        dtype = v.dtype
        if self.attn_l2_norm:
            factor = self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            q, k = F.normalize(q, dim=-1).mul(factor.transpose(1, 2) if flash else factor), F.normalize(k, dim=-1)
        k, v = self.cached(k, v, 1 if flash else 2)
        return self.attend(q.to(dtype), k.to(dtype), v, attn_bias, flash)


class CrossAttention(nn.Module):
    """Queries to the states of their own text. Packed texts, as upstream: states (all tokens, width), ends of texts."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width // heads, 1 / math.sqrt(width // heads)
        self.mat_q, self.mat_kv, self.proj = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width, False),
            nn.Linear(width, width),
        )
        self.v_bias = small(width)
        self.register_buffer("zero_k_bias", torch.zeros(width))

    def forward(self, x, texts):
        states, ends = texts
        kv = F.linear(states, self.mat_kv.weight, torch.cat([self.zero_k_bias, self.v_bias]))
        k, v = kv.view(-1, 2, self.num_heads, self.head_dim).permute(1, 2, 0, 3)
        q = self.mat_q(x).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
        if len({end - begin for begin, end in pairwise(ends)}) == 1:  # of one length: one call, as flash-attn's
            k, v = (part.unflatten(1, (len(x), -1)).transpose(0, 1) for part in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            parts = [(k[None, :, a:b], v[None, :, a:b]) for a, b in pairwise(ends)]
            out = torch.cat(
                [F.scaled_dot_product_attention(q[i : i + 1], *kv, scale=self.scale) for i, kv in enumerate(parts)]
            )
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = round(4 * width / 256) * 256 or 4 * width
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Infinity's has `sa`, cross-attention, and takes the arguments of a scale on to `sa`; VAR's has `attn`."""

    def __init__(self, width, attention, cross=None):
        super().__init__()
        if cross is None:
            self.attn = attention
        else:
            self.sa, self.ca, self.ca_norm = attention, cross, nn.LayerNorm(width, eps=1e-6)
        self.ffn, self.ln_wo_grad = FeedForward(width), nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) * 0.1)

    def forward(self, x, condition, texts=None, **scale):
        with torch.autocast(x.device.type, enabled=False):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.ada_gss + condition).unbind(2)
        y = self.ln_wo_grad(x).mul(scale1.add(1)).add_(shift1)
        if texts is None:
            x = x + self.attn(y, **scale).mul_(gamma1)
        else:
            x = x + self.sa(y, **scale).mul_(gamma1)
            x = x + self.ca(self.ca_norm(x), texts)
        return x + self.ffn(self.ln_wo_grad(x).mul(scale2.add(1)).add_(shift2)).mul(gamma2)


class Chunk(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.module = nn.ModuleList(blocks)


def rope_tables(schedule, channels):
    """Upstream's dictionary: a schedule's text -> cosines and sines, (2, 1, 1, 1, all its tokens, channels / 2)."""
    frequency = 10000.0 ** (-torch.arange(0, channels // 2, 2).float() / (channels // 2))
    angles = []
    for _, h, w in schedule:
        last_h, last_w = schedule[-1][1:]
        rows, columns = (torch.arange(h) * (last_h / h)).round(), (torch.arange(w) * (last_w / w)).round()
        row, column = torch.outer(rows, frequency), torch.outer(columns, frequency)
        angles.append(torch.cat([row[:, None].expand(h, w, -1), column[None].expand(h, w, -1)], -1).flatten(0, 1))
    every = torch.cat(angles)
    return {str(tuple(schedule)): torch.stack([every.cos(), every.sin()])[:, None, None, None]}


class Picture(nn.Module):
    """What both do around the blocks: bits or codes of one scale added up, resized for the next one."""

    def words(self, summed, grid):
        return self.word_embed(F.interpolate(summed, size=grid, mode="bilinear").flatten(2).transpose(1, 2))

    def head_of(self, x, condition):
        scale, shift = self.head_ada(F.silu(condition)).view(len(x), 1, 2, -1).unbind(2)
        return self.head(self.head_norm(x.float()).mul(scale.add(1)).add_(shift)).float()


class InfinityLike(Picture):
    def __init__(self, depth=4, width=64, heads=4, bits=8, text=32, schedule=(1, 2), chunks=2, **attention):
        super().__init__()
        self.schedule = [(1, h, w) for h, w in schedule]
        self.bits = bits
        blocks = [
            Block(width, InfinityAttention(width, heads, **attention), CrossAttention(width, heads))
            for _ in range(depth)
        ]
        per_chunk = depth // chunks
        self.block_chunks = nn.ModuleList(Chunk(blocks[i : i + per_chunk]) for i in range(0, depth, per_chunk))
        self.text_proj = nn.Sequential(nn.Linear(text, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.pool, self.ada, self.head_ada = (
            nn.Linear(text, width),
            nn.Linear(width, 6 * width),
            nn.Linear(width, 2 * width),
        )
        self.word_embed, self.lvl_embed, self.pos_start = (
            nn.Linear(bits, width),
            nn.Embedding(16, width),
            small(1, 1, width),
        )
        self.cfg_uncond = small(512, text)
        self.head_norm, self.head = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False), nn.Linear(width, 2 * bits)
        self.rope2d_freqs_grid = rope_tables(self.schedule, width // heads)

    def all_blocks(self):
        return [block for chunk in self.block_chunks for block in chunk.module]

    @torch.no_grad()
    def draw(self, texts, cfg=3.0, seed=0, on_scale=None, fused_norm=True, keep=True):
        """texts: states of each picture's text, (tokens, text). Returns summed codes, (pictures, bits, h, w), and where
        they are to be kept the hidden states of every scale. `on_scale` is called before every scale. Without
        `fused_norm` upstream does not hand the scale's index on."""
        device = self.pos_start.device
        generator = torch.Generator(device).manual_seed(seed)
        both = [*texts, *(self.cfg_uncond[: len(text)] for text in texts)] if cfg != 1 else texts
        lengths = [0, *torch.tensor([len(text) for text in both]).cumsum(0).tolist()]
        condition = self.pool(torch.stack([text.mean(0) for text in both]))
        states = self.text_proj(torch.cat(list(both)))
        modulation = self.ada(F.silu(condition)).view(len(both), 1, 6, -1).float()
        pictures, hidden = len(texts), []
        for block in self.all_blocks():
            block.sa.kv_caching(True)
        x = condition[:, None] + self.pos_start
        summed = torch.zeros(pictures, self.bits, *self.schedule[-1][1:], device=device)
        for index, (_, h, w) in enumerate(self.schedule):
            if on_scale:
                on_scale(index)
            x = x + self.lvl_embed.weight[index]
            scale = {"attn_bias_or_two_vector": None, "attn_fn": None, "scale_schedule": self.schedule}
            scale["rope2d_freqs_grid"] = self.rope2d_freqs_grid
            if fused_norm:
                scale["scale_ind"] = index
            for block in self.all_blocks():
                x = block(x, modulation, (states, lengths), **scale)
            if keep:
                hidden.append(x)
            logits = self.head_of(x, condition)
            if cfg != 1:
                logits = cfg * logits[:pictures] + (1 - cfg) * logits[pictures:]
            odds = logits.unflatten(-1, (-1, 2)).softmax(-1).flatten(0, -2)
            drawn = torch.multinomial(odds, 1, generator=generator).view(pictures, h, w, self.bits)
            codes = ((2 * drawn - 1).float() / math.sqrt(self.bits)).permute(0, 3, 1, 2)
            summed = summed + F.interpolate(codes, size=summed.shape[2:], mode="bilinear")
            if index + 1 < len(self.schedule):
                x = self.words(summed, self.schedule[index + 1][1:]).repeat(len(both) // pictures, 1, 1)
        for block in self.all_blocks():
            block.sa.kv_caching(False)
        return summed, hidden


class VarLike(Picture):
    def __init__(self, depth=3, width=64, heads=4, codes=8, classes=10, patch_nums=(1, 2), **attention):
        super().__init__()
        self.patch_nums, self.codes, self.classes = tuple(patch_nums), codes, classes
        self.blocks = nn.ModuleList(Block(width, VarAttention(width, heads, **attention)) for _ in range(depth))
        self.class_emb, self.ada = nn.Embedding(classes + 1, width), nn.Linear(width, 6 * width)
        self.word_embed, self.head_ada = nn.Linear(codes, width), nn.Linear(width, 2 * width)
        self.pos_1LC, self.book = small(1, sum(n * n for n in patch_nums), width), small(32, codes)
        self.head_norm, self.head = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False), nn.Linear(width, 32)

    @torch.no_grad()
    def draw(self, labels, cfg=1.5, seed=0, on_scale=None):
        """labels: (pictures,). Returns as InfinityLike's."""
        pictures, last = len(labels), self.patch_nums[-1]
        generator = torch.Generator(labels.device).manual_seed(seed)
        condition = self.class_emb(torch.cat([labels, torch.full_like(labels, self.classes)]))
        modulation = self.ada(F.silu(condition)).view(2 * pictures, 1, 6, -1).float()
        for block in self.blocks:
            block.attn.kv_caching(True)
        x, begin, hidden = condition[:, None], 0, []
        summed = torch.zeros(pictures, self.codes, last, last, device=labels.device)
        for index, side in enumerate(self.patch_nums):
            if on_scale:
                on_scale(index)
            x = x + self.pos_1LC[:, begin : begin + side * side]
            begin += side * side
            for block in self.blocks:
                x = block(x, modulation, attn_bias=None)
            hidden.append(x)
            logits = self.head_of(x, condition)
            t = cfg * index / max(1, len(self.patch_nums) - 1)
            odds = ((1 + t) * logits[:pictures] - t * logits[pictures:]).softmax(-1).flatten(0, 1)
            drawn = torch.multinomial(odds, 1, generator=generator).view(pictures, side, side)
            summed = summed + F.interpolate(
                self.book[drawn].permute(0, 3, 1, 2).float(), size=(last, last), mode="bicubic"
            )
            if index + 1 < len(self.patch_nums):
                x = self.words(summed, (self.patch_nums[index + 1],) * 2).repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return summed, hidden
