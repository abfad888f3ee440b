"""Expected tensors of an exported model, computed by PyTorch in f32, in the form that `conformance` compares.

build/release/tests/conformance --model MODEL FIXTURE
"""

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from .config import Preset
from .files import Tensors, save_tensors, write_json
from .quantise import Pyramid
from .sampling import Settings, walk
from .sheets import to_bytes
from .text_encoder import T5Encoder
from .tokens import Tokenizer
from .transformer import Infinity
from .vae import BsqVae

PROMPTS = ("red heart, noto style", "a rocket")
LOGIT_TOKENS = 64  # of a scale; the others are told by their bits
LARGE = ("summed_codes", "image_u8_rgb_hwc")  # a thin fixture has them for the first prompt alone


class ExportedModel:
    """A model folder (bf16 or f32) in PyTorch, on the CPU."""

    def __init__(self, preset: Preset, folder: Path) -> None:
        def read(name: str) -> Tensors:
            return {key: t.float() for key, t in load_file(folder / f"{name}.safetensors").items()}

        self.pyramid = Pyramid(preset.scales)
        self.text_encoder, self.transformer, self.vae = T5Encoder(preset.text), Infinity(preset), BsqVae(preset.vae)
        self.text_encoder.load_state_dict(read("text_encoder"))
        self.transformer.load_state_dict(read("transformer"))
        self.vae.load_state_dict(read("vae"))
        for module in (self.text_encoder, self.transformer, self.vae):
            module.eval().requires_grad_(False)
        self.tokenizer = Tokenizer(folder / "spiece.model")


def _packed(bits: torch.Tensor) -> torch.Tensor:
    """[tokens, bits] bool to [tokens, bits / 8] uint8, most significant bit first."""
    return torch.from_numpy(np.packbits(bits.numpy(), axis=-1))


@torch.no_grad()
def expected_tensors(model: ExportedModel, prompt: str, cfg: float) -> Tensors:
    """Everything that `conformance` compares for one prompt drawn greedily."""
    ids = model.tokenizer.batch([prompt])
    states = model.text_encoder(ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    out: Tensors = {"ids": ids[0].to(torch.int32), "text_hidden": states[0]}
    nothing = model.transformer.cfg_uncond[None, : ids.shape[1]]
    text = model.transformer.read_text(torch.cat([states, nothing]), torch.cat([mask, mask]))
    out["cond_BD"] = text.pooled

    def keep(k: int, logits: torch.Tensor) -> None:
        pairs = logits[0].unflatten(-1, (-1, 2))
        step = math.ceil(len(pairs) / LOGIT_TOKENS)
        out[f"logit_difference.s{k}"] = (pairs[..., 1] - pairs[..., 0])[::step]

    settings = Settings(cfg=cfg, tau=1.0, greedy=True)
    summed, bits = walk(model.transformer, model.pyramid, states, mask, settings, on_logits=keep)
    for k, bit in enumerate(bits):
        out[f"bits.s{k}"] = _packed(bit[0])
    out["summed_codes"] = summed
    out["image_u8_rgb_hwc"] = to_bytes(model.vae.decoder(summed)).permute(0, 2, 3, 1)
    return out


def write_fixture(preset: Preset, model_folder: Path, folder: Path, cfg: float = 3.0, thin: bool = False) -> None:
    """A fixture folder for `conformance --model model_folder folder`. `thin`: one picture for all prompts, since text
    states, logits and bits tell the rest."""
    model = ExportedModel(preset, model_folder)
    config = {}
    for i, prompt in enumerate(PROMPTS):
        name = f"io-{i}.safetensors"
        tensors = expected_tensors(model, prompt, cfg)
        if thin and i > 0:
            tensors = {key: t for key, t in tensors.items() if key not in LARGE}
        save_tensors(folder / name, tensors)
        config[prompt] = {"file": name, "cfg": cfg}
    write_json(folder / "config.json", config)
