"""Progress for people on stderr, and a log of numbers as JSON lines."""

import json
import sys
import time
from pathlib import Path
from typing import Any


class Progress:
    """Counts steps of a long stage: at most one line a second on a terminal, one in ten seconds elsewhere."""

    def __init__(self, what: str, total: int, quiet: bool = False, done: int = 0) -> None:
        self.what, self.total, self.quiet, self.done = what, total, quiet, done
        self._first, self._start, self._shown = done, time.monotonic(), 0.0

    def step(self, count: int = 1) -> None:
        """Counts `count` more."""
        self.done += count
        now = time.monotonic()
        if self.quiet or now - self._shown < (1 if sys.stderr.isatty() else 10):
            return
        self._shown = now
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else 0
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"{self.what}: {self.done} of {self.total}, {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)

    def end(self, text: str) -> None:
        """Says what came of it."""
        if not self.quiet:
            seconds = time.monotonic() - self._start
            print(f"{self.what}: {text}, {seconds:.1f} s", file=sys.stderr, flush=True)


class Log:
    """Appends one JSON object a line to each of its files and shows it as a line of text."""

    def __init__(self, *paths: Path, quiet: bool = False) -> None:
        self.paths, self.quiet, self._start = paths, quiet, time.monotonic()
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, **values: Any) -> None:
        """One record of `stage`."""
        record = {"stage": stage, **values}
        for path in self.paths:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if not self.quiet:
            text = " ".join(f"{name} {_short(value)}" for name, value in values.items())
            print(f"[{time.monotonic() - self._start:6.1f}] {stage}: {text}", file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "/".join(_short(v) for v in value)
    return str(value)
