#!/usr/bin/env python3
"""Small valid inputs to begin fuzzing with, from tests/data: python3 seeds.py FOLDER

Writes FOLDER/TARGET/* and FOLDER/TARGET.dict, the words of the formats.
"""
import json
import struct
import sys
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT / "tests" / "data"
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "F8_E4M3": 1, "U8": 1, "BOOL": 1}


def small_safetensors(path):
    """The first tensors of a file, each cut to a few elements."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, out, body = json.loads(data[8:8 + length]), {}, b""
    for name, entry in list(header.items())[:5]:
        if name == "__metadata__":
            out[name] = entry
            continue
        shape = [min(extent, 2) for extent in entry["shape"]]
        size = SIZES[entry["dtype"]]
        for extent in shape:
            size *= extent
        begin = entry["data_offsets"][0]
        out[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [len(body), len(body) + size]}
        body += data[8 + length + begin:8 + length + begin + size]
    text = json.dumps(out).encode()
    return struct.pack("<Q", len(text)) + text + body


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, colour, interlaced=0, extra=b""):
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = (width * channels * depth + 7) // 8
    rows = b"".join(bytes([y % 5]) + bytes((7 * y + 11 * x) % 256 if depth >= 8 else 0x1B for x in range(row)) for y in range(height))
    if interlaced:
        rows = bytes(len(rows) + 64)
    palette = chunk(b"PLTE", bytes(range(3 * 4))) if colour == 3 else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)) +
            palette + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def seeds():
    """(target, name, bytes)"""
    for path in sorted(DATA.rglob("*.safetensors")):
        yield "safetensors", f"{path.parent.name}-{path.stem}", small_safetensors(path)
    for path in [*sorted(DATA.rglob("config.json")), *sorted((ROOT / "models").glob("*/config.json"))]:
        yield "config", path.parent.name, path.read_bytes()
    for name, rule in {
            "csla": {"layers": [0, -1], "scales": [10, -1], "method": "csla", "windows": [-1, 1, 3], "sink_scales": 5, "form": "blocks",
                     "centre": "half_pixel", "group": {"tile_h": 8, "tile_w": 16}, "block": 128},
            "cs4a": {"scales": [10, 12], "method": "cs4a", "decision_scale": 10, "share": 0.2, "granularity": 64, "carry": "grid",
                     "group": {"tile_h": 8, "tile_w": 8, "rows": 192}, "own_windows": [7, 9], "residual": True},
            "probe": {"method": "probe", "stride": 8, "share": 0.03, "window": 7, "window_scales": 3, "sink_scales": 0, "residual": False},
            "dense": {"method": "dense"}}.items():
        yield "plan", name, json.dumps({"name": name, "rules": [rule]}).encode()
    prompts = json.loads((DATA / "t5-tiny" / "prompts.json").read_text())
    for i, prompt in enumerate(sorted({text for text in strings(prompts) if text})):
        yield "prompt", f"{i:02}", prompt.encode()
    for depth, colour in [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (1, 3), (2, 3), (8, 3), (8, 4), (16, 4), (8, 6), (16, 6)]:
        yield "image", f"{colour}-{depth}", png(5, 4, depth, colour, extra=chunk(b"tRNS", b"\0\1") if colour == 0 else b"")
    yield "image", "interlaced", png(9, 9, 8, 2, interlaced=1)
    yield "image", "text", png(1, 1, 8, 2, extra=chunk(b"iTXt", b"prompt\0\0\0\0\0red apple") + chunk(b"gAMA", struct.pack(">I", 45455)))
    for path in sorted([*(DATA / "checkpoint-formats").rglob("*.pth"), *(DATA / "checkpoint-formats").rglob("*.bin")]):
        yield "checkpoint", path.name, path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            yield "pickle", path.name, archive.read(name)
    yield "pickle", "protocol-4", (
        b"\x80\x04\x95\x90\0\0\0\0\0\0\0}\x94(\x8c\x01w\x94\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_tensor_v2\x94\x93((\x8c\x07storage"
        b"\x8c\x05torch\x8c\x0cFloatStorage\x93\x8c\x010\x8c\x03cpuK\x10tQK\0K\x02K\x08\x86K\x08K\x01\x86\x89\x8c\x0bcollections"
        b"\x8c\x0bOrderedDict\x93)RtR\x8c\x04step\x8a\x01\x07u.")


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def keys(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item)


def main(folder):
    words = {"safetensors": {*SIZES, "dtype", "shape", "data_offsets", "__metadata__"}, "config": {"infinity", "t5"},
             "plan": {"csla", "cs4a", "probe", "dense", "lists", "blocks", "published", "half_pixel", "ratio", "group", "grid"},
             "prompt": {"</s>", "<pad>", "<unk>", "<extra_id_99>", "<extra_id_0>"},
             "checkpoint": {"PK\\x03\\x04", "PK\\x01\\x02", "PK\\x05\\x06", "PK\\x06\\x06", "PK\\x06\\x07", "PK\\x07\\x08", "/data.pkl", "/data/0"},
             "pickle": {"ctorch\\x0aFloatStorage\\x0a", "ctorch\\x0aLongStorage\\x0a", "ctorch._utils\\x0a_rebuild_tensor_v2\\x0a",
                        "ctorch._utils\\x0a_rebuild_parameter\\x0a", "ccollections\\x0aOrderedDict\\x0a)R", "X\\x07\\x00\\x00\\x00storage",
                        "X\\x01\\x00\\x00\\x000", "X\\x03\\x00\\x00\\x00cpu", "\\x8a\\x08", "\\x8b", "\\x93", "\\x86", "tQ", "tR"},
             "image": {"IHDR", "PLTE", "IDAT", "IEND", "tRNS", "iTXt", "zTXt", "tEXt", "gAMA", "iCCP", "sRGB", "cHRM", "bKGD", "eXIf"}}
    for target, name, data in seeds():
        (folder / target).mkdir(parents=True, exist_ok=True)
        (folder / target / name).write_bytes(data)
        if target in ("config", "plan"):
            words[target] |= set(keys(json.loads(data)))
    for target, names in words.items():
        (folder / f"{target}.dict").write_text("".join(f'"{word}"\n' for word in sorted(names)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
