"""What the tests of the program share: running it, small models, reading its pictures' files."""
import json
import os
import struct
import subprocess
import zlib
from pathlib import Path


def run(program, *arguments, **options):
    """The program with these arguments; nothing on its standard input unless given."""
    return subprocess.run([program, *map(str, arguments)], capture_output="stdout" not in options, timeout=300, check=False,
                          **({"stdin": subprocess.DEVNULL} if "input" not in options else {}), **options)


def model_of_scales(model, folder, scales, **changes):
    """A model folder that shares the files of `model`, draws on its first scales only, has the files in `changes`
    (names with __ for the dot; None: left out) and no plan of its own."""
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    config["scales"] = config["scales"][:scales]
    files = {"config.json": json.dumps(config).encode()}
    files.update({name.replace("__", "."): content for name, content in changes.items()})
    for file in model.iterdir():
        if file.name not in files and file.name != "plan.json" and file.is_file():
            (folder / file.name).symlink_to(file.resolve())
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def is_whole_png(path):
    """Every chunk is there with the right checksum, and the pixels unpack to the size that the header names."""
    data = Path(path).read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    at, pixels, kind = 8, b"", b""
    while at + 12 <= len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + size]
        if len(data) < at + 12 + size or struct.unpack(">I", data[at + 8 + size:at + 12 + size])[0] != zlib.crc32(kind + body):
            return False
        pixels += body if kind == b"IDAT" else b""
        at += 12 + size
    width, height = struct.unpack(">II", data[16:24])
    return kind == b"IEND" and at == len(data) and len(zlib.decompress(pixels)) == height * (1 + 3 * width)


def environment():
    """Without what the caller's shell may say about models and threads; threads that wait do not spin: tests share the
    machine."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPARVAR_", "OMP_"))}
    return {**kept, "OMP_WAIT_POLICY": "passive"}
