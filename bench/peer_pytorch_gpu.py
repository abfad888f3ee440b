#!/usr/bin/env python3
"""The PyTorch peer on a GPU: Infinity of a released geometry with random weights, run the way upstream runs it.

    python3 bench/peer_pytorch_gpu.py --geometry infinity-8b --repeat 5

Eager PyTorch under bf16 autocast, as upstream's inference: blocks in bf16, the rest in f32, keys and values concatenated
at every scale, F.scaled_dot_product_attention, the picture decoder in NCHW. One picture of 1024 x 1024 with guidance;
the text's states are given (no text encoder). Prints one JSON object: medians after a warm-up, times per scale, peak.
"""
import argparse
import json
import math
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SCALES = [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64]
GEOMETRIES = {  # depth, width, heads, VAE channels, patchify, ch_mult
    "infinity-125m": (12, 768, 8, 16, False, (1, 2, 4, 4, 4)),
    "infinity-2b": (32, 2048, 16, 32, False, (1, 2, 4, 4, 4)),
    "infinity-8b": (40, 3584, 28, 14, True, (1, 2, 4, 4)),
}
TEXT_CHANNELS = 2048


def normal(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.02)


def rotate(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.keys = self.values = None

    def forward(self, x, rope):
        batch, n, width = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(batch, n, 3, self.heads, self.dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.scale.clamp_max(math.log(100)).exp()
        q = F.normalize(q, dim=-1).mul(scale).contiguous()
        k = F.normalize(k, dim=-1).contiguous()
        q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = q.to(v.dtype), k.to(v.dtype), v.contiguous()
        self.keys = k if self.keys is None else torch.cat([self.keys, k], 2)
        self.values = v if self.values is None else torch.cat([self.values, v], 2)
        out = F.scaled_dot_product_attention(q, self.keys, self.values, scale=1.0)
        return self.proj(out.transpose(1, 2).reshape(batch, n, width))


class CrossAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, text):
        batch, n, width = x.shape
        q = self.q(x).view(batch, n, self.heads, self.dim).transpose(1, 2)
        k, v = self.kv(text).view(batch, -1, 2, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, n, width))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        ffn = round(4 * width / 256) * 256
        self.attention, self.cross = SelfAttention(width, heads), CrossAttention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.ada = normal(1, 1, 6, width)

    def forward(self, x, condition, text, rope):
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.ada + condition).unbind(2)
        x = x + self.attention(self.norm(x).mul(scale1.add(1)).add_(shift1), rope).mul_(gamma1)
        x = x + self.cross(self.cross_norm(x), text)
        hidden = F.gelu(self.fc1(self.norm(x).mul(scale2.add(1)).add_(shift2)), approximate="tanh")
        return x + self.fc2(hidden).mul_(gamma2)


class Transformer(nn.Module):
    def __init__(self, depth, width, heads, bits):
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth)).bfloat16()
        self.text_proj = nn.Sequential(nn.Linear(TEXT_CHANNELS, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.pool = nn.Linear(TEXT_CHANNELS, width)
        self.ada, self.head_ada = nn.Linear(width, 6 * width), nn.Linear(width, 2 * width)
        self.word_norm, self.word_embed = nn.LayerNorm(bits, eps=1e-6), nn.Linear(bits, width)
        self.level, self.start, self.unconditional = normal(15, width), normal(1, 1, width), normal(512, TEXT_CHANNELS)
        self.head_norm, self.head = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False), nn.Linear(width, 2 * bits)
        dim = width // heads
        frequency = 10000.0 ** (-torch.arange(0, dim // 2, 2).float() / (dim // 2))
        self.ropes = []
        for side in SCALES:
            angle = torch.outer((torch.arange(side) * (SCALES[-1] / side)).round(), frequency)
            angles = torch.cat([angle[:, None].expand(side, side, -1), angle[None].expand(side, side, -1)], -1).flatten(0, 1)
            self.ropes.append((angles.cos(), angles.sin()))

    def begin(self, states):
        both = torch.stack([states, self.unconditional[:len(states)]])
        self.condition = self.pool(both.mean(1))
        self.text = self.text_proj(both)
        self.modulation = self.ada(F.silu(self.condition)).view(2, 1, 6, self.width)
        for block in self.blocks:
            block.attention.keys = block.attention.values = None

    def logits(self, index, words):
        if words is None:
            x = self.condition[:, None] + self.start
        else:
            x = self.word_embed(self.word_norm(words)).repeat(2, 1, 1)
        x = x + self.level[index]
        for block in self.blocks:
            x = block(x, self.modulation, self.text, self.ropes[index])
        scale, shift = self.head_ada(F.silu(self.condition)).view(2, 1, 2, self.width).unbind(2)
        return self.head(self.head_norm(x.float()).mul(scale.add(1)).add_(shift)).float()


class ResidualBlock(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, i, eps=1e-6), nn.GroupNorm(32, o, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.shortcut = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def decoder(codes, mult, base=128, blocks=2):
    width = base * mult[-1]
    layers = [nn.Conv2d(codes, width, 3, padding=1), ResidualBlock(width, width), ResidualBlock(width, width)]
    for level in reversed(range(len(mult))):
        for _ in range(blocks + 1):
            layers.append(ResidualBlock(width, base * mult[level]))
            width = base * mult[level]
        if level > 0:
            layers.append(Upsample(width))
    return nn.Sequential(*layers, nn.GroupNorm(32, width, eps=1e-6), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))


class Peer:
    def __init__(self, geometry):
        depth, width, heads, self.codes, self.patchify, mult = GEOMETRIES[geometry]
        self.bits = self.codes * (4 if self.patchify else 1)
        self.transformer = Transformer(depth, width, heads, self.bits)
        self.decoder = decoder(self.codes, mult)
        self.parameters = sum(p.numel() for m in (self.transformer, self.decoder) for p in m.parameters())

    def words(self, summed, side):
        grid = side * (2 if self.patchify else 1)
        x = F.interpolate(summed[:, :, None], size=(1, grid, grid), mode="trilinear")[:, :, 0]
        if self.patchify:
            x = F.pixel_unshuffle(x, 2)
        return x.flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def draw(self, states, cfg=4.0, top_p=0.97):
        """-> picture [1, 3, 1024, 1024], CUDA events: start, after every scale, end"""
        marks = []

        def mark():
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

        with torch.autocast("cuda", dtype=torch.bfloat16):
            mark()
            self.transformer.begin(states)
            last = SCALES[-1] * (2 if self.patchify else 1)
            summed, words = torch.zeros(1, self.codes, last, last), None
            for index, side in enumerate(SCALES):
                logits = self.transformer.logits(index, words)
                logits = (cfg * logits[:1] + (1 - cfg) * logits[1:]).view(-1, 2)
                p = logits.softmax(-1)
                p = torch.where(p < 1 - top_p, 0.0, p)
                bits = torch.multinomial(p, 1).view(1, side, side, self.bits)
                code = ((bits * 2 - 1).float() / math.sqrt(self.codes)).permute(0, 3, 1, 2)
                if self.patchify:
                    code = F.pixel_shuffle(code, 2)
                summed = summed + F.interpolate(code[:, :, None], size=(1, last, last), mode="trilinear")[:, :, 0]
                if index + 1 < len(SCALES):
                    words = self.words(summed, SCALES[index + 1])
                mark()
            picture = self.decoder(summed).clamp(-1, 1)
            picture = picture.add(1).div(2).mul(255).to(torch.uint8).permute(0, 2, 3, 1)
            mark()
        return picture, marks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, required=True)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--text-tokens", type=int, default=40)
    options = parser.parse_args()
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    peer = Peer(options.geometry)
    states = torch.randn(options.text_tokens, TEXT_CHANNELS) * 0.3
    totals, runs = [], []
    for i in range(1 + options.repeat):
        if i == 1:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        picture, marks = peer.draw(states)
        picture.cpu()
        seconds = time.perf_counter() - started
        if i == 0:
            first = seconds
            continue
        totals.append(seconds)
        runs.append([a.elapsed_time(b) * 1e-3 for a, b in zip(marks, marks[1:])])
    middle = runs[sorted(range(len(totals)), key=totals.__getitem__)[len(totals) // 2]]
    print(json.dumps({"geometry": options.geometry, "torch": torch.__version__, "gpu": torch.cuda.get_device_name(),
                      "parameters": peer.parameters, "first_seconds": first, "total_seconds": statistics.median(totals),
                      "all_seconds": totals, "scale_seconds": middle[:-1], "decode_seconds": middle[-1],
                      "peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}))


if __name__ == "__main__":
    main()
