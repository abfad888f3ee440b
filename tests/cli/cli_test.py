#!/usr/bin/env python3
"""Runs the program as a user does: python3 cli_test.py PROGRAM MODEL_DIR

Pictures are drawn by the real model; where only the path matters, on its first seven scales (128x128 pixels).
"""
import json
import os
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
import zlib
from pathlib import Path

PROGRAM = ""
MODEL = Path()


def run(*arguments, **options):
    """The program with these arguments; output as text."""
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, timeout=300, check=False,
                          **({"stdin": subprocess.DEVNULL} if "input" not in options else {}), **options)


def read_png(path):
    """width, height, the raw filtered rows, {keyword: text} of a PNG file; checks every checksum."""
    data = Path(path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n", "not a PNG"
    at, chunks = 8, []
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + body), kind
        chunks.append((kind, body))
        at += 12 + size
    assert chunks[-1][0] == b"IEND", "cut short"
    width, height = struct.unpack(">II", chunks[0][1][:8])
    texts = {}
    for kind, body in chunks:
        keyword, _, rest = body.partition(b"\0")
        if kind == b"tEXt":
            texts[keyword.decode()] = rest.decode("latin-1")
        elif kind == b"iTXt":
            compressed, rest = rest[0], rest[2:]
            text = rest.split(b"\0", 2)[2]
            texts[keyword.decode()] = (zlib.decompress(text) if compressed else text).decode()
        elif kind == b"zTXt":
            texts[keyword.decode()] = zlib.decompress(rest[1:]).decode("latin-1")
    return width, height, zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT")), texts


def megabytes(model):
    """Of the weights."""
    return round(sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6)


def needed(size):
    """Megabytes that one picture of a size needs on this machine, whose processor may want weights in f32."""
    refusal = run("generate", "red", "--size", size, "--max-memory", "10M").stderr.decode()
    return int(re.search(r"needs (\d+)M", refusal)[1])


class CliTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="sparvar-cli-")
        self.addCleanup(folder.cleanup)
        self.dir = Path(folder.name)
        self.out = self.dir / "out"
        self.out.mkdir()

    def model_copy(self, name, **changes):
        """A model folder that shares the files of the real one but for those in `changes` (None: left out) and its plan."""
        copy = self.dir / name
        copy.mkdir()
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        for file in MODEL.iterdir():
            if file.name not in changed and file.name != "plan.json" and file.is_file():
                (copy / file.name).symlink_to(file.resolve())
        for file, content in changed.items():
            if content is not None:
                (copy / file).write_bytes(content)
        return copy

    def small_model(self):
        config = json.loads((MODEL / "config.json").read_text())
        config["scales"] = config["scales"][:7]
        return self.model_copy("small", config__json=json.dumps(config).encode())

    def assert_refused(self, result, code, *words):
        """Exit code, one line on stderr that holds the words, nothing on stdout, no file written."""
        message = result.stderr.decode("utf-8", "replace")
        self.assertEqual(result.returncode, code, message)
        self.assertEqual(message.count("\n"), 1, message)
        self.assertTrue(message.startswith("sparvar: "), message)
        for word in words:
            self.assertIn(word, message)
        self.assertEqual(result.stdout, b"")
        self.assertEqual(list(self.out.iterdir()), [])


class Pictures(CliTest):
    def test_the_bundled_model_draws_with_sparse_attention(self):
        """As the README says it, but for the folder the program stands in."""
        file = self.out / "face.png"
        result = run("generate", "grinning face, noto style", "--attention", "sparvar", "--seed", 3, "-o", file)
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        width, height, rows, texts = read_png(file)
        self.assertEqual((width, height), (512, 512))
        self.assertGreater(len(set(rows)), 50, "a picture has many values")
        self.assertEqual(texts["prompt"], "grinning face, noto style")
        self.assertEqual(texts["seed"], "3")
        self.assertEqual(json.loads(texts["settings"])["plan"]["name"], "sparvar")
        report = result.stdout.decode()
        for word in (str(file), "1x1", "64x64", "attention", "decode", "total", "pictures/s"):
            self.assertIn(word, report)
        self.assertIn("64x64", result.stderr.decode(), "progress by scale")
        self.assertEqual([path.name for path in self.out.iterdir()], ["face.png"])

    def test_threads_do_not_change_the_picture(self):
        model, prompts = self.small_model(), self.dir / "prompts.txt"
        prompts.write_bytes("\ufeffred apple, 3d style\r\n\r\n \ngrinning face \U0001F600".encode())
        pictures = []
        for threads in (1, 2):
            folder = self.dir / f"threads{threads}"
            folder.mkdir()
            result = run("generate", "-f", prompts, "-n", 2, "--greedy", "--dtype", "f32", "--threads", threads, "--model", model,
                         "-o", folder, "--json")
            self.assertEqual(result.returncode, 0, result.stderr.decode())
            report = json.loads(result.stdout)
            self.assertEqual([(p["prompt"], p["prompt_index"], p["picture_index"]) for p in report["pictures"]],
                             [("red apple, 3d style", 0, 0), ("red apple, 3d style", 0, 1),
                              ("grinning face \U0001F600", 1, 0), ("grinning face \U0001F600", 1, 1)])
            self.assertEqual(len(report["timings"]["scales"]), 7)
            self.assertEqual(report["plan"]["name"], "sparvar")
            self.assertEqual({Path(p["path"]) for p in report["pictures"]}, set(folder.iterdir()))
            pictures.append([Path(p["path"]).read_bytes() for p in report["pictures"]])
        self.assertEqual(pictures[0], pictures[1])
        self.assertNotEqual(pictures[0][0], pictures[0][2], "two prompts, two pictures")

    def test_seeds_and_standard_input(self):
        model, pixels = self.small_model(), {}
        for seed in (1, 2, 2**64 - 1):
            file = self.out / f"{seed}.png"
            result = run("generate", "-f", "-", "--seed", seed, "--cfg", "3,3,3,4,4,4,4", "--tau", "0.7", "--attention", "dense",
                         "--model", model, "-o", file, "--quiet", input=b"[red, apple]")
            self.assertEqual((result.returncode, result.stdout, result.stderr), (0, b"", b""))
            width, height, pixels[seed], texts = read_png(file)
            self.assertEqual((width, height, texts["prompt"]), (128, 128, "[red, apple]"))
        self.assertEqual(len(set(pixels.values())), 3, "every seed draws another picture")

    def test_info(self):
        report = json.loads(run("info", "--json").stdout)
        self.assertEqual(report["model"]["scales"][-1], [64, 64])
        self.assertEqual(report["model"]["picture"], {"height": 512, "width": 512})
        self.assertGreater(report["model"]["parameters"]["transformer"], 1_000_000)
        self.assertRegex(report["machine"]["backend"], "^cpu, (generic|avx2|avx512|avx512-bf16), [0-9]+ threads?$")
        text = run("info", "--model", MODEL)
        self.assertEqual(text.returncode, 0)
        self.assertIn("64x64", text.stdout.decode())


    def test_loading_is_shown_on_a_terminal(self):
        def shown(*arguments):
            ours, theirs = os.openpty()
            with subprocess.Popen([PROGRAM, "info", *arguments], stdout=subprocess.DEVNULL, stderr=theirs) as process:
                os.close(theirs)
                text = b""
                try:
                    while more := os.read(ours, 65536):
                        text += more
                except OSError:  # the program has gone
                    pass
            os.close(ours)
            self.assertEqual(process.returncode, 0)
            return text

        bar = shown("--model", MODEL)
        self.assertIn(b"] loading, ", bar)
        self.assertIn(f" of {megabytes(MODEL)} MB".encode(), bar)
        self.assertTrue(bar.endswith(b"\r\x1b[K"), "the bar is taken away")
        self.assertEqual(shown("--model", MODEL, "--quiet"), b"")

    def test_every_format_says_how_it_is_drawn_again(self):
        """The command that `info` prints draws the same pixels; the number of the picture is part of it."""
        for extension in ("png", "jpg", "webp"):
            with self.subTest(extension):
                result = run("generate", "red apple, 'quoted'", "blue -- bird", "-n", 2, "--size", "0.06M", "--aspect", "16:9",
                             "--skip-scales", 1, "--uncond-until", 4, "--cfg", "3,3,3,4,4,4,4", "--dtype", "f32", "--seed", 9,
                             "--format", "jpeg" if extension == "jpg" else extension, "-o", self.out, "--json", "--quiet")
                self.assertEqual(result.returncode, 0, result.stderr.decode())
                report = json.loads(result.stdout)
                self.assertEqual((report["uncond_scales"], len(report["timings"]["scales"])), (4, 6))
                last = Path(report["pictures"][3]["path"])
                about = json.loads(run("info", last, "--json").stdout)
                self.assertEqual(about["texts"]["prompt"], "blue -- bird")
                self.assertEqual(about["texts"]["model_hash"], report["model"]["hash"])
                self.assertEqual(about["texts"]["settings"]["picture"], 3)
                again = self.dir / f"again.{extension}"
                words = shlex.split(about["command"])
                self.assertEqual(words[0], "sparvar")
                result = run(*words[1:-2], "--quiet", "-o", again, *words[-2:])
                self.assertEqual(result.returncode, 0, result.stderr.decode())
                if extension == "png":
                    self.assertEqual(read_png(again)[:3], read_png(last)[:3])
                for file in self.out.iterdir():
                    file.unlink()

    def test_previews_and_contact_sheet(self):
        previews, sheet = self.dir / "previews", self.dir / "sheet.png"
        previews.mkdir()
        result = run("generate", "red apple", "-n", 2, "--size", "0.06M", "--preview", previews, "--grid", sheet, "-o", self.out)
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        self.assertEqual(len(list(previews.iterdir())), 2 * 3)
        self.assertEqual(read_png(sheet)[:2], (8 + 2 * 136, 8 + 136))
        self.assertIn("memory: ", result.stderr.decode())
        self.assertIn(f"model loaded ({megabytes(MODEL)} MB)", result.stderr.decode())

    def test_memory_is_planned_within_a_quarter(self):
        for arguments in (["--size", "0.06M"], ["--size", "0.25M", "-n", 4, "--batch", 4], ["--attention", "dense"],
                          ["--size", "0.60M", "--dtype", "f32"]):
            with self.subTest(arguments):
                result = run("generate", "red apple", *arguments, "-o", self.out, "--json", "--quiet")
                self.assertEqual(result.returncode, 0, result.stderr.decode())
                report = json.loads(result.stdout)
                planned, peak = report["memory"]["planned_peak_bytes"], report["machine"]["peak_memory_bytes"]
                self.assertLess(abs(planned / peak - 1), 0.25, (planned, peak))

    def test_memory_that_is_allowed(self):
        allowed = needed("0.06M") + 20
        result = run("generate", "red", "-n", 8, "--size", "0.06M", "--max-memory", f"{allowed}M", "-o", self.out, "--json", "--quiet")
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        report = json.loads(result.stdout)
        self.assertLessEqual(report["memory"]["planned_peak_bytes"], allowed * 1e6)
        self.assertLess(report["memory"]["batch"], 8)
        self.assertGreater(report["timings"]["batches"], 1)


class BadInput(CliTest):
    def test_usage(self):
        """(arguments after `generate`, words of the message); exit code 2, before a model is loaded."""
        prompt = "red apple"
        cases = [
            ([], "prompt"),
            ([prompt, "--sede", "7"], "--sede", "--seed"),
            ([prompt, "--quite"], "--quiet"),
            ([prompt, "--cfg", "nan"], "--cfg", "nan"),
            ([prompt, "--cfg", "inf"], "--cfg", "inf"),
            ([prompt, "--cfg", "-1"], "--cfg", "-1"),
            ([prompt, "--cfg", "3,,4"], "--cfg"),
            ([prompt, "--cfg", "3x"], "--cfg", "3x"),
            ([prompt, "--tau", "0"], "--tau", "0"),
            ([prompt, "--tau", "-0.5"], "--tau"),
            ([prompt, "--tau", "nan"], "--tau"),
            ([prompt, "-n", "0"], "-n", "0"),
            ([prompt, "-n", "1000000000"], "-n", "1000000000"),
            ([prompt, "other", "-n", "1000"], "2000"),
            ([prompt, "--seed", "-1"], "--seed", "-1"),
            ([prompt, "--seed", str(2**64)], "--seed", str(2**64)),
            ([prompt, "--seed", "1.5"], "--seed"),
            ([prompt, "--seed"], "--seed"),
            ([prompt, "--threads", "0"], "--threads", "0"),
            ([prompt, "--threads", "1000000"], "--threads"),
            ([prompt, "--top-p", "1.5"], "--top-p"),
            ([prompt, "--top-p", "nan"], "--top-p"),
            ([prompt, "--top-k", "-1"], "--top-k"),
            ([prompt, "--dtype", "f16"], "--dtype", "bf16"),
            ([prompt, "--weights", "fp4"], "--weights", "fp8"),
            ([prompt, "--weights", "fp8", "--device", "cpu"], "Hopper"),
            ([prompt, "--attention", "prob"], "prob", "probe"),
            ([prompt, "--attention", "dense", "--plan", "plan.json"], "--plan", "--attention"),
            ([prompt, "other", "-o", str(self.out / "one.png")], "one.png", "folder"),
            ([prompt, "--aspect", "7:5"], "7:5", "nearest is 4:3"),
            ([prompt, "--aspect", "wide"], "aspect", "width:height"),
            ([prompt, "--size", "0.3M"], "0.3M", "nearest is 0.25M"),
            ([prompt, "--skip-scales", "3"], "--skip-scales", "3"),
            ([prompt, "--uncond-until", "14"], "uncond-until", "13"),
            ([prompt, "--format", "gif"], "--format", "webp"),
            ([prompt, "--format", "webp", "-o", str(self.out / "one.png")], "one.png", "webp"),
            ([prompt, "--quality", "80"], "--quality", "PNG"),
            ([prompt, "--quality", "101", "--format", "jpeg"], "--quality", "101"),
            ([prompt, "--max-memory", "lots"], "--max-memory", "lots"),
            ([prompt, "--max-memory", "50M"], "max-memory", "nothing smaller fits"),
            ([prompt, "--max-memory", f"{needed('0.25M') + 5}M"], "what fits: --size 0.25M"),
        ]
        for arguments, *words in cases:
            with self.subTest(arguments):
                self.assert_refused(run("generate", *arguments, cwd=self.out), 2, *words)
        self.assert_refused(run(), 2, "generate")
        self.assert_refused(run("generat", prompt), 2, "generat", "did you mean generate?")
        self.assert_refused(run("info", "--josn"), 2, "--json")

    def test_text_that_is_not_utf8(self):
        self.assert_refused(run("generate", os.fsdecode(b"red \xff apple"), "--quiet", "-o", self.out / "a.png"), 2, "UTF-8")

    def test_the_number_of_scales(self):
        result = run("generate", "red apple", "--cfg", "3,4", "--quiet", "-o", self.out / "a.png")
        self.assert_refused(result, 2, "cfg", "13", "2")

    def test_places(self):
        """Files and folders that are not there or not what they should be; exit code 1."""
        (self.dir / "folder.png").mkdir()
        (self.dir / "file").write_text("no folder")
        (self.dir / "blank.txt").write_text("\n \r\n")
        (self.dir / "plan.json").write_text('{"name": "x", "rules": [{"method": "crosswise"}]}')
        here = self.dir
        for arguments, *words in [
            (["red", "-o", here / "none"], "none", "does not exist"),
            (["red", "-o", here / "none" / "a.png"], "none", "does not exist"),
            (["red", "-o", here / "folder.png"], "folder.png", "is a folder"),
            (["red", "-o", here / "file"], "file", "not a folder"),
            (["-f", here / "none.txt"], "none.txt"),
            (["-f", here / "blank.txt"], "blank.txt", "no prompt"),
            (["-f", here / "out"], "is a folder"),
            (["red", "--plan", here / "none.json"], "none.json"),
            (["red", "--plan", here / "plan.json"], "plan.json", "crosswise"),
            (["red", "--model", here / "none"], "none"),
            (["red", "--model", here / "out"], "out", "config.json"),
        ]:
            with self.subTest(arguments):
                self.assert_refused(run("generate", *arguments, "--quiet", cwd=self.out), 1, *words)

    def test_no_gpu(self):
        """Where no GPU can be seen, or the build has none: one line, before anything else."""
        for command in [["generate", "red"], ["info"], ["compare", "red"], ["reconstruct", MODEL.parent.parent / "docs" / "face.png", "-o", "a.png"], ["bench", "model"],
                        ["bench", "model", "--geometry", "infinity-2b", "--random-weights"]]:
            with self.subTest(command):
                for device in ("cuda", "cuda:3"):
                    result = run(*command, "--device", device, cwd=self.out, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
                    self.assert_refused(result, 1, f"device {device}: ", "; --device cpu does without")
                self.assert_refused(run(*command, "--device", "gpu", cwd=self.out), 2, "there is no device 'gpu'")

    def test_broken_models(self):
        config = json.loads((MODEL / "config.json").read_text())
        weights = (MODEL / "transformer.safetensors").read_bytes()
        unknown = {**config, "transformer": {**config["transformer"], "dept": 8}}
        for name, changes, words in [
            ("cut", {"transformer__safetensors": weights[:len(weights) // 2]}, ["transformer.safetensors"]),
            ("empty", {"vae__safetensors": b""}, ["vae.safetensors"]),
            ("key", {"config__json": json.dumps(unknown).encode()}, ["config.json", "dept"]),
            ("text", {"config__json": b"{"}, ["config.json"]),
            ("pieces", {"spiece__model": b"not a model"}, ["spiece.model"]),
            ("lost", {"text_encoder__safetensors": None}, ["text_encoder"]),
        ]:
            with self.subTest(name):
                model = self.model_copy(name, **changes)
                result = run("generate", "red", "--model", model, "--quiet", "-o", self.out / "a.png")
                self.assert_refused(result, 1, *words)


class Machine(CliTest):
    def test_a_full_disk_leaves_no_half_picture(self):
        limit = 512  # bytes a file may have: the write that passes it fails as on a full disk
        result = run("generate", "red", "--greedy", "--model", self.small_model(), "--quiet", "-o", self.out / "a.png",
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        self.assert_refused(result, 1, "a.png")

    def test_standard_output_that_takes_nothing(self):
        with open("/dev/full", "wb") as full:
            result = subprocess.run([PROGRAM, "info"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
        self.assertEqual(result.returncode, 1)
        self.assertEqual(result.stderr.count(b"\n"), 1)
        reading, writing = os.pipe()
        os.close(reading)
        try:
            result = subprocess.run([PROGRAM, "info"], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
        finally:
            os.close(writing)
        self.assertEqual(result.returncode, 1, "an exit code of its own, not a signal")

    def test_interrupts_stop_it(self):
        """Ctrl-C in the long last scales, SIGTERM in the first."""
        for sent, after, code in [(signal.SIGINT, "scale 11/", 130), (signal.SIGTERM, "scale 1/", 143)]:
            with self.subTest(sent), subprocess.Popen(
                    [PROGRAM, "generate", "red", "-n", "4", "--attention", "dense", "--dtype", "f32", "-o", self.out],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                for line in process.stderr:
                    if line.startswith(after):
                        break
                process.send_signal(sent)
                try:
                    _, message = process.communicate(timeout=5)
                finally:
                    process.kill()
                self.assertEqual(process.returncode, code)
                self.assertEqual([line for line in message.splitlines() if line.startswith("sparvar: ")], message.splitlines()[-1:])
                self.assertEqual(list(self.out.iterdir()), [])


if __name__ == "__main__":
    PROGRAM, MODEL = os.path.abspath(sys.argv[1]), Path(sys.argv[2]).resolve()
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=2)
