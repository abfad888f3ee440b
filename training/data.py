"""Drawings with names: which files are read, how names are made alike, captions, and what is kept out of training.

A data folder holds `<source>.jsonl.xz`: one JSON object a line with `name`, `svg` and, where known, `keywords`.
"""

import json
import lzma
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .errors import TrainingError


class Source(NamedTuple):
    """Where drawings come from. A source whose licence forbids spreading derived models must not be listed here."""

    style: str
    title: str
    licence: str


SOURCES: dict[str, Source] = {
    "noto": Source("noto", "Google Noto Emoji", "Apache-2.0"),
    "noto-v1": Source("blob", "Google Noto Emoji, first series", "Apache-2.0"),
    "fluent-emoji": Source("3d", "Microsoft Fluent Emoji, colour gradients", "MIT"),
    "fluent-emoji-flat": Source("flat", "Microsoft Fluent Emoji, flat", "MIT"),
    "fxemoji": Source("fx", "Mozilla FxEmojis", "Apache-2.0"),
    "twemoji": Source("twitter", "Twitter Emoji", "CC-BY-4.0"),
}

LISTS = Path(__file__).parent / "lists"
# A drawing that exists in five skin tones would otherwise be seen six times as often as an apple.
TONE_WEIGHT = 0.15
# The style that examples and defaults name is seen more often than the others.
STYLE_WEIGHT = {"noto": 2.0}
_TONES = ("light", "medium light", "medium", "medium dark", "dark")
_SHORT_TONE = re.compile(r" (medium light|medium dark|light|medium|dark)$")


@dataclass
class Drawing:
    """One drawing; `key` is unique: `style/name`."""

    name: str
    style: str
    svg: str
    keywords: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.style}/{self.name}"

    @property
    def toned(self) -> bool:
        """Whether it is a variant with a skin tone."""
        return "skin tone" in self.name

    @property
    def prompt(self) -> str:
        """The caption that evaluation uses."""
        return f"{self.name}, {self.style} style"


def clean_name(name: str) -> str:
    """Lower case, single blanks, skin tones always called `... skin tone`."""
    name = re.sub(r"[\s_:]+", " ", name.lower()).strip()
    name = name.replace("flag for flag", "flag")
    name = re.sub(r"tone([1-5])\b", lambda m: f"{_TONES[int(m[1]) - 1]} skin tone", name)
    return _SHORT_TONE.sub(r" \1 skin tone", name)


def read_drawings(folder: Path) -> list[Drawing]:
    """All drawings of the listed sources, in an order fixed by a seed; the first of drawings with the same key."""
    drawings: dict[str, Drawing] = {}
    keywords: dict[str, list[str]] = {}
    for source, about in SOURCES.items():
        path = folder / f"{source}.jsonl.xz"
        if not path.exists():
            continue
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    drawing = Drawing(clean_name(row["name"]), about.style, row["svg"])
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise TrainingError(
                        f"{path}: line {number} is not a drawing with name and svg: {error!r}"
                    ) from error
                drawings.setdefault(drawing.key, drawing)
                words = [clean_name(word) for word in row.get("keywords") or []]
                keywords.setdefault(drawing.name, [w for w in words if w != drawing.name])
    if not drawings:
        raise TrainingError(f"{folder}: none of {', '.join(f'{s}.jsonl.xz' for s in SOURCES)} is there")
    spaced = {name.replace(" ", ""): name for name in keywords if " " in name}
    rows = []
    for drawing in drawings.values():
        drawing.name = spaced.get(drawing.name, drawing.name)  # one source writes names without blanks
        drawing.keywords = keywords.get(drawing.name, [])
        rows.append(drawing)
    rows = list({row.key: row for row in rows}.values())
    random.Random(7).shuffle(rows)
    return rows


def caption(drawing: Drawing, rng: random.Random) -> str:
    """A caption to train on: mostly the base form that people are told to write."""
    kind = rng.random()
    if drawing.keywords and kind < 0.15:
        some = rng.sample(drawing.keywords, min(len(drawing.keywords), rng.randint(1, 3)))
        words = [drawing.name, *some] if rng.random() < 0.5 else some
        return f"{', '.join(words)}, {drawing.style} style"
    if kind < 0.75:
        return drawing.prompt
    if kind < 0.90:
        return f"{drawing.style} emoji of {drawing.name}"
    return drawing.name


def read_list(name: str) -> list[str]:
    """Keys `style/name` of a list in the repository."""
    lines = (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def make_lists(drawings: list[Drawing], count: int = 200, seed: int = 1) -> dict[str, list[str]]:
    """The lists that evaluation uses.

    unseen: combinations of a name and a style that training leaves out although the name is seen in two styles or more;
    no names with variants of skin tone, which would give the drawing away.
    noto: names that are trained in the style `noto`. validation: others of those, to choose the defaults by.
    """
    rng = random.Random(seed)
    base = sorted((d for d in drawings if not d.toned), key=lambda d: d.key)
    styles: dict[str, int] = {}
    for drawing in base:
        styles[drawing.name] = styles.get(drawing.name, 0) + 1
    order = rng.sample(base, len(base))
    varied = {d.name.split(" light ")[0].split(" medium ")[0].split(" dark ")[0] for d in drawings if d.toned}
    unseen: dict[str, str] = {}
    for drawing in order:
        if len(unseen) < count and styles[drawing.name] >= 3 and drawing.name not in varied:
            unseen.setdefault(drawing.name, drawing.key)
    noto = [d.key for d in order if d.style == "noto" and d.key not in set(unseen.values())]
    return {
        "unseen": sorted(unseen.values()),
        "noto": sorted(noto[:count]),
        "validation": sorted(noto[count : count + 96]),
    }
