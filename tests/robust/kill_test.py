#!/usr/bin/env python3
"""kill -9 at random moments leaves no half-written picture: python3 kill_test.py PROGRAM MODEL_DIR [TIMES [SEED]]

The file holds the picture that was there before or the whole new one. What was written aside may stay (nobody is left
to remove it): a hidden file, which the next run of the same folder does not trip over.
"""
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cli"))
from program import environment, is_whole_png, model_of_scales  # noqa: E402


def main(program, model, times, seed):
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="sparvar-kill-") as name:
        folder = Path(name)
        small = model_of_scales(model, folder / "model", 4)
        out = folder / "out"
        out.mkdir()
        picture = out / "a.png"

        def start(number):
            return subprocess.Popen([program, "generate", "red", "-n", "1", "--seed", str(number), "--model", small, "--threads", "1",
                                     "--quiet", "-o", picture], env=environment())

        begin = time.monotonic()
        assert start(0).wait(60) == 0
        whole = time.monotonic() - begin  # seconds of a run
        killed = done = aside = 0
        for number in range(1, times + 1):
            before = picture.read_bytes()
            process = start(number)
            # Half of the moments are in the last fifth, where the file is written.
            time.sleep(whole * (moments.uniform(0, 1.1) if number % 2 else moments.uniform(0.8, 1.1)))
            process.kill()
            if process.wait(60) == 0:
                done += 1
            else:
                killed += 1
            now = picture.read_bytes()
            if not is_whole_png(picture):
                sys.exit(f"kill {number} (seed {seed}): {picture} holds half a picture, {len(now)} bytes")
            strangers = [path.name for path in out.iterdir() if path != picture and not path.name.startswith(".sparvar-")]
            if strangers:
                sys.exit(f"kill {number} (seed {seed}): left {strangers}")
            aside += sum(path.name.startswith(".sparvar-") for path in out.iterdir())
            for path in out.glob(".sparvar-*"):
                path.unlink()
            if process.returncode == 0 and now == before:
                sys.exit(f"kill {number} (seed {seed}): ended well, but the picture is the old one")
        print(f"{times} moments: {killed} killed, {done} ended before; {aside} left a hidden file aside; every picture whole")
        if killed == 0:
            sys.exit("nothing was killed: the test tested nothing")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(arguments[0], Path(arguments[1]).resolve(), int(arguments[2]) if len(arguments) > 2 else 100,
         int(arguments[3]) if len(arguments) > 3 else time.time_ns() % 1_000_000)
