"""Checkpoints as torch.save writes them, by the standard library alone."""
import collections
import io
import json
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

STORAGES = {"F32": ("FloatStorage", 4), "BF16": ("BFloat16Storage", 2), "F16": ("HalfStorage", 2), "I64": ("LongStorage", 8)}


def stand_in(module, name, made):
    """A global of PyTorch's name that pickle finds."""
    made.__module__, made.__qualname__, made.__name__ = module, name, name
    home = sys.modules.setdefault(module, types.ModuleType(module))
    setattr(home, name, made)
    return made


def rebuild(*_):
    raise RuntimeError("only written, never read")


REBUILD = stand_in("torch._utils", "_rebuild_tensor_v2", rebuild)
TYPES = {dtype: stand_in("torch", name, type(name, (), {})) for dtype, (name, _) in STORAGES.items()}
sys.modules["torch"]._utils = sys.modules["torch._utils"]


class Tensor:
    """`data`: bytes in row order. `transposed`: kept in the other order, as a view that is not contiguous."""

    def __init__(self, dtype, shape, data, transposed=False):
        self.dtype, self.shape, self.data = dtype, tuple(shape), data
        self.stride, step = [], 1
        for extent in reversed(self.shape):
            self.stride.insert(0, step)
            step *= extent
        if transposed:
            size, (rows, columns) = STORAGES[dtype][1], self.shape
            cells = [data[i * size:(i + 1) * size] for i in range(rows * columns)]
            self.data = b"".join(cells[r * columns + c] for c in range(columns) for r in range(rows))
            self.stride = [1, rows]

    def __reduce__(self):
        return REBUILD, (Storage(self), 0, self.shape, tuple(self.stride), False, collections.OrderedDict())


class Storage:
    def __init__(self, tensor):
        self.tensor = tensor


class Pickler(pickle.Pickler):
    def __init__(self, file, protocol):
        super().__init__(file, protocol)
        self.storages = []

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        self.storages.append(obj.tensor.data)
        elements = len(obj.tensor.data) // STORAGES[obj.tensor.dtype][1]
        return "storage", TYPES[obj.tensor.dtype], str(len(self.storages) - 1), "cpu", elements


def save(path, value, protocol=2):
    out = io.BytesIO()
    pickler = Pickler(out, protocol)
    pickler.dump(value)
    path = Path(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", out.getvalue())
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, data in enumerate(pickler.storages):
            archive.writestr(f"{path.stem}/data/{key}", data)
        archive.writestr(f"{path.stem}/version", "3\n")


def read_safetensors(path):
    """name -> (dtype, shape, bytes)"""
    content = Path(path).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    data = content[8 + size:]
    return {name: (entry["dtype"], entry["shape"], data[entry["data_offsets"][0]:entry["data_offsets"][1]])
            for name, entry in json.loads(content[8:8 + size]).items() if name != "__metadata__"}


def write_safetensors(path, tensors):
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + body)


def state_dict(tensors):
    return collections.OrderedDict((name, Tensor(*tensor)) for name, tensor in tensors.items())


def widened(tensors):
    """BF16 as F32: the same numbers."""
    out = {}
    for name, (dtype, shape, data) in tensors.items():
        if dtype == "BF16":
            wide = bytearray(2 * len(data))
            wide[2::4], wide[3::4] = data[0::2], data[1::2]
            dtype, data = "F32", bytes(wide)
        out[name] = (dtype, shape, data)
    return out
