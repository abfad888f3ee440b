#!/usr/bin/env python3
"""Inputs and machines that break software of this kind: python3 robust_test.py PROGRAM MODEL_DIR

Each row: what is asked, and the words that the one line on stderr must hold. Nothing may crash, and no half-written file
may be left. SPARVAR_ROBUST=full takes memory away at many more points.
"""
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from program import environment, is_whole_png, model_of_scales, run

PROGRAM, MODEL = "", Path()
FULL = os.environ.get("SPARVAR_ROBUST") == "full"


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


class Robust(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="sparvar-robust-")
        self.addCleanup(folder.cleanup)
        self.dir = Path(folder.name)
        self.out = self.dir / "out"
        self.out.mkdir()
        self.picture = self.out / "a.png"
        self.small = model_of_scales(MODEL, self.dir / "small", 4)

    def generate(self, *arguments, model=None, threads=1, **options):
        """One thread, but where threads matter: two spin while they wait, and tests share the machine."""
        return run(PROGRAM, "generate", "--model", model or self.small, "--quiet", "--threads", threads, *arguments, env=environment(),
                   **options)

    def assert_refused(self, result, code, *words):
        message = result.stderr.decode("utf-8", "replace")
        self.assertEqual(result.returncode, code, message)
        self.assertEqual(message.count("\n"), 1, message)
        self.assertTrue(message.startswith("sparvar: "), message)
        self.assertLess(len(message), 1000)
        for word in words:
            self.assertIn(str(word), message)
        self.assertEqual(list(self.out.iterdir()), [])

    def assert_drawn(self, result, *files):
        self.assertEqual((result.returncode, result.stderr), (0, b""))
        self.assertEqual(sorted(file.name for file in self.out.iterdir()), sorted(file.name for file in files))
        for file in files:
            self.assertTrue(is_whole_png(file), file)
            file.unlink()


class Models(Robust):
    def test_safetensors(self):
        """Rows: a transformer.safetensors, the words of its refusal. The reader's own tests have many more."""
        rows = [
            ("empty", b"", "empty", "at least 8 bytes"),
            ("7 bytes", b"\0" * 7, "at least 8 bytes"),
            ("length wraps", struct.pack("<Q", 2**64 - 4) + b"{}", "at most 100000000"),
            ("longer than the file", struct.pack("<Q", 1000) + b"{}", "cut short"),
            ("over 100 MB", struct.pack("<Q", 100_000_001) + b"{}", "at most 100000000"),
            ("not UTF-8", safetensors(b'{"\xff":{}}'), "UTF-8"),
            ("open brace", safetensors(b"{"), "not valid JSON"),
            ("trailing bytes", safetensors({"w": tensor()}, b"\0" * 9), "bytes follow the last tensor"),
            ("2 bytes short", safetensors({"w": tensor()}, b"\0" * 6), "'w'", "cut short"),
            ("begin > end", safetensors({"w": tensor(span=(8, 0))}, b"\0" * 8), "'w'", "end before they begin"),
            ("one offset", safetensors({"w": tensor(span=(8, ))}, b"\0" * 8), "'w'", "two whole numbers"),
            ("a hole", safetensors({"w": tensor(span=(4, 12))}, b"\0" * 12), "'w'", "hole"),
            ("an overlap", safetensors({"a": tensor(), "b": tensor(span=(4, 12))}, b"\0" * 12), "'b'", "overlap"),
            ("span and shape", safetensors({"w": tensor(shape=(32, 8), span=(0, 65536))}, b"\0" * 65536), "'w'", "1024 bytes"),
            ("product wraps", safetensors({"w": tensor(shape=(2**32, 2**32), span=(0, 0))}), "'w'", "64 bits"),
            ("negative", safetensors({"w": tensor(shape=(-2, ))}, b"\0" * 8), "'w'", "-2"),
            ("fraction", safetensors({"w": tensor(shape=(2.5, ))}, b"\0" * 8), "'w'", "2.5"),
            ("dtype", safetensors({"w": tensor(dtype="F12")}, b"\0" * 8), "'w'", "'F12'", "BF16"),
            ("twice", safetensors(b'{"w":{},"w":{}}'), "'w'", "twice"),
            ("asks for gigabytes", safetensors({"w": tensor(shape=(4, 2**28), span=(0, 2**32))}, b"\0" * 60), "'w'", "cut short"),
            ("other tensors", safetensors({"w": tensor()}, b"\0" * 8), "missing"),
        ]
        for number, (name, content, *words) in enumerate(rows):
            with self.subTest(name):
                model = model_of_scales(MODEL, self.dir / f"model{number}", 4, transformer__safetensors=content)
                self.assert_refused(self.generate("red", "-o", self.picture, model=model), 1, "transformer.safetensors", *words)

    def test_shards(self):
        index = lambda shard: json.dumps({"weight_map": {"a": shard}}).encode()
        for number, (shard, word) in enumerate([("none.safetensors", "no such file"), ("../x.safetensors", "in the folder"),
                                                ("/etc/passwd", "in the folder")]):
            with self.subTest(shard):
                model = model_of_scales(MODEL, self.dir / f"shards{number}", 4, transformer__safetensors=None,
                                        transformer__safetensors__index__json=index(shard))
                self.assert_refused(self.generate("red", "-o", self.picture, model=model), 1, "index.json", "'a'", shard, word)

    def test_config(self):
        config = json.loads((self.small / "config.json").read_text())

        def changed(part, key, value):
            return json.dumps({**config, part: {**config[part], key: value}}).encode()

        rows = [
            ("type", changed("transformer", "depth", "8"), "transformer.depth", "integer", "'8'"),
            ("NaN", changed("transformer", "mlp_ratio", float("nan")), "not valid JSON"),
            ("huge", changed("transformer", "depth", 2**70), "transformer.depth"),
            ("width wraps", changed("transformer", "embed_dim", 2**30), "embed_dim", "to 16384"),
            ("heads", changed("transformer", "num_heads", 5), "num_heads", "divisor of embed_dim"),
            ("head dim", changed("transformer", "num_heads", 128), "num_heads", "multiple of 4"),
            ("shrinks", json.dumps({**config, "scales": [1, 4, 2]}).encode(), "scales", "do not shrink"),
            ("no scales", json.dumps({**config, "scales": []}).encode(), "scales", "1 to 64"),
            ("a million scales", json.dumps({**config, "scales": [1] * 1_000_000}).encode(), "at most 1000000"),
            ("nested", b'{"scales":' + b"[" * 100_000, "nested deeper"),
            ("weights of another depth", changed("transformer", "depth", 10), "transformer.safetensors", "missing"),
        ]
        for number, (name, content, *words) in enumerate(rows):
            with self.subTest(name):
                model = model_of_scales(MODEL, self.dir / f"config{number}", 4, config__json=content)
                where = [] if name == "weights of another depth" else ["config.json"]
                self.assert_refused(self.generate("red", "-o", self.picture, model=model), 1, *where, *words)
        model = model_of_scales(MODEL, self.dir / "gigabyte", 4)
        os.truncate(model / "config.json", 1 << 30)  # sparse
        self.assert_refused(self.generate("red", "-o", self.picture, model=model), 1, "config.json", "1073741824 bytes", "at most")


class Prompts(Robust):
    def test_what_is_drawn(self):
        rows = [
            ("empty", ""),
            ("one space", " "),
            ("100 kB", "red " * 25_000),
            ("right to left", "\u202eקלב אדום\u202c"),
            ("emoji sequences", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽"),
            ("special tokens", "a</s><pad><unk><extra_id_0><extra_id_99>b"),
            ("a flag's look", "--red"),
        ]
        for name, prompt in rows:
            with self.subTest(name):
                self.assert_drawn(self.generate("-o", self.picture, "--", prompt), self.picture)

    def test_files(self):
        """Rows: the file's bytes, how many pictures."""
        rows = [
            ("no final line end", b"red\nblue", 2),
            ("Windows line ends", b"\xef\xbb\xbfred\r\nblue\r\n\r\n", 2),
            ("blank lines", b"\n \nred\n\t\n", 1),
            ("100 kB in a line", b"red " * 25_000, 1),
        ]
        for name, content, count in rows:
            with self.subTest(name):
                (self.dir / "prompts.txt").write_bytes(content)
                result = self.generate("-f", self.dir / "prompts.txt", "-o", self.out)
                self.assert_drawn(result, *self.out.iterdir())
                self.assertEqual(result.returncode, 0)

    def test_refused(self):
        """Rows: the file's bytes, exit code, words."""
        rows = [
            ("invalid UTF-8", b"red\nblue \xff\n", 1, "prompts.txt: line 2", "byte 6", "0xff", "save the file as UTF-8"),
            ("cut emoji", b"\xf0\x9f\x98", 1, "prompts.txt: line 1", "byte 1", "UTF-8"),
            ("NUL", b"red\0apple\n", 1, "prompts.txt: line 1", "byte 4", "NUL"),
            ("UTF-16", "red".encode("utf-16"), 1, "prompts.txt: line 1", "UTF-8"),
            ("nothing", b"", 1, "prompts.txt", "no prompt", "one a line"),
            ("10,000 lines", b"red\n" * 10_000, 2, "10000 pictures", "at most 1024"),
        ]
        for name, content, code, *words in rows:
            with self.subTest(name):
                (self.dir / "prompts.txt").write_bytes(content)
                self.assert_refused(self.generate("-f", self.dir / "prompts.txt", "-o", self.out), code, *words)
        self.assert_refused(self.generate(os.fsdecode(b"red \xff"), "-o", self.picture), 2, "prompt", "byte 4", "0xff")


class Numbers(Robust):
    def test_out_of_range(self):
        rows = [
            ("--seed", ["-1", str(2**64), "1e3", "0x10", "", " 1", "1 "]),
            ("--cfg", ["nan", "inf", "-inf", "-1", "1e30", "1,", ",1", "1;2"]),
            ("--tau", ["0", "-1", "nan", "inf", "1e-9"]),
            ("-n", ["0", "-1", "1000000000", "99999999999999999999", "1.5"]),
            ("--threads", ["0", "-1", "1000000", "two"]),
            ("--batch", ["0", "-1", "1000000000"]),
            ("--top-p", ["-0.1", "1.1", "nan"]),
            ("--top-k", ["-1", "2147483648"]),
        ]
        for flag, values in rows:
            for value in values:
                with self.subTest(f"{flag} {value}"):
                    result = run(PROGRAM, "generate", "red", f"{flag}={value}" if flag.startswith("--") else flag + value, "--quiet",
                                 "--model", self.small, "-o", self.picture, env=environment())
                    self.assert_refused(result, 2, flag, value.split(",")[0].strip() if value.strip(", ") else "")


class Machine(Robust):
    def test_places(self):
        """Rows: where to write, exit code, words."""
        (self.dir / "folder.png").mkdir()
        (self.dir / "file").write_text("x")
        rows = [
            (self.dir / "folder.png", 1, "folder.png", "is a folder", "needs a file's name"),
            (self.dir / "none" / "a.png", 1, "none", "does not exist", "make it first"),
            (self.dir / "file" / "a.png", 1, "file"),
            (self.dir / ("x" * 300 + ".png"), 1, "xxx.png", "File name too long"),
            ("/dev/full", 1, "/dev/full", "not a folder"),
            ("/proc/a.png", 1, "/proc"),
        ]
        for where, code, *words in rows:
            with self.subTest(str(where)[-40:]):
                self.assert_refused(self.generate("red", "-o", where), code, *words)

    def test_a_read_only_folder(self):
        self.out.chmod(0o555)
        self.addCleanup(self.out.chmod, 0o755)
        options = {}
        if os.geteuid() == 0:  # root may write everywhere: be somebody else
            self.dir.chmod(0o755)
            options = {"user": 65534}
            try:
                subprocess.run([PROGRAM, "--version"], user=65534, capture_output=True, check=True)
            except (PermissionError, subprocess.CalledProcessError):  # a clone in /root, which nobody else may enter
                self.skipTest("another user cannot run the program here")
        self.assert_refused(self.generate("red", "-o", self.picture, **options), 1, self.out, "cannot be written", "Permission denied")

    def test_a_full_disk(self):
        disk = self.dir / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True, check=False).returncode != 0:
            self.skipTest("no right to mount a small disk; test_a_full_disk_leaves_no_half_picture limits the file instead")
        try:
            (disk / "a.png").write_bytes(b"old")
            result = self.generate("red", "-o", disk / "a.png")
            self.assert_refused(result, 1, disk / "a.png", "No space left")
            self.assertEqual([(p.name, p.read_bytes()) for p in disk.iterdir()], [("a.png", b"old")])
        finally:
            subprocess.run(["umount", disk], check=True)

    def test_output_equals_an_input(self):
        prompts = self.dir / "prompts.png"
        prompts.write_text("red\n")
        self.assert_refused(self.generate("-f", prompts, "-o", prompts), 2, "prompts.png", "is an input", "another name")
        self.assertEqual(prompts.read_text(), "red\n")

    def test_standard_streams(self):
        """Closed ones are not mistaken for the files opened next; a full one is an error after the picture is there."""
        arguments = [PROGRAM, "generate", "red", "--model", self.small, "--threads", "1", "-o", self.picture, "--json"]
        for closed in (0, 1, 2):
            with self.subTest(closed):
                pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
                for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
                    if number == closed:
                        pipes[name] = None
                result = subprocess.run(arguments, preexec_fn=lambda: os.close(closed), timeout=60, check=False, env=environment(),
                                        **pipes)
                self.assertEqual(result.returncode, 1 if closed == 1 else 0)
                if closed == 1:
                    self.assertIn(b"sparvar: standard output: cannot be written: Bad file descriptor\n", result.stderr)
                self.assertTrue(is_whole_png(self.picture))
                self.picture.unlink()
        with open("/dev/full", "wb") as full:
            result = self.generate("red", "-o", self.picture, "--json", stdout=full, stderr=subprocess.PIPE)
        self.assertEqual(result.returncode, 1)
        self.assertIn(b"sparvar: standard output: cannot be written: No space left on device\n", result.stderr)

    def test_two_runs_that_write_one_file(self):
        whole = []
        for seed in (1, 2):
            self.generate("red", "--seed", seed, "-o", self.picture)
            whole.append(self.picture.read_bytes())
        self.assertNotEqual(*whole)
        for _ in range(3):
            runs = [subprocess.Popen([PROGRAM, "generate", "red", "--seed", str(seed), "--model", self.small, "--threads", "1", "--quiet",
                                      "-o", self.picture], env=environment()) for seed in (1, 2)]
            self.assertEqual([process.wait(60) for process in runs], [0, 0])
            self.assertIn(self.picture.read_bytes(), whole)
            self.assertEqual(list(self.out.iterdir()), [self.picture])

    def test_ctrl_c_at_each_stage(self):
        """At the line that ends a stage, and before the first: stopped without a file, or done with a whole one."""
        for after in ("", "prompts encoded", *(f"scale {k}/4" for k in range(1, 5)), "pictures decoded"):
            with self.subTest(after), subprocess.Popen(
                    [PROGRAM, "generate", "red", "--model", self.small, "--threads", "1", "-o", self.picture], stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, text=True, env=environment()) as process:
                if after:
                    for line in process.stderr:
                        if line.startswith(after):
                            break
                else:
                    time.sleep(0.02)
                process.send_signal(signal.SIGINT)
                _, message = process.communicate(timeout=10)
                left = list(self.out.iterdir())
                if process.returncode == 0:
                    self.assertEqual(left, [self.picture])
                    self.assertTrue(is_whole_png(self.picture))
                    self.picture.unlink()
                else:
                    # The second: before it could catch anything.
                    self.assertIn(process.returncode, (130, -signal.SIGINT), message)
                    self.assertEqual(left, [])
                    if process.returncode == 130:
                        self.assertRegex(message.splitlines()[-1], "^sparvar: (stopped|cancelled)")

    def test_out_of_memory(self):
        """Address space runs out at many points: drawn, or one line that says so; never a crash."""
        drawn = refused = 0
        for limit in range(60 << 20, 420 << 20, (2 if FULL else 24) << 20):
            with self.subTest(limit >> 20):
                result = self.generate("red", "-o", self.picture, threads=2,
                                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
                if result.returncode == 0:
                    drawn += 1
                    self.assert_drawn(result, self.picture)
                elif b"error while loading shared libraries" not in result.stderr:  # the system's loader, before the program
                    refused += 1
                    self.assert_refused(result, 1)
                    self.assertRegex(result.stderr.decode(), "memory|mapped|threads")
        self.assertGreater(drawn, 0)
        self.assertGreater(refused, 0)


if __name__ == "__main__":
    PROGRAM, MODEL = os.path.abspath(sys.argv[1]), Path(sys.argv[2]).resolve()
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=2)
