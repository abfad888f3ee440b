"""LPIPS (Zhang et al., arXiv:1801.03924), version 0.1, with weights that the user has. PyTorch is imported when called.

Both pictures go through a classifier's convolutions. At five depths the channels of every pixel are scaled to length 1;
the squared differences, weighted by channel, are averaged over the pixels and summed over the depths.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from . import _lpips_weights
from .errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ._lpips_weights import Conv, Net

_EPSILON = 1e-10


def lpips(
    a: Any, b: Any, weights: str | os.PathLike[str] | Mapping[str, Any], device: Any = None
) -> float | list[float]:
    """LPIPS, how far apart pictures look: 0 for equal ones. Needs PyTorch; nothing is downloaded.

    a, b: pictures as a pipeline returns them. One: a `PIL.Image` in mode RGB, a numpy array (height, width, 3), a torch
    tensor (3, height, width). Several: a list of these, an array (N, height, width, 3), a tensor (N, 3, height, width).
    Arrays and tensors are uint8, or floats from 0 to 1; a and b may be of different kinds.
    weights: a file with the whole state dict of the reference implementation's `LPIPS(net="alex")` or `"vgg"`, version
    0.1, in safetensors or as `torch.save` writes it (loaded with weights_only=True), or the state dict itself. Where
    that implementation, the package `lpips`, is installed with its weights, this makes the file:

        torch.save(lpips.LPIPS(net="alex").state_dict(), "lpips-alex.pth")

    device: PyTorch's; without, the tensors' own, and the CPU where there are none. It is computed in float32, one pair
    at a time.

    Returns a float for two single pictures, else a list of N floats, of a[0] and b[0], a[1] and b[1], ... Raises
    `UsageError` for pictures that do not fit, `InputError` for weights that do not, `ResourceError` for a device that
    is not there.
    """
    try:
        import torch
    except ImportError as error:
        raise UsageError('lpips needs PyTorch: pip install "sparvar[torch]"') from error
    first, one = _pictures("a", a)
    second, other = _pictures("b", b)
    if len(first) != len(second):
        raise UsageError(f"lpips: a has {_count(len(first))}, b has {_count(len(second))}; expected as many")
    net, tensors = _lpips_weights.read(weights)
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        _check_sizes(x, y, net, "" if one and other else f"[{i}]")
    where = _device(device, [*first, *second])
    with torch.inference_mode(), torch.autocast(where.type, enabled=False), _exact(where):
        there = {name: tensor.to(where) for name, tensor in tensors.items()}
        values = [
            _distance(net, there, _scaled(x, there, where), _scaled(y, there, where))
            for x, y in zip(first, second, strict=True)
        ]
    return values[0] if one and other else values


def _distance(net: Net, weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> float:
    # One picture at a time: equal pictures give equal numbers, whatever else is in a batch.
    total = x.new_zeros(())
    for depth, convs in enumerate(net.depths):
        x, y = (_deeper(net, weights, depth, convs, z) for z in (x, y))
        squares = (_unit(x) - _unit(y)) ** 2
        total += (squares * weights[f"lin{depth}.model.1.weight"]).sum(1).mean()
    return float(total.item())


def _deeper(net: Net, weights: Mapping[str, Tensor], depth: int, convs: tuple[Conv, ...], x: Tensor) -> Tensor:
    from torch.nn import functional

    if net.pooled[depth]:
        x = functional.max_pool2d(x, net.pool, 2)
    for conv in convs:
        weight, bias = weights[f"{conv.name}.weight"], weights[f"{conv.name}.bias"]
        x = functional.conv2d(x, weight, bias, conv.stride, conv.padding).relu()
    return x


def _unit(x: Tensor) -> Tensor:
    return x / ((x * x).sum(1, keepdim=True).sqrt() + _EPSILON)


def _scaled(picture: Tensor, weights: Mapping[str, Tensor], where: torch.device) -> Tensor:
    """(3, h, w) of 0 to 255 or 0 to 1 as the net's input (1, 3, h, w)."""
    import torch

    x = picture.to(torch.float32).to(where)
    if picture.dtype == torch.uint8:
        x = x / 255
    return (2 * x[None] - 1 - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]


@contextlib.contextmanager
def _exact(where: torch.device) -> Iterator[None]:
    """Float32 products as they are on a GPU (cuDNN rounds them to 10 bits unless told), the same in every run."""
    import torch

    if where.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):  # type: ignore[no-untyped-call]
        yield


def _device(device: Any, pictures: list[Tensor]) -> torch.device:
    import torch

    if device is None:
        return next((p.device for p in pictures if p.device.type != "cpu"), torch.device("cpu"))
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"lpips: device: expected PyTorch's, such as cuda:0; found {device!r}") from error
    try:
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ResourceError(f"lpips: device {where}: {_line(error)}") from error
    return where


# Pictures


def _pictures(name: str, given: Any) -> tuple[list[Tensor], bool]:
    """Tensors (3, h, w) of uint8 or floats from 0 to 1, and whether it was a single picture."""
    if not isinstance(given, (list, tuple)):
        return _unstacked(name, given)
    if not given:
        raise UsageError(f"lpips: {name}: no pictures")
    out = []
    for i, entry in enumerate(given):
        pictures, single = _unstacked(f"{name}[{i}]", entry)
        if not single:
            raise UsageError(f"lpips: {name}[{i}]: expected one picture, found a stack of {len(pictures)}")
        out += pictures
    return out, False


def _unstacked(name: str, given: Any) -> tuple[list[Tensor], bool]:
    import torch

    if isinstance(given, Image.Image):
        if given.mode != "RGB":
            raise UsageError(f'lpips: {name}: expected a picture in mode RGB, found {given.mode}: .convert("RGB")')
        return [torch.from_numpy(np.array(given)).permute(2, 0, 1)], True
    if isinstance(given, np.ndarray):
        if given.ndim not in (3, 4) or given.shape[-1] != 3:
            raise UsageError(f"lpips: {name}: expected an array ([N,] height, width, 3), {_found(given)}")
        if given.dtype not in (np.uint8, np.float16, np.float32, np.float64):
            raise UsageError(f"lpips: {name}: expected uint8, or floats from 0 to 1; found {given.dtype}")
        stack = torch.from_numpy(np.array(given, order="C")).movedim(-1, -3)
    elif isinstance(given, torch.Tensor):
        if given.ndim not in (3, 4) or given.shape[-3] != 3:
            raise UsageError(f"lpips: {name}: expected a tensor ([N,] 3, height, width), {_found(given)}")
        if given.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise UsageError(
                f"lpips: {name}: expected uint8, or floats from 0 to 1; found {str(given.dtype).removeprefix('torch.')}"
            )
        stack = given.detach()
    else:
        found = type(given).__name__
        raise UsageError(f"lpips: {name}: expected a PIL.Image, a numpy array, a torch tensor or a list; found {found}")
    if stack.numel() == 0:
        raise UsageError(f"lpips: {name}: no pictures, {_found(given)}")
    if stack.dtype != torch.uint8:
        _check_range(name, stack)
    return ([stack], True) if stack.ndim == 3 else (list(stack.unbind()), False)


def _check_range(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise UsageError(f"lpips: {name}: not a picture: it holds NaN or infinity")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise UsageError(f"lpips: {name}: expected floats from 0 to 1, found {low:g} to {high:g}")


def _check_sizes(x: Tensor, y: Tensor, net: Net, index: str) -> None:
    (h, w), (other_h, other_w) = x.shape[1:], y.shape[1:]
    if (h, w) != (other_h, other_w):
        raise UsageError(
            f"lpips: pictures of unequal sizes (width x height): a{index} {w}x{h}, b{index} {other_w}x{other_h}"
        )
    if min(h, w) < net.smallest:
        raise UsageError(
            f"lpips: a{index} is {w}x{h}; the smallest that {net.name} can look at is {net.smallest}x{net.smallest}"
        )


def _count(pictures: int) -> str:
    return "1 picture" if pictures == 1 else f"{pictures} pictures"


def _found(given: Any) -> str:
    return f"found {tuple(given.shape)}"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
