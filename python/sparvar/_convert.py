"""Upstream's checkpoints into a model folder: the function, and the command line of `python -m sparvar.convert`.

The work is the engine's: it reads `.pth` files without PyTorch and without running anything of theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from . import _engine
from .errors import Cancelled, Error, UsageError
from .pipeline import _Bar

_TYPES = {
    "bf16": _engine.ConvertType.bf16,
    "bfloat16": _engine.ConvertType.bf16,
    "f32": _engine.ConvertType.f32,
    "float32": _engine.ConvertType.f32,
    "int8": _engine.ConvertType.int8,
    "fp8": _engine.ConvertType.fp8,
}
_NAMES = "bf16, f32, int8 or fp8"
_SHARD = 4_000_000_000

Path = str | os.PathLike[str]


@dataclass(frozen=True)
class ConvertProgress:
    """How far a conversion is."""

    file: str  # at which it is
    verifying: bool  # read back, not written
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class ConvertedFile:
    """A file of the model folder."""

    name: str
    bytes: int
    crc32: str  # of the whole file, 8 hexadecimal digits
    tensors: int  # 0: no file of tensors
    reused: bool  # written by the conversion that this one went on with


@dataclass(frozen=True)
class Conversion:
    """What a conversion made. Every file was read back and its checksum compared."""

    model: str  # the folder
    bytes: int
    seconds: float
    files: tuple[ConvertedFile, ...]
    found_at: tuple[str, ...]  # where state dicts inside of other dicts were: "vae: at 'vae' of infinity_vae.pth"
    skipped: tuple[str, ...]  # tensors that the engine does not need: "transformer: lvl_1L"
    config: dict[str, Any]  # config.json


def convert(
    transformer: Path,
    vae: Path,
    text_encoder: Path,
    output: Path,
    *,
    dtype: Any = "bf16",
    config: Mapping[str, Any] | Sequence[str] = (),
    transformer_key: str = "",
    vae_key: str = "",
    shard_size: int = _SHARD,
    resume: bool = False,
    progress: bool | Callable[[ConvertProgress], Any] = False,
) -> Conversion:
    """Turns upstream's checkpoints into a model folder (docs/model-format.md). PyTorch is not needed.

    transformer, vae: a `.pth` of torch.save, a `.safetensors` file, an index of shards, or a folder that holds one of
    them. text_encoder: a folder of Hugging Face's with config.json, spiece.model and a checkpoint. output: the model
    folder, made where it is not there. A pickle runs nothing: what a state dict does not need is refused by its name.

    dtype: what matrices are kept as, "bf16", "f32", "int8" or "fp8" (the transformer's linear layers as a GPU makes
    them with weights="fp8", all else bf16). config: values of config.json that shapes do not tell, {"scales": [1, 2,
    4]} or ["scales=[1,2,4]"]. transformer_key, vae_key: where the state dict is in its file ("ema"); it is looked for.
    shard_size: larger files are cut, in bytes. resume: goes on with a conversion that was stopped, or checks a finished
    one. progress: True for a bar (tqdm, where installed), or a function that is told `ConvertProgress`.

    What `progress` raises ends the conversion, as Ctrl-C does; files are there whole or not at all, config.json comes
    last. Raises `InputError` (file, tensor, expected and found), `UsageError`, `ResourceError` (the disk).
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _TYPES:
        raise UsageError(f"dtype: expected {_NAMES}, found {dtype!r}")
    if isinstance(shard_size, bool) or not isinstance(shard_size, int) or not 0 < shard_size <= 10**15:
        raise UsageError(f"shard_size: expected a number of bytes above 0, found {shard_size!r}")
    options = _engine.ConvertOptions()
    options.transformer = _path("transformer", transformer)
    options.vae = _path("vae", vae)
    options.text_encoder = _path("text_encoder", text_encoder)
    options.output = _path("output", output)
    options.type = _TYPES[name]
    options.set = _settings(config)
    options.transformer_key, options.vae_key = transformer_key, vae_key
    options.shard_bytes = shard_size
    options.resume = bool(resume)
    bar = _Bar({"disable": progress is not True, "unit": "B", "unit_scale": True, "desc": "converting"})

    def told(file: str, verifying: bool, done: int, total: int) -> None:
        bar.to(done, total)
        if callable(progress):
            progress(ConvertProgress(file, verifying, done, total))

    with contextlib.closing(bar):
        raw = _engine.convert(options, told)
    files = tuple(ConvertedFile(**{**file, "crc32": f"{file['crc32']:08x}"}) for file in raw["files"])
    return Conversion(
        model=raw["model"],
        bytes=sum(file.bytes for file in files),
        seconds=raw["seconds"],
        files=files,
        found_at=tuple(raw["found_at"]),
        skipped=tuple(raw["skipped"]),
        config=json.loads(raw["config"]),
    )


def _path(name: str, given: Any) -> str:
    try:
        text = os.fsdecode(given)
        text.encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise UsageError(f"{name}: expected a path in UTF-8, found {given!r}") from error
    return text


def _settings(config: Mapping[str, Any] | Sequence[str]) -> list[str]:
    if isinstance(config, Mapping):
        try:
            return [f"{key}={json.dumps(value)}" for key, value in config.items()]
        except (TypeError, ValueError) as error:
            raise UsageError(f"config: expected values that JSON has; {error}") from error
    if isinstance(config, str) or not all(isinstance(one, str) for one in config):
        raise UsageError(f"config: expected a dict or a list of KEY=VALUE, found {config!r}")
    return list(config)


# ---- the command line: options, texts and exit codes are those of `sparvar convert`


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Status:
    """One line about the bytes, as the program's: redrawn on a terminal, elsewhere a new one every two seconds."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.last = float("-inf")
        self.terminal = sys.stderr.isatty()
        self.drawn = False

    def show(self, at: ConvertProgress) -> None:
        now = time.monotonic()
        last = at.bytes_done >= at.bytes_total
        if not last and now - self.last < (0.1 if self.terminal else 2):
            return
        self.last = now
        share = at.bytes_done / max(at.bytes_total, 1)
        seconds = now - self.start
        left = "" if last or share <= 0 else f", about {seconds * (1 - share) / share:.0f} s left"
        what = ("checking " if at.verifying else "writing ") + at.file
        line = f"{100 * share:3.0f} % of {_bytes_text(at.bytes_total)} ({what}), {seconds:.1f} s{left}"
        print(f"\r{line}\x1b[K" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr)
        sys.stderr.flush()
        self.drawn = self.terminal

    def clear(self) -> None:
        if self.drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self.drawn = False


def _bytes_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _byte_count(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([kKMG]?)[bB]?", text)
    count = float(found[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[found[2]] if found else 0
    if not 1 <= count <= 1e15:
        raise argparse.ArgumentTypeError(f"expected an amount of memory such as 2G or 500M, found '{text}'")
    return int(count)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sparvar.convert",
        description="Turns upstream's checkpoints into a model folder.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="TRANSFORMER VAE TEXT_FOLDER",
        help="Infinity's transformer and BSQ-VAE (.pth, .safetensors, an index of shards or a folder), and the folder "
        "of the T5 encoder with config.json and spiece.model",
    )
    add("-o", "--output", metavar="DIR", default="", help="the model folder")
    add("--dtype", metavar="bf16|f32|int8|fp8", default="bf16", help="what matrices are kept as (bf16)")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a value of config.json that shapes do not tell or that is not the released models', e.g. "
        "transformer.num_heads=16; may be repeated",
    )
    add("--transformer-key", metavar="KEY", default="", help="where the transformer's state dict is in its file")
    add("--vae-key", metavar="KEY", default="", help="the same for the VAE, e.g. ema")
    add("--shard-size", metavar="SIZE", type=_byte_count, default=_SHARD, help="larger files are cut into shards (4G)")
    add("--resume", action="store_true", help="go on with a conversion into this folder that was stopped")
    add("--json", action="store_true", help="one JSON object on standard output")
    add("--quiet", action="store_true", help="no progress and no report")
    return parser


def _report(made: Conversion) -> str:
    lines = [f"{made.model}: {_bytes_text(made.bytes)} in {made.seconds:.1f} s, read back and found right"]
    for file in made.files:
        was_there = "  (was there)" if file.reused else ""
        lines.append(f"  {file.name:<40} {_bytes_text(file.bytes):>10}  crc32 {file.crc32}{was_there}")
    lines += [f"found    {place}" for place in made.found_at]
    groups: dict[str, list[str]] = {}
    for name in made.skipped:
        groups.setdefault(name.split(".")[0], []).append(name)
    for group, names in sorted(groups.items()):
        lines.append(f"skipped  {names[0]}" if len(names) == 1 else f"skipped  {group}.*: {len(names)} tensors")
    lines.append(f'next     sparvar.Pipeline.from_pretrained({made.model!r})("a red apple")')
    return "\n".join(lines)


def _run(argv: Sequence[str] | None) -> None:
    given = _parser().parse_intermixed_args(argv)
    if given.dtype not in ("bf16", "f32", "int8", "fp8"):
        raise UsageError(f"--dtype: expected {_NAMES}, found '{given.dtype}'")
    if len(given.inputs) != 3:
        raise UsageError(
            f"convert: three inputs are needed, TRANSFORMER VAE TEXT_FOLDER; {len(given.inputs)} were given"
        )
    if not given.output:
        raise UsageError("convert: say where the model goes, -o models/NAME")
    transformer, vae, text_encoder = given.inputs
    status = _Status()
    try:
        made = convert(
            transformer,
            vae,
            text_encoder,
            given.output,
            dtype=given.dtype,
            config=given.set,
            transformer_key=given.transformer_key,
            vae_key=given.vae_key,
            shard_size=given.shard_size,
            resume=given.resume,
            progress=False if given.quiet else status.show,
        )
    except KeyboardInterrupt:
        raise Cancelled(f"stopped; {given.output} is not finished, --resume goes on with it") from None
    finally:
        status.clear()
    if given.json:
        print(json.dumps(asdict(made), indent=2))
    elif not given.quiet:
        print(_report(made))
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 the arguments ask for what cannot be, 1 any other failure
    (one line on standard error), 130 Ctrl-C."""
    try:
        _run(argv)
    except (Error, OSError, MemoryError) as error:
        print(f"sparvar: {str(error) or 'out of memory'}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 130 if isinstance(error, Cancelled) else 1
    except KeyboardInterrupt:
        return 130
    return 0
