"""The convolutions of LPIPS' two nets, by the names of the reference implementation's state dict, and its files."""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_HOW_TO_SAVE = 'torch.save(lpips.LPIPS(net="alex").state_dict(), FILE)'
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Conv(NamedTuple):
    name: str
    outputs: int
    inputs: int
    kernel: int
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class Net:
    """Convolutions by depth, each followed by ReLU; where `pooled` says so a depth begins with maximum pooling."""

    name: str
    depths: tuple[tuple[Conv, ...], ...]
    pooled: tuple[bool, ...]
    pool: int  # side of the pooling's window, which moves by 2
    smallest: int  # side of the smallest picture of which something is left


def _alex() -> Net:
    convs = (
        Conv("net.slice1.0", 64, 3, 11, 4, 2),
        Conv("net.slice2.3", 192, 64, 5, 1, 2),
        Conv("net.slice3.6", 384, 192, 3),
        Conv("net.slice4.8", 256, 384, 3),
        Conv("net.slice5.10", 256, 256, 3),
    )
    return Net("alex", tuple((conv,) for conv in convs), (False, True, True, False, False), 3, 31)


def _vgg() -> Net:
    depths, inputs, place = [], 3, 0
    for depth, (count, outputs) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
        place += depth > 0  # the pooling
        convs = []
        for _ in range(count):
            convs.append(Conv(f"net.slice{depth + 1}.{place}", outputs, inputs, 3))
            inputs, place = outputs, place + 2  # itself and its ReLU
        depths.append(tuple(convs))
    return Net("vgg", tuple(depths), (False, True, True, True, True), 2, 16)


_ALEX, _VGG = _alex(), _vgg()


def read(given: Any) -> tuple[Net, Mapping[str, Tensor]]:
    """A file or a state dict: which net it is of, and the checked tensors that the net needs, in float32."""
    if isinstance(given, Mapping):
        return _checked("weights", given)
    if not isinstance(given, (str, os.PathLike)):
        found = type(given).__name__
        raise UsageError(f"lpips: weights: expected a file of a state dict, or a state dict; found {found}")
    path = os.fspath(given)
    try:
        state = os.stat(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; LPIPS' weights are a file of yours: {_HOW_TO_SAVE}") from error
    return _of_file(os.path.abspath(path), state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=2)
def _of_file(path: str, changed: int, size: int) -> tuple[Net, Mapping[str, Tensor]]:
    """Kept from call to call while the file stays what it is."""
    try:
        state = _safetensors(path) if path.endswith(".safetensors") else _torch_file(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    return _checked(path, state)


def _torch_file(path: str) -> Mapping[str, Any]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a state dict that torch.save wrote; expected {_HOW_TO_SAVE}") from error
    if not isinstance(state, Mapping):
        raise InputError(f"{path}: expected a state dict, found {type(state).__name__}: {_HOW_TO_SAVE}")
    return state


def _safetensors(path: str) -> Mapping[str, Any]:
    import torch

    with open(path, "rb") as file:
        data = bytearray(file.read())
    try:
        (length,) = struct.unpack_from("<Q", data)
        start = 8 + length
        header = json.loads(data[8:start].decode())
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _TYPES:
                raise InputError(f"{path}: tensor {name}: expected {', '.join(_TYPES)}; found {entry['dtype']}")
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= len(data) - start:
                raise InputError(f"{path}: tensor {name} lies outside the file: it is cut short or broken")
            dtype = getattr(torch, _TYPES[entry["dtype"]])
            flat = torch.frombuffer(data, dtype=torch.uint8)[start + begin : start + end].clone().view(dtype)
            tensors[name] = flat.reshape(entry["shape"])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a safetensors file, or a broken one") from error
    return tensors


def _checked(source: str, state: Mapping[str, Any]) -> tuple[Net, Mapping[str, Tensor]]:
    import torch

    net = _recognised(source, state)
    expected: dict[str, tuple[int, ...]] = {}
    for depth, convs in enumerate(net.depths):
        for conv in convs:
            expected[f"{conv.name}.weight"] = (conv.outputs, conv.inputs, conv.kernel, conv.kernel)
            expected[f"{conv.name}.bias"] = (conv.outputs,)
        expected[f"lin{depth}.model.1.weight"] = (1, convs[-1].outputs, 1, 1)
    tensors = {name: _tensor(source, state, name, shape) for name, shape in expected.items()}
    for name, default in (("scaling_layer.shift", _SHIFT), ("scaling_layer.scale", _SCALE)):
        plain = torch.tensor(default).reshape(1, 3, 1, 1)
        tensors[name] = _tensor(source, state, name, (1, 3, 1, 1)) if name in state else plain
    return net, tensors


def _recognised(source: str, state: Mapping[str, Any]) -> Net:
    if any(".squeeze." in str(name) for name in state):
        raise InputError(f'{source}: weights of LPIPS(net="squeeze"); expected those of "alex" or "vgg"')
    for net in (_ALEX, _VGG):
        if any(f"{conv.name}.weight" in state for convs in net.depths[1:] for conv in convs):
            return net
    if "lin0.model.1.weight" in state:
        raise InputError(
            f"{source}: only the linear layers of LPIPS; tensor {_ALEX.depths[0][0].name}.weight and the other "
            f"convolutions are missing: {_HOW_TO_SAVE} writes all"
        )
    raise InputError(f"{source}: no tensors of LPIPS, such as net.slice2.3.weight: {_HOW_TO_SAVE}")


def _tensor(source: str, state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    if name not in state:
        raise InputError(f"{source}: tensor {name} is missing; expected shape {shape}")
    tensor = state[name]
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{source}: tensor {name}: expected a tensor of shape {shape}, found {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise InputError(f"{source}: tensor {name}: expected shape {shape}, found {tuple(tensor.shape)}")
    if not tensor.dtype.is_floating_point:
        raise InputError(f"{source}: tensor {name}: expected floats, found {str(tensor.dtype).removeprefix('torch.')}")
    plain = tensor.detach().to(torch.float32)
    if not bool(plain.isfinite().all()):
        raise InputError(f"{source}: tensor {name} holds NaN or infinity")
    return plain
