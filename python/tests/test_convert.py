"""Upstream's checkpoints into a model folder: every form of them, hostile ones, stops, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

import sparvar
from conftest import ROOT

FORMS = ("flat.pth", "nested.pth", "single.safetensors", "bin", "safetensors")
FIXTURES = ROOT / "tests" / "data" / "checkpoint-formats"
GRIDS = [1, 2, 4, 6, 8, 12, 16]
CONFIG = {"scales": GRIDS, "vae.norm_num_groups": 8, "defaults.tau": 0.7}


@pytest.fixture(scope="session")
def checkpoints(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    script = Path(__file__).parent / "make_checkpoints.py"
    subprocess.run([sys.executable, script, model, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def whole(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> sparvar.Conversion:
    """A finished conversion; not to be written to."""
    return convert(checkpoints, tmp_path_factory.mktemp("whole") / "made")


def convert(checkpoints: Path, output: Path, transformer: str | Path = "flat.pth", vae: Path | None = None, **options):
    given = (checkpoints / transformer, vae or checkpoints / "vae.pth", checkpoints / "flan-t5", output)
    return sparvar.convert(*given, **{"config": CONFIG, **options})


def header(path: Path) -> dict:
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def tensor(path: Path, name: str) -> bytes:
    content = path.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    first, last = header(path)[name]["data_offsets"]
    return content[begin + first : begin + last]


def sums(made: sparvar.Conversion) -> dict[str, str]:
    return {file.name: file.crc32 for file in made.files if file.name != "config.json"}


def draw(folder: Path | str) -> np.ndarray:
    pipe = sparvar.Pipeline.from_pretrained(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe("red heart, noto style", seed=3).images[0])


def pickled(path: Path, data: bytes) -> Path:
    """A checkpoint whose pickle is `data`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


# ---- what comes of it


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_gives_the_same_model(checkpoints, whole, tmp_path, form):
    made = convert(checkpoints, tmp_path / "made", form)
    assert sums(made) == sums(whole)
    assert made.config == whole.config
    where = [f"transformer: at 'trainer.gpt_fsdp' of {checkpoints / form}"] if form == "nested.pth" else []
    assert list(made.found_at) == [*where, f"vae: at 'vae' of {checkpoints / 'vae.pth'}"]


def test_the_folder_holds_the_tensors_and_draws(whole, model, tmp_path):
    folder = Path(whole.model)
    for file in whole.files:
        content = (folder / file.name).read_bytes()
        assert (file.bytes, file.crc32) == (len(content), f"{zlib.crc32(content):08x}"), file.name
    assert whole.bytes == sum(file.bytes for file in whole.files) and not any(file.reused for file in whole.files)
    assert {"transformer: attn_bias_for_masking", "transformer: lvl_1L"} <= set(whole.skipped)
    for stem in ("transformer", "vae", "text_encoder"):
        made, given = folder / f"{stem}.safetensors", model / f"{stem}.safetensors"
        for name, entry in header(made).items():
            if name != "__metadata__":
                assert entry["dtype"] == header(given)[name]["dtype"]
    name = "block_chunks.1.module.2.ffn.fc1.weight"
    assert tensor(folder / "transformer.safetensors", name) == tensor(model / "transformer.safetensors", name)
    small = tmp_path / "small"
    shutil.copytree(model, small)
    config = json.loads((small / "config.json").read_text())
    defaults = json.loads((folder / "config.json").read_text())["defaults"]
    (small / "config.json").write_text(json.dumps({**config, "scales": GRIDS, "defaults": defaults}))
    assert np.array_equal(draw(folder), draw(small))


@pytest.mark.parametrize("dtype", ["f32", "int8", "fp8"])
def test_types(checkpoints, whole, tmp_path, dtype):
    made = convert(checkpoints, tmp_path / "made", dtype=dtype)
    name = "block_chunks.1.module.2.ffn.fc1.weight"
    entries = header(tmp_path / "made" / "transformer.safetensors")
    assert entries[name]["dtype"] == {"f32": "F32", "int8": "I8", "fp8": "F8_E4M3"}[dtype]
    if dtype != "f32":
        assert (entries[f"{name}.scale"]["dtype"], entries[f"{name}.scale"]["shape"]) == ("F32", [1024])
        assert made.bytes < 0.8 * whole.bytes
    if dtype == "fp8":  # the linear layers of the blocks alone; in all other files nothing changes
        kept = {name for name, entry in entries.items() if entry.get("dtype") == "F8_E4M3"}
        assert all(".sa." in name or ".ca." in name or ".ffn." in name for name in kept)
        assert {name: crc for name, crc in sums(made).items() if not name.startswith("transformer")} == {
            name: crc for name, crc in sums(whole).items() if not name.startswith("transformer")
        }
    difference = np.abs(draw(made.model).astype(float) - draw(whole.model))
    assert (difference.max() > 0) == (dtype != "f32") and difference.mean() < 60


def test_fp8_numbers(checkpoints, whole, tmp_path):
    """Against the definition: scale = largest / 448, the nearest number of x / scale."""
    convert(checkpoints, tmp_path / "made", dtype="fp8")
    made, name = tmp_path / "made" / "transformer.safetensors", "block_chunks.0.module.1.sa.proj.weight"
    shape = header(made)[name]["shape"]
    codes = np.frombuffer(tensor(made, name), np.uint8).reshape(shape)
    scales = np.frombuffer(tensor(made, f"{name}.scale"), np.float32)
    wide = np.frombuffer(tensor(Path(whole.model) / "transformer.safetensors", name), np.uint16).astype(np.uint32) << 16
    given = wide.view(np.float32).reshape(shape)
    assert np.array_equal(scales, np.abs(given).max(1) / np.float32(448))
    code = np.arange(127)
    table = np.where(code < 8, code * 2.0**-9, (8 + code % 8) * 2.0 ** (code // 8 - 10.0))
    exact = np.abs(given * (np.float32(1) / scales)[:, None]).astype(np.float64)
    best = np.abs(exact[..., None] - table).min(-1)
    assert np.array_equal(np.abs(exact - table[codes & 127]), best)
    assert np.array_equal((codes >= 128)[exact > 0], np.signbit(given)[exact > 0])


def test_checkpoints_of_pytorch(checkpoints, whole, model, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    load_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").load_file
    tensors = load_file(model / "transformer.safetensors")
    tensors["head.weight"] = torch.nn.Parameter(tensors["head.weight"].T.contiguous().T)
    torch.save(tensors, tmp_path / "real.pth")
    assert sums(convert(checkpoints, tmp_path / "made", tmp_path / "real.pth")) == sums(whole)


def test_progress(checkpoints, whole, tmp_path):
    told = []
    made = convert(checkpoints, tmp_path / "made", progress=told.append)
    assert [at.bytes_done for at in told] == sorted(at.bytes_done for at in told)
    assert told[-1].bytes_done == told[-1].bytes_total and told[-1].verifying
    written = [at.file for at in told if not at.verifying]
    assert set(written) == {file.name for file in made.files} - {"config.json"} == set(sums(whole))


def test_a_bar(checkpoints, tmp_path, capsys):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    convert(checkpoints, tmp_path / "made", progress=True)
    assert "converting" in capsys.readouterr().err


# ---- stops


def test_it_goes_on_after_what_a_callback_raised(checkpoints, tmp_path):
    class Enough(Exception):
        pass

    def stop(at):
        if at.file.startswith("transformer-00004"):
            raise Enough

    made = tmp_path / "made"
    with pytest.raises(Enough):
        convert(checkpoints, made, shard_size=1_000_000, progress=stop)
    there = {path.name for path in made.iterdir()}
    assert "config.json" not in there and "transformer-00004" not in str(there) and not any("tmp" in n for n in there)
    with pytest.raises(sparvar.UsageError, match="resume"):
        convert(checkpoints, made, shard_size=1_000_000)
    again = convert(checkpoints, made, shard_size=1_000_000, resume=True)
    assert sum(file.reused for file in again.files) == 3
    assert sums(again) == sums(convert(checkpoints, tmp_path / "at-once", shard_size=1_000_000))


def test_ctrl_c(checkpoints, tmp_path):
    def interrupt(at):
        if at.file == "vae.safetensors":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoints, tmp_path / "made", progress=interrupt)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"convert.json", "transformer.safetensors"}


def test_damaged_files_are_written_again(checkpoints, whole, tmp_path):
    made = tmp_path / "made"
    shutil.copytree(whole.model, made)
    content = bytearray((made / "vae.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (made / "vae.safetensors").write_bytes(content)
    again = convert(checkpoints, made, resume=True)
    assert {file.name for file in again.files if not file.reused} == {"vae.safetensors", "config.json"}
    assert sums(again) == sums(whole)


def test_damaged_checkpoints_are_refused(checkpoints, tmp_path):
    content = bytearray((checkpoints / "vae.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "vae.pth").write_bytes(content)
    with pytest.raises(sparvar.InputError, match=r"vae\.pth.*checksum"):
        convert(checkpoints, tmp_path / "made", vae=tmp_path / "vae.pth")
    assert not (tmp_path / "made" / "config.json").exists()


# ---- what is refused


def hostile(marker: Path) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    command = f"touch {marker}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    return {
        "global": (b"\x80\x02cos\nsystem\n" + text + b"\x85R.", ("GLOBAL", "os.system", "nothing was run")),
        "posix": (b"\x80\x02cposix\nsystem\n" + text + b"\x85R.", ("GLOBAL", "posix.system", "nothing was run")),
        "stack-global": (
            b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93" + text + b"\x85R.",
            ("STACK_GLOBAL", "builtins.eval", "nothing was run"),
        ),
        "inst": (b"\x80\x02(" + text + b"ios\nsystem\n.", ("INST", "0x69", "nothing was run")),
        "obj": (b"\x80\x02(" + text + b"o.", ("OBJ", "0x6f", "nothing was run")),
        "newobj": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", ("NEWOBJ", "0x81", "nothing was run")),
        "extension": (b"\x80\x02\x82\x01.", ("EXT1", "0x82", "nothing was run")),
        "call-of-a-text": (b"\x80\x02" + text + b")R.", ("REDUCE", "text", "nothing was run")),
        "build": (b"\x80\x02}X\x01\0\0\0aK\x01s}b.", ("BUILD", "nothing was run")),
        "truncated": (b"\x80\x02}(X\x04\0\0\0ab", ("announces 4 bytes", "2 follow")),
        "no-end": (b"\x80\x02}", ("no end", "cut short")),
    }


@pytest.mark.parametrize("name", sorted(hostile(Path("x"))))
def test_hostile_pickles_run_nothing(checkpoints, tmp_path, name):
    marker = tmp_path / "ran"
    data, words = hostile(marker)[name]
    with pytest.raises(sparvar.InputError) as refused:
        convert(checkpoints, tmp_path / "made", vae=pickled(tmp_path / "bad.pth", data))
    message = str(refused.value)
    assert "\n" not in message and "bad.pth" in message
    assert "byte" in message
    for word in words:
        assert word in message
    assert not marker.exists() and not (tmp_path / "made").exists()


def test_archives_that_are_cut_short(checkpoints, tmp_path):
    content = (checkpoints / "vae.pth").read_bytes()
    for share in (0, 0.001, 0.5, 0.999):
        (tmp_path / "cut.pth").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(sparvar.InputError, match=r"cut\.pth"):
            convert(checkpoints, tmp_path / "made", vae=tmp_path / "cut.pth")


@pytest.mark.parametrize("form", sorted(path.name for path in FIXTURES.iterdir()))
def test_checkpoints_of_something_else(checkpoints, tmp_path, form):
    """Every form is read; its tensors are no model's."""
    with pytest.raises(sparvar.InputError, match=r"tensor '"):
        convert(checkpoints, tmp_path / "made", FIXTURES / form)
    assert not (tmp_path / "made").exists()


def test_arguments(checkpoints, whole, tmp_path):
    made = tmp_path / "made"
    for options, kind, words in [
        ({"dtype": "fp4"}, sparvar.UsageError, "bf16, f32, int8 or fp8, found 'fp4'"),
        ({"shard_size": 0}, sparvar.UsageError, "shard_size"),
        ({"config": "scales"}, sparvar.UsageError, "KEY=VALUE"),
        ({"config": {"scales": object()}}, sparvar.UsageError, "JSON"),
        ({"config": {"transformer.depht": 3}}, sparvar.Error, "depht"),
        ({"transformer": "none.pth"}, sparvar.InputError, "none.pth"),
        ({"transformer": 7}, sparvar.Error, ""),
        ({"vae": checkpoints / "no-vae.pth"}, sparvar.InputError, "no-vae.pth"),
        ({"transformer": "nested.pth", "transformer_key": "ema"}, sparvar.InputError, "ema"),
    ]:
        if options.get("transformer") == 7:
            with pytest.raises(sparvar.UsageError, match="transformer: expected a path"):
                sparvar.convert(7, "b", "c", made)
            continue
        with pytest.raises(kind) as refused:
            convert(checkpoints, made, **options)
        assert words in str(refused.value) and not made.exists()
    with pytest.raises(sparvar.InputError, match="text encoder's folder"):
        sparvar.convert(checkpoints / "flat.pth", checkpoints / "vae.pth", tmp_path / "no-t5", made)
    with pytest.raises(sparvar.UsageError, match=r"holds .* already"):
        convert(checkpoints, Path(whole.model))
    with pytest.raises(sparvar.UsageError, match="--dtype"):
        convert(checkpoints, Path(whole.model), dtype="int8", resume=True)


# ---- the command line


def command(*arguments, **options):
    line = [sys.executable, "-m", "sparvar.convert", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, **options)


def line_of(checkpoints: Path, output: Path) -> list[str]:
    inputs = [str(checkpoints / "flat.pth"), str(checkpoints / "vae.pth"), str(checkpoints / "flan-t5")]
    return [*inputs, "-o", str(output), *(f"--set={key}={json.dumps(value)}" for key, value in CONFIG.items())]


def test_module_without_pytorch(checkpoints, whole, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemError('PyTorch was imported')\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = command(*line_of(checkpoints, tmp_path / "made"), "--json", env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {file["name"]: file["crc32"] for file in report["files"] if file["name"] != "config.json"} == sums(whole)
    assert "Warning" not in done.stderr and "100 % of" in done.stderr


def test_module_is_the_program(checkpoints, program, tmp_path):
    def report(*line):
        done = subprocess.run([*line, "--json", "--quiet", "--dtype", "int8"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        return {key: value for key, value in found.items() if key not in ("seconds", "model")}

    module = report(sys.executable, "-m", "sparvar.convert", *line_of(checkpoints, tmp_path / "a"))
    assert module == report(str(program), "convert", *line_of(checkpoints, tmp_path / "b"))


def test_module_report(checkpoints, tmp_path):
    done = command(*line_of(checkpoints, tmp_path / "made"), "--dtype", "fp8", "--shard-size", "4M")
    assert done.returncode == 0, done.stderr
    for words in (
        "read back and found right",
        "crc32",
        "skipped  transformer: lvl_1L",
        "found    vae",
        "from_pretrained",
    ):
        assert words in done.stdout
    assert len(list((tmp_path / "made").glob("transformer-*.safetensors"))) > 1


def test_module_exit_codes(checkpoints, whole, tmp_path):
    line = line_of(checkpoints, tmp_path / "made")
    bad = pickled(tmp_path / "bad.pth", hostile(tmp_path / "ran")["global"][0])
    for arguments, code, words in [
        ([], 2, "three inputs"),
        (["a", "b", "-o", "c"], 2, "2 were given"),
        (line[:3], 2, "-o"),
        ([*line, "--dtype", "fp4"], 2, "--dtype: expected bf16, f32, int8 or fp8"),
        ([*line, "--shard-size", "many"], 2, "--shard-size"),
        ([*line, "--unknown"], 2, "--unknown"),
        (line_of(checkpoints, Path(whole.model)), 2, "--resume"),
        ([line[0], tmp_path / "none.pth", *line[2:]], 1, "none.pth"),
        ([line[0], bad, *line[2:]], 1, "os.system"),
    ]:
        done = command(*arguments)
        assert done.returncode == code, done.stderr
        assert done.stdout == "" and done.stderr.startswith("sparvar: ") and done.stderr.count("\n") == 1
        assert words in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "made").exists()
    assert command("--help").returncode == 0


def test_module_ctrl_c_and_resume(checkpoints, tmp_path):
    made = tmp_path / "made"
    line = [*line_of(checkpoints, made), "--shard-size", "50k", "--quiet"]
    arguments = [sys.executable, "-m", "sparvar.convert", *line]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(made.glob("transformer-*.safetensors"))) < 3:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and err.count("\n") == 1 and "--resume goes on" in err
    assert not (made / "config.json").exists()
    done = command(*line, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((made / "convert.json").read_text())["complete"]


def test_the_function_stays_a_function():
    done = subprocess.run(
        [sys.executable, "-c", "import sparvar.convert, sparvar; assert callable(sparvar.convert)"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
