"""Several processes: what they compute together, and a training stage made by two."""

import json
from pathlib import Path

import pytest
import torch

from training import team
from training.config import TINY
from training.errors import TrainingError
from training.files import load_shards
from training.tests.test_pipeline import stage


def _member(me: team.Team, folder: Path) -> None:
    """Each process takes half of a batch; what it holds afterwards goes into a file."""
    torch.manual_seed(3)
    layer, unused = torch.nn.Linear(5, 4), torch.nn.Parameter(torch.ones(2))
    x = torch.randn(6, 5)
    share = len(x) // me.size
    layer(x[me.rank * share : (me.rank + 1) * share]).square().mean().backward()
    me.average_gradients([*layer.parameters(), unused])
    other = torch.full((3,), float(me.rank))
    me.align([other])
    me.wait()
    torch.save(
        {
            "weight": layer.weight.grad,
            "bias": layer.bias.grad,
            "unused": unused.grad,
            "aligned": other,
            "agreed": me.agreed(me.rank + 0.25, 2.0),
            "same": me.same({"rank": me.rank}),
            "sum": me.sum(torch.tensor([1.0 + me.rank])),
        },
        folder / f"{me.rank}.pt",
    )


def _fails(me: team.Team) -> None:
    if not me.lead:
        raise TrainingError("no bread", 2)


def test_two_processes_are_one(tmp_path: Path) -> None:
    team.start(2, _member, tmp_path)
    torch.manual_seed(3)
    layer = torch.nn.Linear(5, 4)
    layer(torch.randn(6, 5)).square().mean().backward()
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(seen["weight"], layer.weight.grad)
        torch.testing.assert_close(seen["bias"], layer.bias.grad)
        assert seen["unused"].tolist() == [0, 0]
        assert seen["aligned"].tolist() == [0, 0, 0]
        assert seen["agreed"] == [0.25, 2.0]
        assert seen["same"] == {"rank": 0}
        assert seen["sum"].tolist() == [3]


def test_sizes() -> None:
    assert team.size_for("cpu", None) == 1
    with pytest.raises(TrainingError, match="processes 0"):
        team.size_for("cpu", 0)


def test_a_failing_process_ends_the_team(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingError, match="process 1 of 2 ended with code 2") as caught:
        team.start(2, _fails)
    assert caught.value.code == 2
    assert "no bread" in capfd.readouterr().err


def test_a_stage_by_two_processes(data: Path, tmp_path: Path) -> None:
    """Their seconds add up, one of them writes, and what it writes can be gone on from."""
    common: list[str | Path] = ["--preset", "tiny", "--data", data, "--device", "cpu", "--workers", "1"]
    common += ["--work", tmp_path / "work", "--out", tmp_path / "out", "--processes", "2"]
    stage("tokenizer", *common)
    stage("run", *common, "--seconds", "100000", "--list-limit", "4")  # a busy machine is no error
    state = json.loads((tmp_path / "out/state.json").read_text())["stages"]
    for name, seconds in [("vae", TINY.vae_seconds), *((p.name, p.seconds) for p in TINY.phases)]:
        assert seconds <= state[name]["seconds"] < seconds + 2 * (TINY.step_seconds or 0) + 1e-6
        assert state[name]["steps"] == pytest.approx(state[name]["seconds"] / (2 * (TINY.step_seconds or 1)))
    assert load_shards(tmp_path / "out", "ar")
    records = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [r["processes"] for r in records if r["stage"] == "pictures"] == [2]
    assert json.loads((tmp_path / "out/report.json").read_text())["noto"]["prompts"] == 4
