#!/usr/bin/env python3
"""The PyTorch peer of the benchmarks: the bundled model in eager PyTorch on the CPU, and PyTorch's own attention.

    pip install torch==2.13.0 safetensors sentencepiece      (the CPU build of torch is enough)
    python3 bench/peer_pytorch.py model --dtype bf16 --threads 2 --repeat 3
    python3 bench/peer_pytorch.py attention --threads 2

`model` draws one picture: text encoder, transformer with guidance, sampling, picture decoder; no file is written.
The first picture of the process is `cold_seconds`, `warm_seconds` is the median of the next ones. `attention` times
F.scaled_dot_product_attention and a matrix product of the machine. Both print one JSON object.
Nothing is compiled (torch.compile); the KV cache is laid out once instead of concatenated at every scale.
"""
import argparse
import json
import math
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROPE_BASE = 10000.0
ROPE_GRID = 64  # RoPE positions map to the last grid of the 1M schedule


class Weights:
    """The tensors of one safetensors file as float32, and the layers that read them by name."""

    def __init__(self, path):
        from safetensors.torch import load_file

        self.tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        for name, tensor in self.tensors.items():
            if tensor.dim() == 4 and name.endswith("conv.weight"):  # the faster layout for convolutions on a CPU
                self.tensors[name] = tensor.to(memory_format=torch.channels_last)

    def __getitem__(self, name):
        return self.tensors[name]

    def linear(self, name, x, bias=True):
        return F.linear(x, self[name + ".weight"], self[name + ".bias"] if bias else None)

    def conv(self, name, x, padding=1):
        return F.conv2d(x, self[name + ".conv.weight"], self[name + ".conv.bias"], padding=padding)


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class TextEncoder:
    """T5 v1.1 encoder, one text without padding."""

    def __init__(self, config, weights):
        self.c, self.w = config, weights

    def position_bias(self, length):
        """[heads, query, key]: half of the buckets for each direction, the far ones on a logarithmic scale."""
        half = self.c["relative_attention_num_buckets"] // 2
        exact = half // 2
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        far = distance.abs().clamp_min(1).float()
        log_bucket = exact + (torch.log(far / exact) / math.log(self.c["relative_attention_max_distance"] / exact) *
                              (half - exact)).long()
        bucket = torch.where(distance.abs() < exact, distance.abs(), log_bucket.clamp_max(half - 1))
        bucket = bucket + half * (distance > 0)
        table = self.w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return table[bucket].permute(2, 0, 1)

    def __call__(self, ids):
        w, heads, eps = self.w, self.c["num_heads"], self.c["layer_norm_epsilon"]
        x = w["shared.weight"][torch.tensor(ids)]
        bias = self.position_bias(len(ids))
        for i in range(self.c["num_layers"]):
            block = f"encoder.block.{i}.layer."
            y = rms_norm(x, w[block + "0.layer_norm.weight"], eps)
            q, k, v = (w.linear(f"{block}0.SelfAttention.{name}", y, bias=False).view(len(ids), heads, -1).transpose(0, 1).float()
                       for name in "qkv")
            y = (torch.softmax(q @ k.transpose(1, 2) + bias, -1) @ v).transpose(0, 1).flatten(1)
            x = x + w.linear(block + "0.SelfAttention.o", y, bias=False).float()
            y = rms_norm(x, w[block + "1.layer_norm.weight"], eps)
            y = F.gelu(w.linear(block + "1.DenseReluDense.wi_0", y, bias=False), approximate="tanh") * w.linear(
                block + "1.DenseReluDense.wi_1", y, bias=False)
            x = x + w.linear(block + "1.DenseReluDense.wo", y, bias=False).float()
        return rms_norm(x, w["encoder.final_layer_norm.weight"], eps)


def rope_tables(grid, head_dim):
    """cos and sin [grid * grid, head_dim / 2]: half of the pairs turn with the row, half with the column."""
    frequency = ROPE_BASE ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    angle = torch.outer((torch.arange(grid) * (ROPE_GRID / grid)).round(), frequency)
    angles = torch.cat([angle[:, None].expand(grid, grid, -1), angle[None].expand(grid, grid, -1)], -1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x, tables):
    cos, sin = tables
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)


class Transformer:
    """Infinity's transformer for one prompt: batch entry 0 is conditional, 1 unconditional."""

    def __init__(self, config, scales, weights):
        self.c, self.scales, self.w = config, scales, weights
        self.width, self.heads = config["embed_dim"], config["num_heads"]
        self.head_dim = self.width // self.heads
        per_chunk = config["depth"] // config["block_chunks"]
        self.blocks = [f"block_chunks.{i // per_chunk}.module.{i % per_chunk}." for i in range(config["depth"])]
        self.ropes = [rope_tables(grid, self.head_dim) for grid in scales]
        self.attention_seconds = 0.0

    def norm(self, x):
        return F.layer_norm(x, (self.width,), eps=self.c["norm_eps"])

    def start(self, text, dtype):
        """Text features [T, channels] -> what every scale reads; an empty KV cache."""
        w = self.w
        features = torch.stack([text, w["cfg_uncond"][:len(text)]])
        features = rms_norm(features, w["text_norm.weight"], 1e-6)
        pool = "text_proj_for_sos.ca."
        heads = self.c["text_channels"] // 128
        query = w[pool + "mat_q"].view(1, 1, heads, -1).transpose(1, 2).expand(2, -1, -1, -1)
        key_value = self.key_value(pool, features, heads)
        pooled = F.scaled_dot_product_attention(query.to(key_value[0].dtype), *key_value).transpose(1, 2).flatten(2)
        self.condition = w.linear(pool + "proj", pooled).float()[:, 0]
        hidden = F.gelu(w.linear("text_proj_for_ca.0", features), approximate="tanh")
        words = w.linear("text_proj_for_ca.2", hidden)
        self.text_key_values = [self.key_value(block + "ca.", words, self.heads) for block in self.blocks]
        self.modulation = w.linear("shared_ada_lin.1", F.silu(self.condition)).float().view(2, 1, 6, self.width)
        tokens = sum(grid * grid for grid in self.scales)
        self.cache = [torch.empty(2, 2, self.heads, tokens, self.head_dim, dtype=dtype) for _ in self.blocks]
        self.cached = 0

    def key_value(self, name, x, heads):
        w = self.w
        bias = torch.cat([torch.zeros_like(w[name + "v_bias"]), w[name + "v_bias"]])
        product = F.linear(x, w[name + "mat_kv.weight"], bias)
        return product.view(2, x.shape[1], 2, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def self_attention(self, block, index, x, scale):
        w, n = self.w, x.shape[1]
        name = self.blocks[index] + "sa."
        bias = torch.cat([w[name + "q_bias"], torch.zeros(self.width), w[name + "v_bias"]])
        qkv = F.linear(x, w[name + "mat_qkv.weight"], bias).view(2, n, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = F.normalize(q.float(), dim=-1) * w[name + "scale_mul_1H11"].clamp_max(math.log(100)).exp()
        cache, end = self.cache[index], self.cached + n
        cache[0, :, :, self.cached:end] = rotate(F.normalize(k.float(), dim=-1), self.ropes[scale])
        cache[1, :, :, self.cached:end] = v
        q = rotate(q, self.ropes[scale]).to(cache.dtype)
        started = time.perf_counter()
        out = F.scaled_dot_product_attention(q, cache[0, :, :, :end], cache[1, :, :, :end], scale=1.0)
        self.attention_seconds += time.perf_counter() - started
        return w.linear(name + "proj", out.transpose(1, 2).flatten(2)).float()

    def cross_attention(self, block, index, x):
        query = self.w.linear(block + "ca.mat_q", x).view(2, -1, self.heads, self.head_dim).transpose(1, 2)
        key, value = self.text_key_values[index]
        out = F.scaled_dot_product_attention(query.to(key.dtype), key, value)
        return self.w.linear(block + "ca.proj", out.transpose(1, 2).flatten(2)).float()

    def scale_logits(self, scale, words):
        """Logits [2, n, 2 * bits] of a scale; `words` [1, n, bits] is None at the first."""
        w = self.w
        if words is None:
            x = (self.condition[:, None] + w["pos_start"]).float()
        else:
            x = w.linear("word_embed", words).float().expand(2, -1, -1)
        x = x + w["lvl_embed.weight"][scale]
        for index, block in enumerate(self.blocks):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = (w[block + "ada_gss"] + self.modulation).unbind(2)
            x = x + self.self_attention(block, index, self.norm(x) * (1 + scale1) + shift1, scale) * gamma1
            normed = F.layer_norm(x, (self.width,), w[block + "ca_norm.weight"], w[block + "ca_norm.bias"], self.c["norm_eps"])
            x = x + self.cross_attention(block, index, normed)
            hidden = w.linear(block + "ffn.fc1", self.norm(x) * (1 + scale2) + shift2)
            x = x + w.linear(block + "ffn.fc2", F.gelu(hidden, approximate="tanh")).float() * gamma2
        self.cached += x.shape[1]
        head_scale, head_shift = w.linear("head_nm.ada_lin.1", F.silu(self.condition)).float().view(2, 1, 2, -1).unbind(2)
        return w.linear("head", self.norm(x) * (1 + head_scale) + head_shift).float()


class Decoder:
    """BSQ-VAE decoder: summed codes -> picture in [-1, 1]."""

    def __init__(self, config, weights):
        self.c, self.w = config, weights

    def norm(self, name, x):
        x = F.group_norm(x, self.c["norm_num_groups"], self.w[name + ".norm.weight"], self.w[name + ".norm.bias"], self.c["norm_eps"])
        return F.silu(x)

    def block(self, name, x):
        y = self.w.conv(name + ".conv1", self.norm(name + ".norm1", x))
        y = self.w.conv(name + ".conv2", self.norm(name + ".norm2", y))
        if name + ".nin_shortcut.conv.weight" in self.w.tensors:
            x = self.w.conv(name + ".nin_shortcut", x, padding=0)
        return x + y

    def __call__(self, codes):
        x = self.w.conv("decoder.conv_in", codes.to(memory_format=torch.channels_last))
        for name in ("decoder.mid.block_1", "decoder.mid.block_2"):
            x = self.block(name, x)
        for level in reversed(range(len(self.c["ch_mult"]))):
            for i in range(self.c["num_res_blocks"] + 1):
                x = self.block(f"decoder.up.{level}.block.{i}", x)
            if level > 0:
                x = self.w.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.w.conv("decoder.conv_out", self.norm("decoder.norm_out", x)).float().clamp(-1, 1)


def resize(x, size):
    return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


class Model:
    def __init__(self, folder, dtype):
        import sentencepiece

        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        self.dtype, self.scales, self.defaults = dtype, config["scales"], config["defaults"]
        self.bits = config["vae"]["codebook_dim"]
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
        self.text = TextEncoder(config["text_encoder"], Weights(folder / "text_encoder.safetensors"))
        self.transformer = Transformer(config["transformer"], self.scales, Weights(folder / "transformer.safetensors"))
        self.decoder = Decoder(config["vae"], Weights(folder / "vae.safetensors"))

    @torch.inference_mode()
    def generate(self, prompt, seed=0, greedy=False, top_p=0.97, cfg=None):
        """-> picture f32 [3, H, W] in [-1, 1], {stage: seconds}"""
        cfg, tau = self.defaults["cfg"] if cfg is None else cfg, self.defaults["tau"]
        generator = torch.Generator().manual_seed(seed)
        times, started = {"scales": []}, time.perf_counter()

        def lap():
            nonlocal started
            before, started = started, time.perf_counter()
            return started - before

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            self.transformer.start(self.text(self.tokenizer.encode(prompt) + [self.tokenizer.eos_id()]), self.dtype)
            times["text"] = lap()
            last = self.scales[-1]
            codes, words = torch.zeros(1, self.bits, last, last), None
            for index, grid in enumerate(self.scales):
                self.transformer.attention_seconds = 0.0
                logits = self.transformer.scale_logits(index, words) / tau
                logits = (cfg * logits[:1] + (1 - cfg) * logits[1:]).view(1, grid * grid, self.bits, 2)
                p = logits.softmax(-1)[..., 1]
                bits = p > 0.5
                if not greedy:  # top-p leaves the likelier value alone where the other has at most 1 - top_p
                    drawn = torch.rand(p.shape, generator=generator) < p
                    bits = torch.where((p - 0.5).abs() >= top_p - 0.5, bits, drawn)
                code = (bits.float() * 2 - 1) / math.sqrt(self.bits)
                codes = codes + resize(code.transpose(1, 2).reshape(1, self.bits, grid, grid), last)
                if index + 1 < len(self.scales):
                    words = resize(codes, self.scales[index + 1]).flatten(2).transpose(1, 2)
                times["scales"].append({"grid": grid, "seconds": lap(), "attention_seconds": self.transformer.attention_seconds})
            picture = self.decoder(codes)[0]
            times["decode"] = lap()
        return picture, times


def machine(threads):
    return {"torch": torch.__version__, "threads": threads, "cpu": torch.backends.cpu.get_cpu_capability(),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def bench_model(options):
    started = time.perf_counter()
    model = Model(options.model, DTYPES[options.dtype])
    report = {"mode": "model", "dtype": options.dtype, "load_seconds": time.perf_counter() - started}
    seconds, stages = [], []
    for i in range(1 + options.repeat):
        started = time.perf_counter()
        _, times = model.generate(options.prompt, seed=i)
        seconds.append(time.perf_counter() - started)
        stages.append(times)
    warm = sorted(range(1, len(seconds)), key=lambda i: seconds[i])
    report |= {"cold_seconds": seconds[0], "warm_seconds": statistics.median(seconds[1:]), "all_seconds": seconds,
               "stages_of_the_median": stages[warm[len(warm) // 2]]}
    return report | machine(options.threads)


def median_seconds(call, repeat):
    call()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@torch.inference_mode()
def bench_attention(options):
    """The last scale of a 1M picture with guidance, heads as in the 2B model: every query reads every key."""
    batch, heads, queries, keys, dim, size = 2, 4, 4096, 10521, 128, 4096
    report = {"mode": "attention", "shape": {"batch": batch, "heads": heads, "queries": queries, "keys": keys, "head_dim": dim}}
    for name, dtype in DTYPES.items():
        q, k = (F.normalize(torch.randn(batch, heads, n, dim), dim=-1).to(dtype) for n in (queries, keys))
        v = torch.randn(batch, heads, keys, dim).to(dtype)
        seconds = median_seconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, scale=1.0), options.repeat)
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        gemm = median_seconds(lambda a=a, b=b: torch.mm(a, b), options.repeat)
        report[name] = {"attention_seconds": seconds, "attention_gflops": 4e-9 * batch * heads * queries * keys * dim / seconds,
                        "gemm_seconds": gemm, "gemm_gflops": 2e-9 * size**3 / gemm}
    return report | machine(options.threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["model", "attention"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="model: autocast to bf16, or f32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3, help="warm runs; the median is reported")
    parser.add_argument("--prompt", default="grinning face, noto style")
    parser.add_argument("--model", default=Path(__file__).resolve().parent.parent / "models" / "emoji")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps((bench_model if options.mode == "model" else bench_attention)(options), indent=1))


if __name__ == "__main__":
    main()
