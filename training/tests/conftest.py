"""A small data folder: simple shapes under the names that the stored lists hold."""

import json
import lzma
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -r training/requirements.txt")
pytest.importorskip("resvg_py", reason="resvg-py is not installed: pip install -r training/requirements.txt")

from training.data import SOURCES, read_list  # noqa: E402

torch.set_num_threads(1)  # what is computed here is too small for more

_COLOURS = ("#d33", "#3a3", "#33d", "#da2", "#a3a", "#2aa")


def shape(i: int) -> str:
    """A circle, a square or a triangle in one of six colours."""
    forms = (
        '<circle cx="16" cy="16" r="{r}" fill="{c}"/>',
        '<rect x="6" y="6" width="{r}" height="{r}" fill="{c}"/>',
        '<path d="M16 4 L28 28 L{r} 28 Z" fill="{c}"/>',
    )
    form = forms[i % 3].format(r=8 + i % 6, c=_COLOURS[i // 3 % 6])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{form}</svg>'


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `.jsonl.xz` files with 36 drawings."""
    folder = tmp_path_factory.mktemp("data")
    source_of = {about.style: source for source, about in SOURCES.items()}
    rows: dict[str, list[str]] = {}
    keys = [key for name in ("noto", "validation", "unseen") for key in read_list(name)[:12]]
    for i, key in enumerate(keys):
        style, name = key.split("/", 1)
        row = {"name": name.title(), "svg": shape(i), "keywords": ["shape", f"number {i}"]}
        rows.setdefault(source_of[style], []).append(json.dumps(row))
    for source, lines in rows.items():
        with lzma.open(folder / f"{source}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    return folder
