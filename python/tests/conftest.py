"""What the tests share: the bundled model, the program, grids that are not square, and who is left out and why."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import sparvar

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("SPARVAR_TEST_MODEL", ROOT / "models" / "emoji"))
GRIDS = ((1, 1), (2, 3), (4, 5), (7, 6), (9, 11), (12, 13))
"""Six scales; no tile of the tests divides them."""
TOKENS = [h * w for h, w in GRIDS]
KEYS = [int(keys) for keys in np.cumsum(TOKENS)]

try:
    import torch
except ImportError:
    torch = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = "no GPU" if torch is not None and not torch.cuda.is_available() else "PyTorch is not installed"
    skip_gpu = pytest.mark.skip(reason=no_gpu)
    usable = torch is not None and torch.cuda.is_available()
    for item in items:
        if "gpu" in item.keywords and not usable:
            item.add_marker(skip_gpu)


@pytest.fixture(scope="session")
def model() -> Path:
    if not (MODEL / "config.json").exists():
        pytest.skip(f"{MODEL}: the bundled model is not there")
    return MODEL


@pytest.fixture(scope="session")
def program() -> Path:
    """The command-line program: what it draws is what the package must draw."""
    path = os.environ.get("SPARVAR_PROGRAM", "")
    if not path:
        pytest.skip("SPARVAR_PROGRAM does not name the command-line program")
    return Path(path)


@pytest.fixture(scope="session")
def pipe(model: Path) -> sparvar.Pipeline:
    made = sparvar.Pipeline.from_pretrained(model, device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def few_scales(model: Path, tmp_path: Path) -> Path:
    """The bundled model without its plan, drawing on its first four scales only: quick, and no picture to speak of."""
    import json

    folder = tmp_path / "few"
    folder.mkdir()
    for file in model.iterdir():
        if file.name not in ("config.json", "plan.json") and file.is_file():
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    config["scales"] = config["scales"][:4]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def arrays(seed: int, scale: int, batch: int = 2, heads: int = 3, channels: int = 32) -> tuple[np.ndarray, ...]:
    """q, k, v of a scale of GRIDS."""
    random = np.random.default_rng(seed)
    shapes = [(batch, heads, tokens, channels) for tokens in (TOKENS[scale], KEYS[scale], KEYS[scale])]
    return tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """softmax(q k^T / sqrt(D)) v in double precision over the pairs of the mask, bool (queries, keys)."""
    return probabilities(q, k, mask) @ v.astype(np.float64)


def probabilities(q: np.ndarray, k: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    logits = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
