"""What the models compute, in float64 numpy: the T5 encoder, Infinity's transformer, the BSQ-VAE. Slow and plain.

thin_fixtures.py checks it against the outputs of upstream's own code, then uses it where weights are rounded.
Facts: upstream's infinity/models/{infinity,basic}.py, infinity/models/bsq_vae, and Hugging Face's T5.
"""

import math

import numpy as np


def linear(x, weight, bias=None):
    y = x @ weight.T
    return y if bias is None else y + bias


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


# ---- resizing: a matrix [out, in] for each direction ----
def linear_matrix(size, out):
    """Half-pixel centres, no antialias."""
    m = np.zeros((out, size))
    for i in range(out):
        at = max((i + 0.5) * size / out - 0.5, 0.0)
        low = min(int(at), size - 1)
        m[i, low] += 1 - (at - low)
        m[i, min(low + 1, size - 1)] += at - low
    return m


def area_matrix(size, out):
    m = np.zeros((out, size))
    for i in range(out):
        begin, end = i * size // out, -(-(i + 1) * size // out)
        m[i, begin:end] = 1 / (end - begin)
    return m


def resize(x, grid, matrix):
    """[..., h, w] to [..., *grid]"""
    return matrix(x.shape[-2], grid[0]) @ x @ matrix(x.shape[-1], grid[1]).T


# ---- BSQ-VAE, one picture [channels, h, w] ----
class Vae:
    def __init__(self, weights, config):
        self.w, self.c = weights, config
        self.levels = len(config["ch_mult"])

    def conv(self, name, x, stride=1, padding=((1, 1), (1, 1))):
        weight = self.w[name + ".weight"]
        k = weight.shape[-1]
        if k > 1:
            x = np.pad(x, ((0, 0), *padding))
        h, w = (x.shape[1] - k) // stride + 1, (x.shape[2] - k) // stride + 1
        y = np.zeros((weight.shape[0], h, w))
        for dy in range(k):
            for dx in range(k):
                part = x[:, dy : dy + stride * h : stride, dx : dx + stride * w : stride]
                y += np.tensordot(weight[:, :, dy, dx], part, 1)
        return y + self.w[name + ".bias"][:, None, None]

    def norm_silu(self, name, x):
        groups = x.reshape(self.c["group_norm_groups"], -1)
        groups = layer_norm(groups, self.c["group_norm_eps"])
        return silu(groups.reshape(x.shape) * self.w[name + ".norm.weight"][:, None, None] + self.w[name + ".norm.bias"][:, None, None])

    def block(self, name, x):
        h = self.conv(name + ".conv1.conv", self.norm_silu(name + ".norm1", x))
        h = self.conv(name + ".conv2.conv", self.norm_silu(name + ".norm2", h))
        if name + ".nin_shortcut.conv.weight" in self.w:
            x = self.conv(name + ".nin_shortcut.conv", x)
        return x + h

    def middle(self, side, x):
        return self.block(side + ".mid.block_2", self.block(side + ".mid.block_1", x))

    def decode(self, z):
        x = self.middle("decoder", self.conv("decoder.conv_in.conv", z))
        for level in reversed(range(self.levels)):
            for i in range(self.c["num_res_blocks"] + 1):
                x = self.block(f"decoder.up.{level}.block.{i}", x)
            if level > 0:
                x = self.conv(f"decoder.up.{level}.upsample.conv.conv", x.repeat(2, 1).repeat(2, 2))
        x = self.conv("decoder.conv_out.conv", self.norm_silu("decoder.norm_out", x))
        return np.clip(x, -1, 1)

    def encode(self, picture):
        x = self.conv("encoder.conv_in.conv", picture)
        for level in range(self.levels):
            for i in range(self.c["num_res_blocks"]):
                x = self.block(f"encoder.down.{level}.block.{i}", x)
            if level < self.levels - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv.conv", x, 2, ((0, 1), (0, 1)))
        x = self.middle("encoder", x)
        return self.conv("encoder.conv_out.conv", self.norm_silu("encoder.norm_out", x))


def picture_tensors(decoded):
    rgb = (decoded + 1) / 2
    return {
        "sub2": rgb[None, :, ::2, ::2],
        "u8": np.floor(255 * rgb).transpose(1, 2, 0)[None].astype(np.uint8),
    }


def run_vae(weights, config, io):
    vae = Vae(weights, config["vae"])
    out = {"image_u8_rgb_hwc": io["image_u8_rgb_hwc"]}
    features = vae.encode(2 * (io["image_u8_rgb_hwc"].transpose(2, 0, 1) / 255.0) - 1)
    # The quantiser is compared given the stored features, so it starts from what float32 keeps of them.
    out["encoder_features"] = features[None].astype(np.float32)
    residual = out["encoder_features"][0].astype(np.float64)
    grids = [tuple(g[1:]) for g in config["vae_scale_schedule"]]
    total = np.zeros_like(residual)
    for k, grid in enumerate(grids):
        if k > 0:
            out[f"var_input.s{k}"] = resize(total, grid, area_matrix)[None]
        small = resize(residual, grid, area_matrix)
        out[f"residual_resized.s{k}"] = small[None]
        out[f"bits.s{k}"] = (small > 0).transpose(1, 2, 0)[None].astype(np.uint8)
        code = resize(np.where(small > 0, 1.0, -1.0) / math.sqrt(len(small)), grids[-1], linear_matrix)
        residual, total = residual - code, total + code
    out["quantized_sum"] = total[None]
    out["recon_rgb_sub2"] = picture_tensors(vae.decode(total))["sub2"]
    return out


# ---- T5 encoder ----
def position_bias(table, length, buckets, max_distance):
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]  # key minus query
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(relative)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * (half - exact)).astype(np.int64)
    bucket = np.where(relative > 0, half, 0) + np.where(distance < exact, distance, np.minimum(far, half - 1))
    return table[bucket].transpose(2, 0, 1)


def t5_encode(w, c, ids):
    layers, heads, eps = [], c["num_heads"], c["layer_norm_epsilon"]
    x = w["shared.weight"][ids]
    bias = position_bias(w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"], len(ids),
                         c["relative_attention_num_buckets"], c["relative_attention_max_distance"])
    for i in range(c["num_layers"]):
        layers.append(x)
        name = f"encoder.block.{i}.layer."
        h = rms_norm(x, w[name + "0.layer_norm.weight"], eps)
        q, k, v = (linear(h, w[f"{name}0.SelfAttention.{p}.weight"]).reshape(len(ids), heads, -1).transpose(1, 0, 2) for p in "qkv")
        h = (softmax(q @ k.transpose(0, 2, 1) + bias) @ v).transpose(1, 0, 2).reshape(len(ids), -1)
        x = x + linear(h, w[name + "0.SelfAttention.o.weight"])
        h = rms_norm(x, w[name + "1.layer_norm.weight"], eps)
        dense = name + "1.DenseReluDense."
        h = gelu_tanh(linear(h, w[dense + "wi_0.weight"])) * linear(h, w[dense + "wi_1.weight"])
        x = x + linear(h, w[dense + "wo.weight"])
    layers.append(rms_norm(x, w["encoder.final_layer_norm.weight"], eps))
    return layers, bias


def run_t5(weights, config, io):
    out = {}
    for name, ids in io.items():
        if not name.startswith("ids."):
            continue
        out[name] = ids
        if name == "ids.padded_example":
            continue
        layers, bias = t5_encode(weights, config, ids)
        out["hidden" + name[3:]] = layers[-1][:: 16 if len(ids) >= 200 else 1]
        if name == "ids.00":
            out.update({f"debug.layer_out.{i}": x for i, x in enumerate(layers)})
    table = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    out["debug.position_bias_40x40"] = position_bias(table, 40, config["relative_attention_num_buckets"], config["relative_attention_max_distance"])
    return out


# ---- Infinity ----
def attend(q, k, v, scale, rows=512):
    """[heads, n, d]; `rows` queries at a time, as 4096 of them with all their keys take gigabytes."""
    parts = [softmax(q[:, i : i + rows] @ k.transpose(0, 2, 1) * scale) @ v for i in range(0, q.shape[1], rows)]
    return np.concatenate(parts, 1)


def split_heads(x, heads):
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def join_heads(x):
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def rope(x, grid, last, base):
    """Pairs (2i, 2i+1) of [heads, n, d]; the first half of the pairs by row, the second by column."""
    count = x.shape[-1] // 4
    frequencies = base ** (-2.0 * np.arange(count) / (x.shape[-1] / 2))
    axes = [np.round(np.arange(n, dtype=np.float32) * np.float32(m / n)) for n, m in zip(grid, last)]
    row, col = np.meshgrid(*axes, indexing="ij")
    angle = np.concatenate([row.reshape(-1, 1) * frequencies, col.reshape(-1, 1) * frequencies], 1)
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], np.cos(angle), np.sin(angle)
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def bits_to_codes(bits, grid, patchify):
    """[n, bits] of 0 and 1 to [d, h, w] of +-1/sqrt(d) on the VAE's grid."""
    x = bits.T.reshape(-1, *grid).astype(np.float64)
    if patchify:
        d, h, w = len(x) // 4, *grid
        x = x.reshape(d, 2, 2, h, w).transpose(0, 3, 1, 4, 2).reshape(d, 2 * h, 2 * w)
    return (2 * x - 1) / math.sqrt(len(x))


def codes_to_words(codes, grid, patchify):
    scale = 2 if patchify else 1
    x = resize(codes, (scale * grid[0], scale * grid[1]), linear_matrix)
    if patchify:
        x = x.reshape(-1, grid[0], 2, grid[1], 2).transpose(0, 2, 4, 1, 3)
    return x.reshape(-1, grid[0] * grid[1]).T


class Infinity:
    def __init__(self, weights, config, last_grid):
        self.w, self.c, self.last = weights, config, last_grid
        chunks, blocks = config["block_chunks"], range(config["depth"])
        per_chunk = len(blocks) // chunks
        self.names = [f"blocks.{i}." if chunks == 1 else f"block_chunks.{i // per_chunk}.module.{i % per_chunk}." for i in blocks]

    def project(self, name, x):
        return linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def keys_values(self, name, x, heads):
        k, v = np.split(linear(x, self.w[name + ".mat_kv.weight"]), 2, -1)
        return split_heads(k, heads), split_heads(v + self.w[name + ".v_bias"], heads)

    def pool(self, text):
        name = "text_proj_for_sos.ca"
        q = self.w[name + ".mat_q"].transpose(1, 0, 2)  # [heads, 1, d]
        k, v = self.keys_values(name, text, q.shape[0])
        return self.project(name + ".proj", join_heads(attend(q, k, v, q.shape[-1] ** -0.5)))[0]

    def self_attention(self, name, x, grid, cache):
        heads, eps = self.c["num_heads"], 1e-12
        q, k, v = np.split(linear(x, self.w[name + "mat_qkv.weight"]), 3, -1)
        q, k, v = (split_heads(y, heads) for y in (q + self.w[name + "q_bias"], k, v + self.w[name + "v_bias"]))
        q, k = (y / np.maximum(np.sqrt((y * y).sum(-1, keepdims=True)), eps) for y in (q, k))
        q = q * np.exp(np.minimum(self.w[name + "scale_mul_1H11"][0], math.log(100)))
        q, k = (rope(y, grid, self.last, self.c["rope_base"]) for y in (q, k))
        cache.append((k, v))
        k, v = (np.concatenate(y, 1) for y in zip(*cache))
        return self.project(name + "proj", join_heads(attend(q, k, v, 1.0)))

    def cross_attention(self, name, x, text):
        heads = self.c["num_heads"]
        q = split_heads(self.project(name + "mat_q", x), heads)
        k, v = self.keys_values(name[:-1], text, heads)
        return self.project(name + "proj", join_heads(attend(q, k, v, q.shape[-1] ** -0.5)))

    def block(self, index, x, gss, text, grid, cache):
        name, eps, sub = self.names[index], self.c["norm_eps"], {}
        gamma1, gamma2, scale1, scale2, shift1, shift2 = gss + self.w[name + "ada_gss"][0, 0]
        sub["sa"] = self.self_attention(name + "sa.", layer_norm(x, eps) * (1 + scale1) + shift1, grid, cache)
        x = x + sub["sa"] * gamma1
        normed = layer_norm(x, eps) * self.w[name + "ca_norm.weight"] + self.w[name + "ca_norm.bias"]
        sub["ca"] = self.cross_attention(name + "ca.", normed, text)
        x = x + sub["ca"]
        h = gelu_tanh(self.project(name + "ffn.fc1", layer_norm(x, eps) * (1 + scale2) + shift2))
        sub["ffn"] = self.project(name + "ffn.fc2", h)
        return x + sub["ffn"] * gamma2, sub

    def head(self, x, cond):
        scale, shift = np.split(self.project("head_nm.ada_lin.1", silu(cond)), 2)
        return self.project("head", layer_norm(x, self.c["norm_eps"]) * (1 + scale) + shift)


def run_infinity(weights, vae_weights, config, io, last_grid):
    """Every tensor by its name in the fixture, for all scales and blocks; `closest`: the smallest difference of two logits."""
    model = Infinity(weights, config, last_grid)
    patchify, pictures = bool(config["apply_spatial_patchify"]), len(config["lens"])
    uncond = np.concatenate([weights["cfg_uncond"][:n] for n in config["lens"]])
    out = {name: io[name] for name in ("kv_cond", "lens", "cu_seqlens_2B")}
    normed = rms_norm(np.concatenate([io["kv_cond"], uncond]), weights["text_norm.weight"], config["norm_eps"])
    projected = model.project("text_proj_for_ca.2", gelu_tanh(model.project("text_proj_for_ca.0", normed)))
    bounds = list(zip(io["cu_seqlens_2B"], io["cu_seqlens_2B"][1:]))
    cond = np.stack([model.pool(normed[a:b]) for a, b in bounds])
    gss = linear(silu(cond), weights["shared_ada_lin.1.weight"], weights["shared_ada_lin.1.bias"]).reshape(2 * pictures, 6, -1)
    out.update(kv_uncond=uncond, text_normed=normed, ca_kv=projected, cond_BD=cond, cond_gss=gss[:, None])

    grids = [tuple(g[1:]) for g in config["scale_schedule"]]
    vae_last = tuple(n * (2 if patchify else 1) for n in grids[-1])
    caches = [[[] for _ in range(config["depth"])] for _ in range(2 * pictures)]
    summed = [0.0] * pictures
    closest = math.inf
    x = [c[None] + weights["pos_start"][0] for c in cond]
    for k, grid in enumerate(grids):
        x = [y + weights["lvl_embed.weight"][k] for y in x]
        out[f"block_input.s{k}"] = np.stack(x)
        for i in range(config["depth"]):
            done = [model.block(i, x[b], gss[b], projected[slice(*bounds[b])], grid, caches[b][i]) for b in range(2 * pictures)]
            x = [y for y, _ in done]
            out[f"hidden.s{k}.b{i}"] = np.stack(x)
            for part in ("sa", "ca", "ffn"):
                out[f"sub.s{k}.b{i}.{part}"] = np.stack([sub[part] for _, sub in done])
        logits = np.stack([model.head(y, c) for y, c in zip(x, cond)])
        cfg, tau = config["cfg_list"][k], config["tau_list"][k]
        guided = (cfg * logits[:pictures] + (1 - cfg) * logits[pictures:]) / tau
        bits = (guided[..., 1::2] > guided[..., 0::2]).astype(np.uint8)
        closest = min(closest, np.abs(guided[..., 1::2] - guided[..., 0::2]).min())
        out.update({f"logits_cond.s{k}": logits[:pictures], f"logits_uncond.s{k}": logits[pictures:], f"logits_cfg.s{k}": guided, f"bits.s{k}": bits})
        summed = [s + resize(bits_to_codes(b, grid, patchify), vae_last, linear_matrix) for s, b in zip(summed, bits)]
        out[f"summed_codes.s{k}"] = np.stack(summed)
        if k + 1 < len(grids):
            words = np.stack([codes_to_words(s, grids[k + 1], patchify) for s in summed])
            embedded = model.project("word_embed", words)
            out.update({f"next_features.s{k + 1}": words, f"word_embed.s{k + 1}": embedded})
            x = [*embedded, *embedded]
    if vae_weights:
        picture = picture_tensors(Vae(vae_weights, config["vae"]).decode(summed[0]))
        out.update(image_rgb_sub2=picture["sub2"], image_u8_rgb_hwc=picture["u8"])
    return out, closest
