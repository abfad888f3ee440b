"""sparvar.lpips with random weights in the reference implementation's layout, against numpy in double precision."""

from __future__ import annotations

import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

import sparvar

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

ALEX = [("1.0", 64, 3, 11), ("2.3", 192, 64, 5), ("3.6", 384, 192, 3), ("4.8", 256, 384, 3), ("5.10", 256, 256, 3)]
VGG = [
    ("1.0", 64, 3, 3), ("1.2", 64, 64, 3),
    ("2.5", 128, 64, 3), ("2.7", 128, 128, 3),
    ("3.10", 256, 128, 3), ("3.12", 256, 256, 3), ("3.14", 256, 256, 3),
    ("4.17", 512, 256, 3), ("4.19", 512, 512, 3), ("4.21", 512, 512, 3),
    ("5.24", 512, 512, 3), ("5.26", 512, 512, 3), ("5.28", 512, 512, 3),
]  # fmt: skip
SIZES = {"alex": (47, 38), "vgg": (21, 35)}
"""Height and width; odd, so that pooling drops rows."""


def state_dict(convs, seed):
    random = np.random.default_rng(seed)
    made = {}
    for place, outputs, inputs, kernel in convs:
        deviation = (2 / (inputs * kernel * kernel)) ** 0.5
        weight = random.standard_normal((outputs, inputs, kernel, kernel), np.float32) * np.float32(deviation)
        made[f"net.slice{place}.weight"] = weight
        made[f"net.slice{place}.bias"] = random.standard_normal(outputs, np.float32) / 8
        made[f"lin{int(place[0]) - 1}.model.1.weight"] = random.random((1, outputs, 1, 1), np.float32)
    return {name: torch.from_numpy(array) for name, array in made.items()}


@pytest.fixture(scope="module")
def weights():
    return {"alex": state_dict(ALEX, 1), "vgg": state_dict(VGG, 2)}


@pytest.fixture(scope="module")
def alex(weights):
    return weights["alex"]


def pictures(seed, count=1, size=SIZES["alex"]):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def windows(x, kernel, stride):
    """(channels, rows, columns, kernel, kernel)."""
    return np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (1, 2))[:, ::stride, ::stride]


def features(net, state, picture):
    """The five depths, in double precision."""
    shift = np.float64(state.get("scaling_layer.shift", np.array([-0.030, -0.088, -0.188]))).reshape(3, 1, 1)
    scale = np.float64(state.get("scaling_layer.scale", np.array([0.458, 0.448, 0.450]))).reshape(3, 1, 1)
    x = (picture.transpose(2, 0, 1) / 127.5 - 1 - shift) / scale
    out = {}
    for place, _, _, kernel in ALEX if net == "alex" else VGG:
        depth = int(place[0])
        if depth not in out and depth in ((2, 3) if net == "alex" else (2, 3, 4, 5)):
            x = windows(x, 3 if net == "alex" else 2, 2).max((3, 4))
        padding = 2 if kernel > 3 else 1
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        weight, bias = (state[f"net.slice{place}.{part}"].numpy().astype(np.float64) for part in ("weight", "bias"))
        x = np.tensordot(weight, windows(x, kernel, 4 if kernel == 11 else 1), ((1, 2, 3), (0, 3, 4)))
        x = np.maximum(x + bias[:, None, None], 0)
        out[depth] = x
    return [out[depth] for depth in range(1, 6)]


def expected(net, state, a, b):
    total = 0.0
    for depth, (x, y) in enumerate(zip(features(net, state, a), features(net, state, b), strict=True)):
        x, y = (z / (np.sqrt((z**2).sum(0)) + 1e-10) for z in (x, y))
        weight = state[f"lin{depth}.model.1.weight"].numpy().astype(np.float64)[0]
        total += (weight * (x - y) ** 2).sum(0).mean()
    return total


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_against_double_precision(weights, net):
    a, b = pictures(3, 2, SIZES[net])
    b = (0.7 * a + 0.3 * b).astype(np.uint8)
    value = sparvar.lpips(a, b, weights[net])
    assert isinstance(value, float) and value > 0.01
    assert value == pytest.approx(expected(net, weights[net], a, b), rel=1e-5)


def test_the_scaling_of_the_file(alex):
    a, b = pictures(4, 2)
    own = {
        "scaling_layer.shift": torch.tensor([0.1, -0.2, 0.3]).reshape(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.5, 1.0, 2.0]).reshape(1, 3, 1, 1),
    }
    value = sparvar.lpips(a, b, {**alex, **own})
    assert value == pytest.approx(expected("alex", {**alex, **own}, a, b), rel=1e-5)
    assert value != pytest.approx(sparvar.lpips(a, b, alex), rel=1e-3)


def test_equal_pictures_and_symmetry(alex):
    a, b = pictures(5, 2)
    assert sparvar.lpips(a, a.copy(), alex) == 0
    assert sparvar.lpips(a, b, alex) == sparvar.lpips(b, a, alex) > 0


def test_a_batch_keeps_its_order(alex):
    a, b = pictures(6, 3), pictures(7, 3)
    b[1] = a[1]
    values = sparvar.lpips(a, b, alex)
    assert values == [sparvar.lpips(x, y, alex) for x, y in zip(a, b, strict=True)]
    assert values[1] == 0 and values[0] != values[2]
    assert sparvar.lpips(a[::-1], b[::-1], alex) == values[::-1]
    assert sparvar.lpips(a[:1], b[:1], alex) == sparvar.lpips(a[:1], b[0], alex) == values[:1]


def test_a_list_may_hold_sizes(alex):
    a, b = ([pictures(seed, 1, size)[0] for size in ((40, 33), (31, 50))] for seed in (1, 2))
    assert sparvar.lpips(a, b, alex) == [sparvar.lpips(x, y, alex) for x, y in zip(a, b, strict=True)]


def test_kinds_of_pictures(alex):
    """What a pipeline's "pil", "np" and "pt" give, in any combination, and nothing that was given is changed."""
    a, b = pictures(8, 2), pictures(9, 2)
    value = sparvar.lpips(a, b, alex)
    floats = b.astype(np.float32) / 255
    kinds = {
        "pil": [Image.fromarray(picture) for picture in b],
        "np": floats,
        "np64": b / 255,
        "pt": torch.from_numpy(floats).permute(0, 3, 1, 2),
        "pt8": torch.from_numpy(b).permute(0, 3, 1, 2),
        "list": list(torch.from_numpy(floats).permute(0, 3, 1, 2)),
    }
    for kind, given in kinds.items():
        assert sparvar.lpips(a, given, alex) == pytest.approx(value, rel=1e-5), kind
        assert sparvar.lpips(a[0], given[0], alex) == pytest.approx(value[0], rel=1e-5), kind
    assert np.array_equal(floats, b.astype(np.float32) / 255)
    wanting = torch.from_numpy(floats).permute(0, 3, 1, 2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sparvar.lpips(a, wanting, alex) == pytest.approx(value, rel=1e-5)


def save_safetensors(path, state, **changes):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = tensor.numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets, **changes}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_files(alex, tmp_path):
    a, b = pictures(10, 2)
    value = sparvar.lpips(a, b, alex)
    pth, safe = tmp_path / "lpips-alex.pth", tmp_path / "lpips-alex.safetensors"
    torch.save({**alex, "lins.0.model.1.weight": alex["lin0.model.1.weight"]}, pth)
    save_safetensors(safe, alex)
    for path in (pth, str(pth), safe):
        assert sparvar.lpips(a, b, path, device="cpu") == value
    torch.save({**alex, "lin0.model.1.weight": 2 * alex["lin0.model.1.weight"]}, pth)
    assert sparvar.lpips(a, b, pth) > value, "a file that changed is read again"
    torch.save({name: tensor.double() for name, tensor in alex.items()}, pth)
    assert sparvar.lpips(a, b, pth) == value


def refused(pattern, *arguments, kind=sparvar.UsageError, **options):
    with pytest.raises(kind, match=pattern) as caught:
        sparvar.lpips(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_pictures_that_do_not_fit(alex):
    (a,) = pictures(11)
    floats = a / 255
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    refused(r"unequal sizes .* a 38x47, b 38x46", a, a[:-1], alex)
    refused(r"unequal sizes .* a\[1\] 38x47, b\[1\] 37x47", [a, a], [a, a[:, 1:]], alex)
    refused("a has 2 pictures, b has 1 picture", [a, a], a, alex)
    refused("the smallest that alex can look at is 31x31", a[:30], a[:30], alex)
    refused(r"a: expected an array .* found \(47, 38, 4\)", np.zeros((47, 38, 4), np.uint8), a, alex)
    refused(r"b: expected an array .* found \(3, 47, 38\)", a, a.transpose(2, 0, 1), alex)
    refused(r"a: expected a tensor .* found \(47, 38, 3\)", torch.from_numpy(a), a, alex)
    refused(r"a: no pictures, found \(0, 47, 38, 3\)", pictures(1, 0), pictures(1, 0), alex)
    refused("b: no pictures", a, [], alex)
    refused(r"b\[0\]: expected one picture, found a stack of 2", a, [pictures(1, 2)], alex)
    refused("mode RGB, found L", Image.fromarray(a[..., 0]), a, alex)
    refused("found str", "a.png", a, alex)
    refused("found int32", a.astype(np.int32), a, alex)
    refused("b: expected uint8, .* found int64", a, tensor.long(), alex)
    refused("b: expected floats from 0 to 1, found -1 to 1", a, (floats > 0.5) * 2.0 - 1, alex)
    refused("a: expected floats from 0 to 1, found 0 to 255", (tensor > 0.5) * 255.0, a, alex)
    for wrong in (np.nan, np.inf):
        broken = floats.copy()
        broken[3, 4, 1] = wrong
        refused(r"a\[1\]: not a picture: it holds NaN or infinity", [floats, broken], [a, a], alex)


def test_devices(alex):
    (a,) = pictures(12)
    refused("device: .* found 'gpu'", a, a, alex, device="gpu")
    if not torch.cuda.is_available():
        refused("device cuda:0: ", a, a, alex, device="cuda:0", kind=sparvar.ResourceError)


def test_weights_that_do_not_fit(alex, tmp_path):
    (a,) = pictures(13)

    def broken(pattern, state):
        path = tmp_path / "broken.pth"
        torch.save(state, path)
        refused(rf"broken\.pth: {pattern}", a, a, path, kind=sparvar.InputError)
        path.unlink()

    without = {name: tensor for name, tensor in alex.items() if name != "net.slice3.6.bias"}
    broken(r"tensor net\.slice3\.6\.bias is missing; expected shape \(384,\)", without)
    lin = {"lin2.model.1.weight": torch.zeros(1, 256, 1, 1)}
    pattern = r"tensor lin2\.model\.1\.weight: expected shape \(1, 384, 1, 1\), found \(1, 256, 1, 1\)"
    broken(pattern, {**alex, **lin})
    broken(r"tensor scaling_layer\.scale: expected shape", {**alex, "scaling_layer.scale": torch.ones(3)})
    broken(r"tensor net\.slice1\.0\.bias: .* found int64", {**alex, "net.slice1.0.bias": torch.ones(64).long()})
    broken(r"tensor net\.slice1\.0\.bias: .* found str", {**alex, "net.slice1.0.bias": "x"})
    broken(r"tensor net\.slice1\.0\.bias holds NaN", {**alex, "net.slice1.0.bias": torch.full((64,), torch.nan)})
    broken("only the linear layers", {name: tensor for name, tensor in alex.items() if name.startswith("lin")})
    broken('weights of .*"squeeze"', {"net.slice2.3.squeeze.weight": torch.zeros(1)})
    broken("no tensors of LPIPS", {"weight": torch.zeros(1)})
    broken("expected a state dict, found list", [1])
    broken("not a state dict", torch.nn.Linear(1, 1))
    with pytest.raises(sparvar.InputError, match=r"^weights: tensor net\.slice3\.6\.bias is missing"):
        sparvar.lpips(a, a, without)
    refused("found int", a, a, 7)
    refused(r"absent\.pth: No such file .* torch\.save", a, a, tmp_path / "absent.pth")
    refused("Is a directory", a, a, tmp_path, kind=sparvar.InputError)


def test_files_that_are_broken(alex, tmp_path):
    (a,) = pictures(14)
    for name in ("x.pth", "x.safetensors"):
        for content in (b"", b"\x00" * 7, b"no weights, but some text in their place"):
            (tmp_path / name).write_bytes(content)
            refused(rf"{name}: not a ", a, a, tmp_path / name, kind=sparvar.InputError)
    path = tmp_path / "y.safetensors"
    save_safetensors(path, alex)
    path.write_bytes(path.read_bytes()[:-1])
    refused(r"y\.safetensors: tensor \S+ lies outside the file", a, a, path, kind=sparvar.InputError)
    save_safetensors(path, alex, dtype="I32")
    refused("tensor .*: expected F64, .* found I32", a, a, path, kind=sparvar.InputError)
    save_safetensors(path, alex, shape=[7])
    refused("a broken one", a, a, path, kind=sparvar.InputError)


def test_without_pytorch(alex, monkeypatch):
    (a,) = pictures(15)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(r'lpips needs PyTorch: pip install "sparvar\[torch\]"', a, a, alex)


@pytest.mark.gpu
def test_on_a_gpu(alex):
    a, b = pictures(16, 2)
    before = torch.backends.cudnn.allow_tf32
    value = sparvar.lpips(a, b, alex, device="cuda")
    assert value == pytest.approx(expected("alex", alex, a, b), rel=1e-5)
    assert torch.backends.cudnn.allow_tf32 == before
    tensors = [torch.from_numpy(picture).permute(2, 0, 1).cuda() for picture in (a, b)]
    assert sparvar.lpips(*tensors, alex) == value and sparvar.lpips(tensors[0], a, alex) == 0
