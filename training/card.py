"""The model card: README.md of a model folder, with curves and sample sheet, made from what the training left."""

import io
import json
from pathlib import Path

from PIL import Image
from safetensors import safe_open

from .curves import draw_curves, read_log
from .data import SOURCES
from .errors import TrainingError
from .evaluate import as_markdown
from .files import write_bytes
from .loop import StageState

LINKS = {
    "noto": "https://github.com/googlefonts/noto-emoji",
    "noto-v1": "https://github.com/googlefonts/noto-emoji",
    "fluent-emoji": "https://github.com/microsoft/fluentui-emoji",
    "fluent-emoji-flat": "https://github.com/microsoft/fluentui-emoji",
    "fxemoji": "https://github.com/mozilla/fxemoji",
    "twemoji": "https://github.com/twitter/twemoji",
}


def _parameters(path: Path) -> float:
    """Millions of numbers in a safetensors file, scales of int8 weights left out."""
    total = 0
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  safe_open is no dictionary
            if not name.endswith(".weight.scale"):
                count = 1
                for side in file.get_slice(name).get_shape():
                    count *= side
                total += count
    return total / 1e6


def _files(folder: Path, config: dict) -> list[str]:
    t, v, e = config["transformer"], config["vae"], config["text_encoder"]
    about = {
        "transformer": f"{t['depth']} layers, width {t['embed_dim']}, {t['num_heads']} heads; names are Infinity's",
        "vae": f"BSQ-VAE, {v['patch_size']} pixels and {v['codebook_dim']} bits a token, encoder and decoder",
        "text_encoder": f"T5 encoder, {e['num_layers']} layers, width {e['d_model']}",
    }
    lines = ["| file | what | parameters |", "|---|---|---|"]
    for name, text in about.items():
        count = _parameters(folder / f"{name}.safetensors")
        lines.append(f"| `{name}.safetensors` | {text} | {count:.2f} M |")
    lines.append(f"| `spiece.model` | sentencepiece, {e['vocab_size']} pieces | |")
    size = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".safetensors", ".model", ".json"))
    return [*lines, "", f"{size / 1e6:.1f} MB in all. Defaults: cfg {config['defaults']['cfg']:g}, tau "
            f"{config['defaults']['tau']:g}."]  # fmt: skip


def _training(checkpoint: Path) -> list[str]:
    state = json.loads((checkpoint / "state.json").read_text())
    stages = {name: StageState(**value) for name, value in state["stages"].items()}
    losses = {r["stage"]: r["loss"] for r in read_log(checkpoint / "log.jsonl") if "loss" in r}
    lines = ["| stage | seconds | steps | pictures | last loss |", "|---|---|---|---|---|"]
    for name, stage in sorted(stages.items(), key=lambda item: item[0] != "vae"):
        loss = f"{losses[name]:.4f}" if name in losses else ""
        lines.append(f"| {name} | {stage.seconds:.0f} | {stage.steps} | {stage.pictures} | {loss} |")
    return [f"{state['runs']} runs that continued each other.", "", *lines]


def _plan(folder: Path) -> list[str]:
    """What `sparvar tune` noted in plan.json; nothing where the model has no plan."""
    path = folder / "plan.json"
    if not path.exists():
        return []
    try:
        plan = json.loads(path.read_text())
        name, note = plan["name"], plan.get("note", [])
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: not an attention plan ({error!r}); make it anew with `sparvar tune`") from error
    about = [
        "## Attention plan",
        f"`plan.json` ({name}) is what pictures are drawn with unless another plan is named; `--attention dense` "
        "leaves nothing out.",
        "",
    ]  # fmt: skip
    return [*about, "```", *note, "```", ""] if note else about


def _write_sheet(source: Path, target: Path, room: int | None) -> None:
    """The sample sheet as it is, or as JPEG of the best quality of at most `room` bytes."""
    data = source.read_bytes()
    if room is None or len(data) <= room:
        return write_bytes(target, data)
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    for quality in range(88, 39, -4):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
        if buffer.tell() <= room:
            return write_bytes(target, buffer.getvalue())
    raise TrainingError(
        f"{target}: the sheet takes {buffer.tell()} bytes at the least, and {max(room, 0)} are left below --limit"
    )


def write_card(checkpoint: Path, folder: Path, machine: str, limit: int | None = None) -> None:
    """Writes README.md, curves.png and sheet.jpg into the exported model folder `folder`, which then has less than
    `limit` bytes: the sheet is pressed until it fits. Throws TrainingError where it cannot be, or where training left
    too little."""
    needed = [checkpoint / name for name in ("report.json", "sheet-36.jpg", "state.json", "log.jsonl")]
    for path in [*needed, folder / "config.json"]:
        if not path.exists():
            raise TrainingError(f"{path}: is missing; the stages `evaluate` and `export` come before the card")
    report = json.loads(needed[0].read_text())
    config = json.loads((folder / "config.json").read_text())
    side = config["scales"][-1] * config["vae"]["patch_size"]
    tokens = sum(s * s for s in config["scales"])
    draw_curves(checkpoint / "log.jsonl", folder / "curves.png")
    styles = ", ".join(f"`{source.style}`" for source in SOURCES.values())
    sources = [
        f"| `{about.style}` | [{about.title}]({LINKS[name]}) | {about.licence} |" for name, about in SOURCES.items()
    ]
    prompts = "; ".join(report["sheet_prompts"])
    lines = [
        f"# {folder.name}",
        f"A text-to-image model in Infinity's architecture: {side}x{side} emoji drawings, "
        f"{len(config['scales'])} scales, {tokens} tokens of {config['vae']['codebook_dim']} bits.",
        "",
        *_files(folder, config),
        "",
        "## Prompts",
        "A drawing's name and a style, as `red heart, noto style`. Styles: " + styles + ".",
        "",
        "![36 drawings](sheet.jpg)",
        "",
        f"Drawn by lot, not chosen, row by row: {prompts}.",
        "",
        as_markdown(report).replace("# Evaluation", "## Measured").rstrip(),
        "",
        "The named picture is compared with all pictures of its style at 64x64 RGB by L2; the lists are in "
        "`training/lists`. `unseen`: the drawing was in no training step, its name in other styles was.",
        "",
        *_plan(folder),
        "## Training",
        f"By [`training/`](../../training/README.md) on {machine}.",
        "",
        *_training(checkpoint),
        "",
        "![Loss against time](curves.png)",
        "",
        "## Training pictures",
        "Vector drawings, on white; they are not in this repository.",
        "",
        "| style | source | licence |",
        "|---|---|---|",
        *sources,
        "",
        "CC-BY-4.0: graphics by Twitter, Inc. and other contributors. Names and keywords: unicode-emoji-json and "
        "emojilib (MIT). The model is offered under the repository's licence, Apache-2.0; who spreads pictures that "
        "stay close to a drawing should keep to that drawing's licence.",
        "",
        "## Limits",
        "It was trained on these drawings and nothing else: one thing on white, no scenes. Names outside the list of "
        "its captions have no picture to be like.",
    ]  # fmt: skip
    write_bytes(folder / "README.md", ("\n".join(lines) + "\n").encode())
    room = None
    if limit is not None:
        others = (p for p in folder.iterdir() if p.is_file() and p.name != "sheet.jpg")
        room = limit - 1 - sum(p.stat().st_size for p in others)
    _write_sheet(checkpoint / "sheet-36.jpg", folder / "sheet.jpg", room)
