"""The training log as a picture."""

import json
from pathlib import Path

from .errors import TrainingError


def read_log(path: Path) -> list[dict]:
    """The records of a log; a line cut off by an interruption is left out."""
    if not path.exists():
        raise TrainingError(f"{path}: there is no log; a training stage writes it")
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def draw_curves(log: Path, out: Path) -> None:
    """Two panels: the VAE's loss, and the transformer's for each length of the prefix, against seconds of training."""
    try:
        import matplotlib
    except ImportError as error:
        raise TrainingError("curves need the Python package matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_log(log)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    points = [(r["seconds"], r["loss"]) for r in records if r["stage"] == "vae"]
    left.plot(*zip(*points, strict=True) if points else ([], []))
    left.set(title="BSQ-VAE", xlabel="seconds", ylabel="loss", yscale="log")
    offset, phases = 0.0, [r for r in records if r["stage"].startswith("ar")]
    lines: dict[int, tuple[list[float], list[float]]] = {}
    for i, record in enumerate(phases):
        if i and record["stage"] != phases[i - 1]["stage"]:
            offset += phases[i - 1]["seconds"]
            right.axvline(offset, color="0.8", linewidth=1)
        xs, ys = lines.setdefault(record["scales"], ([], []))
        xs.append(offset + record["seconds"])
        ys.append(record["loss"])
    for scales, (xs, ys) in sorted(lines.items()):
        right.plot(xs, ys, label=f"{scales} scales")
    right.set(title="Transformer", xlabel="seconds", ylabel="loss a bit")
    if lines:
        right.legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
