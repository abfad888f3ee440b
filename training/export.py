"""Writes a trained model as a folder that the engine reads (docs/model-format.md)."""

from pathlib import Path
from typing import NamedTuple

import torch

from .config import Preset
from .errors import TrainingError
from .files import Tensors, load_shards, save_tensors, write_bytes, write_json
from .sampling import Settings
from .tokens import Tokenizer

LIMIT_BYTES = 32_000_000


class Exported(NamedTuple):
    """What came of an export."""

    size: int  # bytes of the whole folder
    worst_error: float  # int8: largest relative error (Frobenius) of a matrix, else 0


def model_config(preset: Preset, settings: Settings) -> dict:
    """`config.json`."""
    size, text, vae = preset.transformer, preset.text, preset.vae
    return {
        "architecture": "infinity",
        "transformer": {
            "depth": size.depth,
            "embed_dim": size.width,
            "num_heads": size.heads,
            "block_chunks": size.chunks,
            "mlp_ratio": 4,
            "text_channels": text.width,
            "text_maxlen": size.text_maxlen,
            "codebook_dim": vae.bits,
            "apply_spatial_patchify": False,
            "rope2d_normalized_by_hw": 2,
            "add_lvl_embeding_only_first_block": True,
            "cos_attn": True,
            "shared_aln": True,
            "norm_eps": 1e-6,
        },
        "vae": {
            "codebook_dim": vae.bits,
            "patch_size": vae.patch,
            "ch": vae.channels,
            "ch_mult": list(vae.multipliers),
            "num_res_blocks": vae.res_blocks,
            "norm_num_groups": vae.groups,
            "norm_eps": 1e-6,
            "attention": False,
        },
        "text_encoder": {
            "type": "t5",
            "vocab_size": text.vocab,
            "d_model": text.width,
            "d_kv": text.head_dim,
            "d_ff": text.hidden,
            "num_layers": text.layers,
            "num_heads": text.heads,
            "relative_attention_num_buckets": text.buckets,
            "relative_attention_max_distance": text.max_distance,
            "feed_forward_proj": "gated-gelu",
            "layer_norm_epsilon": 1e-6,
        },
        "scales": list(preset.scales),
        "rope_grid": preset.rope_grid,
        "defaults": {"cfg": settings.cfg, "tau": settings.tau},
    }


def quantise_int8(tensors: Tensors) -> tuple[Tensors, float]:
    """Every matrix [out, in] as int8 with a scale f32 [out] beside it; returns the largest relative error too.

    Embeddings, AdaLN terms and vectors stay bf16: they are small, or their error reaches everything.
    """
    out: Tensors = {}
    worst = 0.0
    for name, tensor in tensors.items():
        matrix = tensor.ndim == 2 and name.endswith(".weight") and min(tensor.shape) >= 32
        if not matrix or any(part in name for part in ("lvl_embed", "ada_lin", "relative_attention_bias")):
            out[name] = tensor.to(torch.bfloat16)
            continue
        scale = tensor.float().abs().amax(1).clamp_min(1e-12) / 127
        rounded = (tensor.float() / scale[:, None]).round().clamp(-127, 127)
        error = (rounded * scale[:, None] - tensor.float()).norm() / tensor.float().norm().clamp_min(1e-12)
        worst = max(worst, error.item())
        out[name], out[f"{name}.scale"] = rounded.to(torch.int8), scale
    return out, worst


def export_model(
    preset: Preset, source: Path, tokenizer: Path, folder: Path, settings: Settings, dtype: str = "bf16"
) -> Exported:
    """Writes the model folder from the checkpoints in `source`. `dtype`: bf16, f32 or int8."""
    if dtype not in ("bf16", "f32", "int8"):
        raise TrainingError(f"there is no type {dtype}; there are bf16, f32 and int8", 2)
    vae, both = load_shards(source, "vae"), load_shards(source, "ar")
    if not vae or not both:
        raise TrainingError(f"{source}: no whole model (vae-*.safetensors and ar-*.safetensors); train it first")
    pieces = len(Tokenizer(tokenizer))
    if pieces > preset.text.vocab:
        raise TrainingError(f"{tokenizer}: {pieces} pieces; the model knows {preset.text.vocab}: another tokenizer")
    prefix = "text_encoder."
    text = {name.removeprefix(prefix): t for name, t in both.items() if name.startswith(prefix)}
    prefix = "transformer."
    transformer = {name.removeprefix(prefix): t for name, t in both.items() if name.startswith(prefix)}
    folder.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    for name, tensors in (("vae", vae), ("text_encoder", text), ("transformer", transformer)):
        if dtype == "int8" and name != "vae":
            tensors, error = quantise_int8(tensors)
            worst = max(worst, error)
        else:
            kind = torch.float32 if dtype == "f32" else torch.bfloat16
            tensors = {key: t.to(kind) for key, t in tensors.items()}
        save_tensors(folder / f"{name}.safetensors", tensors)
    write_bytes(folder / "spiece.model", tokenizer.read_bytes())  # perhaps its own, when a model is made anew
    write_json(folder / "config.json", model_config(preset, settings))
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if size > LIMIT_BYTES and dtype != "f32":
        raise TrainingError(f"{folder}: the model takes {size} bytes; at most {LIMIT_BYTES} belong in the repository")
    return Exported(size, worst)
