"""The bundled model in the forms of upstream's checkpoints: make_checkpoints.py MODEL FOLDER

A program of its own: the writer of tests/cli plants names of PyTorch in its process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "cli"))
import torch_writer
from torch_writer import read_safetensors, state_dict


def shards(folder: Path, stem: str, suffix: str, tensors: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names, index = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"{stem}-{i + 1:05}-of-00002.{suffix}"
        held = {name: tensors[name] for name in part}
        if suffix == "bin":
            torch_writer.save(folder / file, state_dict(held))
        else:
            torch_writer.write_safetensors(folder / file, held)
        index.update(dict.fromkeys(part, file))
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main(model: Path, out: Path) -> None:
    transformer = read_safetensors(model / "transformer.safetensors")
    # Buffers that upstream's files have and the engine does not need.
    extra = {"attn_bias_for_masking": ("F32", [1, 1, 2, 2], bytes(16)), "lvl_1L": ("I64", [1, 3], bytes(24))}
    torch_writer.save(out / "flat.pth", state_dict({**transformer, **extra}))
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in transformer.items()}
    nested = {"epoch": 1, "trainer": {"gpt_fsdp": state_dict(wrapped), "opt": {"state": {}}}}
    torch_writer.save(out / "nested.pth", nested, protocol=4)
    torch_writer.write_safetensors(out / "single.safetensors", transformer)
    shards(out / "bin", "pytorch_model", "bin", transformer)
    shards(out / "safetensors", "model", "safetensors", transformer)
    vae = state_dict(read_safetensors(model / "vae.safetensors"))
    torch_writer.save(out / "vae.pth", {"vae": vae, "epoch": 7, "args": {"lr": 1e-4, "names": ["a", None]}})
    text = out / "flan-t5"
    shards(text, "pytorch_model", "bin", read_safetensors(model / "text_encoder.safetensors"))
    config = json.loads((model / "config.json").read_text())["text_encoder"]
    del config["type"]
    (text / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    (text / "spiece.model").write_bytes((model / "spiece.model").read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
