"""Every stage through the command line, tiny, and the result in the engine."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.__main__ import main
from training.config import TINY
from training.evaluate import GUIDANCE, TEMPERATURE
from training.files import load_shards

ROOT = Path(__file__).resolve().parents[2]


def stage(*arguments: str | Path, code: int = 0) -> str:
    """Runs a stage in this process, which spares an import of PyTorch; returns what it says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([str(a) for a in arguments]) == code, said.getvalue()
    return said.getvalue()


def program(name: str) -> Path:
    """A program of the engine's build, or skips."""
    places = [os.environ.get("SPARVAR_BUILD"), ROOT / "build/release"]
    for place in places:
        if place and (path := Path(place) / name).exists():
            return path
    pytest.skip(f"{name} is not built; SPARVAR_BUILD may name a build folder")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, trained in two runs on two machines: the second has nothing but the first one's output."""
    base = tmp_path_factory.mktemp("run")
    common: list[str | Path] = [
        "--preset",
        "tiny",
        "--data",
        data,
        "--device",
        "cpu",
        "--workers",
        "1",
        "--tokenizer",
        base / "s.model",
    ]
    stage("tokenizer", *common)
    stage("vae", *common, "--work", base / "work1", "--out", base / "out1")
    state = json.loads((base / "out1/state.json").read_text())
    assert state["stages"]["vae"]["seconds"] >= TINY.vae_seconds
    where: list[str | Path] = ["--work", base / "work2", "--out", base / "out2", "--resume", base / "out1"]
    stage("run", *common, *where, "--seconds", "200", "--list-limit", "4")
    return base


def test_runs_continue_each_other(trained: Path, data: Path) -> None:
    state = json.loads((trained / "out2/state.json").read_text())
    assert state["runs"] == 2
    for phase in TINY.phases:
        assert state["stages"][phase.name]["seconds"] >= phase.seconds
    first, second = load_shards(trained / "out1", "vae"), load_shards(trained / "out2", "vae")
    assert all(torch.equal(first[name], second[name]) for name in first), (
        "the trained VAE was carried, not trained again"
    )
    stages = [json.loads(line)["stage"] for line in (trained / "out2/log.jsonl").read_text().splitlines()]
    assert {"vae held out", "features", "ar7", "ar10", "ar13", "following"} <= set(stages), "one log over both runs"
    assert (trained / "out2/sheet-ar13.jpg").stat().st_size > 1000
    sizes = [path.stat().st_size for path in (trained / "out2").iterdir()]
    assert max(sizes) < 16 * 2**20


def test_training_learns(trained: Path) -> None:
    """The loss of the shortest prefix falls well below that of a coin (ln 2 = 0.693)."""
    records = [json.loads(line) for line in (trained / "out2/log.jsonl").read_text().splitlines()]
    losses = {r["scales"]: r["loss"] for r in records if r["stage"] == "ar13"}
    assert losses[3] < 0.62


def test_report(trained: Path) -> None:
    report = json.loads((trained / "out2/report.json").read_text())
    assert report["noto"]["prompts"] == report["unseen"]["prompts"] == 4
    assert 0 <= report["noto"]["top1"] <= report["noto"]["top5"] <= 1
    assert set(report["psnr"]) == {"0", "1", "2", "3"}
    assert 5 < report["psnr"]["0"] < 60
    assert len(report["defaults_table"]) == len(GUIDANCE) * len(TEMPERATURE)
    text = (trained / "out2/report.md").read_text()
    assert "| noto_top5 | 0.7 |" in text
    stage("curves", "--log", trained / "out2/log.jsonl", "-o", trained / "curves.png")
    assert (trained / "curves.png").stat().st_size > 5000


def export(trained: Path, dtype: str) -> Path:
    """The model folder in a type."""
    folder = trained / f"model-{dtype}"
    stage("export", "--preset", "tiny", "--checkpoint", trained / "out2", "--tokenizer", trained / "s.model",
          "--dtype", dtype, "-o", folder)  # fmt: skip
    return folder


def test_int8_export(trained: Path) -> None:
    tensors = load_file(export(trained, "int8") / "transformer.safetensors")
    assert tensors["blocks.0.ffn.fc1.weight"].dtype == torch.int8
    assert tensors["blocks.0.ffn.fc1.weight.scale"].shape == tensors["blocks.0.ffn.fc1.weight"].shape[:1]
    assert tensors["blocks.0.ada_gss"].dtype == torch.bfloat16


def test_engine_agrees_with_pytorch(trained: Path) -> None:
    """Text states, logits of every scale, bits, summed codes and the decoded picture, teacher forced, in f32."""
    conformance = program("tests/conformance")
    folder = export(trained, "bf16")
    stage("fixture", "--preset", "tiny", "--model", folder, "-o", trained / "fixture")
    done = subprocess.run(
        [conformance, "--model", folder, trained / "fixture"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert ", 0 failed" in done.stdout
    config = json.loads((folder / "config.json").read_text())
    config["vae"]["norm_num_groups"] = 2  # the comparison must be able to fail
    (folder / "config.json").write_text(json.dumps(config))
    wrong = subprocess.run(
        [conformance, "--model", folder, trained / "fixture"], capture_output=True, text=True, timeout=300
    )
    assert wrong.returncode == 1


def test_engine_draws(trained: Path) -> None:
    sparvar = program("apps/cli/sparvar")
    folder = export(trained, "f32")
    done = subprocess.run(
        [sparvar, "generate", "shape, noto style", "--model", folder, "-o", trained / "shape.png", "--json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (trained / "shape.png").stat().st_size > 100


def test_script_continues_and_packs(trained: Path, data: Path, tmp_path: Path) -> None:
    """h100.sh with a carried checkpoint of the VAE: trains, and sends home few, small files."""
    carried, home = tmp_path / "carried", tmp_path / "home"
    carried.mkdir()
    (carried / "data").symlink_to(data)
    (carried / "checkpoint").symlink_to(trained / "out1")
    (carried / "spiece.model").symlink_to(trained / "s.model")
    env = {**os.environ, "WORK": str(tmp_path / "work"), "DEVICE": "cpu", "PRESET": "tiny", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    script: list[str | Path] = [ROOT / "training/h100.sh", "--carried", carried, "--out", home]
    done = subprocess.run([*script, "--seconds", "100"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    state = json.loads((home / "state.json").read_text())
    assert state["runs"] == 2
    assert state["stages"]["ar7"]["steps"] > 0
    names = {path.name for path in home.iterdir()}
    assert {"vae-0.safetensors", "state.json", "log.jsonl", "extras.tar.gz"} <= names and len(names) <= 8
    wrong = subprocess.run([*script[:1], "--out", home], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "has no folder data" in wrong.stderr


def test_model_card(trained: Path) -> None:
    folder = export(trained, "bf16")
    stage("card", "--checkpoint", trained / "out2", "--model", folder, "--machine", "a laptop")
    text = (folder / "README.md").read_text()
    for part in ("64x64 emoji", "121 tokens", "CC-BY-4.0", "| ar13 |", "| noto | 4 |", "on a laptop"):
        assert part in text, part
    assert (folder / "curves.png").exists() and (folder / "sheet.jpg").exists()
    assert "report.json: is missing" in stage("card", "--checkpoint", trained, "--model", folder, code=1)
    # The sheet is pressed into what the folder may have; where that is too little, the old one stays.
    whole = (folder / "sheet.jpg").stat().st_size
    others = sum(path.stat().st_size for path in folder.iterdir() if path.name != "sheet.jpg")
    card: list[str | Path] = ["card", "--checkpoint", trained / "out2", "--model", folder, "--limit"]
    stage(*card, str(others + whole * 2 // 3))
    pressed = (folder / "sheet.jpg").stat().st_size
    assert 500 < pressed <= whole * 2 // 3
    assert "are left below --limit" in stage(*card, str(others + 100), code=1)
    assert (folder / "sheet.jpg").stat().st_size == pressed
    (folder / "plan.json").write_text("[]")
    assert "plan.json: not an attention plan" in stage(*card[:-1], code=1)


def bundle(*arguments: str | Path, code: int = 0) -> str:
    """training/bundle in a process; what it says."""
    conformance = program("tests/conformance")
    program("apps/cli/sparvar")
    env = {**os.environ, "PYTHON": sys.executable, "SPARVAR_BUILD": str(conformance.parent.parent)}
    done = subprocess.run([ROOT / "training/bundle", "--preset", "tiny", *arguments], capture_output=True, text=True,
                          timeout=600, env=env)  # fmt: skip
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    if code:
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("training/bundle: "), done.stderr
    return done.stdout + done.stderr


def test_bundle(trained: Path, tmp_path: Path) -> None:
    """From a checkpoint to a model folder with plan and card, and a fixture; then single steps."""
    model, fixture = tmp_path / "shapes", tmp_path / "fixture"
    where: list[str | Path] = ["-o", model, "--fixture", fixture]
    source: list[str | Path] = ["--checkpoint", trained / "out2", "--tokenizer", trained / "s.model"]
    said = bundle(*source, *where, "--budget", "2", "--target-psnr", "20", "--machine", "a laptop")
    for part in ("== export", "== fixture", "== tune", "== card", ": 0 failed", "of less than 32000000"):
        assert part in said, said
    assert said.count(", 0 failed") == 2, "conformance in f32 and in bf16"
    plan = json.loads((model / "plan.json").read_text())
    assert plan["name"] == "tuned-20dB"
    card = (model / "README.md").read_text()
    assert "## Attention plan" in card and plan["note"][0] in card and "on a laptop" in card
    images = [name for name in ("io-0", "io-1") if "image_u8_rgb_hwc" in load_file(fixture / f"{name}.safetensors")]
    assert images == ["io-0"], "a thin fixture has one picture"
    # Each step alone; an export takes the old plan away.
    assert "== tune" not in bundle(*where, "--only", "fixture")
    assert "== fixture" not in bundle(*source[:3], model / "spiece.model", *where, "--only", "export")
    assert not (model / "plan.json").exists()
    # A fixture of another model is noticed, by the reference first.
    wrong = load_file(model / "transformer.safetensors")
    wrong["head.weight"] *= 1.01
    save_file(wrong, model / "transformer.safetensors")
    check: list[str | Path] = [sys.executable, ROOT / "scripts/check_bundled_fixture.py", "--model", model, fixture]
    done = subprocess.run(check, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "FAILED  logit_difference.s0" in done.stdout, done.stdout + done.stderr


def test_bundle_says_what_is_missing(trained: Path, tmp_path: Path) -> None:
    model: list[str | Path] = ["-o", tmp_path / "shapes"]
    source: list[str | Path] = ["--checkpoint", trained / "out2", "--tokenizer", trained / "s.model"]
    assert "there is no step exprot" in bundle(*source, *model, "--only", "exprot", code=2)
    assert "--checkpoint '' is no folder" in bundle(*model, code=2)
    assert "is no file" in bundle(*source[:2], *model, "--tokenizer", tmp_path / "none", code=2)
    assert "the step export comes first" in bundle(*model, "--only", "tune", code=2)
    assert "report.json: is missing" in bundle("--checkpoint", trained / "out1", *source[2:], *model, code=1)
    assert not (tmp_path / "shapes").exists(), "nothing was begun"


def test_a_longer_budget_leaves_the_vae_alone(trained: Path, data: Path) -> None:
    """Once the transformer has learnt bits of a VAE, that VAE must not change."""
    before = load_shards(trained / "out2", "vae")
    common: list[str | Path] = ["--preset", "tiny", "--data", data, "--device", "cpu", "--workers", "1"]
    where: list[str | Path] = [
        "--work",
        trained / "work2",
        "--out",
        trained / "out3",
        "--tokenizer",
        trained / "s.model",
    ]
    stage("transformer", *common, *where, "--budget", "1.1")
    state = json.loads((trained / "out3/state.json").read_text())
    assert (
        state["stages"]["ar7"]["steps"]
        > json.loads((trained / "out2/state.json").read_text())["stages"]["ar7"]["steps"]
    )
    assert all(torch.equal(t, before[name]) for name, t in load_shards(trained / "out3", "vae").items())


def test_errors_are_one_line(data: Path, tmp_path: Path) -> None:
    common: list[str | Path] = [
        "--preset",
        "tiny",
        "--data",
        data,
        "--work",
        tmp_path / "w",
        "--out",
        tmp_path / "o",
        "--device",
        "cpu",
    ]
    assert "Traceback" not in stage("transformer", *common, code=1)
    assert "more than 0 seconds" in stage("run", *common, "--seconds", "0", code=2)
    missing = stage("export", "--checkpoint", tmp_path, "--tokenizer", tmp_path / "x", "-o", tmp_path / "m", code=1)
    assert "no whole model" in missing
    (tmp_path / "w/state.json").write_text('{"preset": "emoji", "runs": 1, "stages": {}}')
    assert "belongs to the preset emoji" in stage("run", *common, "--seconds", "5", code=2)
    (tmp_path / "w/state.json").write_text("{")
    assert "not a state" in stage("run", *common, "--seconds", "5", code=1)
