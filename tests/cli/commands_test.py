#!/usr/bin/env python3
"""compare, plan, reconstruct, bench, completion and reference as a user runs them: commands_test.py PROGRAM MODEL_DIR

Bits are read with the standard library's zipfile, and with NumPy where there is one.
"""
import ast
import csv
import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import unittest
import zipfile
from pathlib import Path

import cli_test
from cli_test import read_png, run

REPOSITORY = Path(__file__).resolve().parents[2]
FACE = REPOSITORY / "docs" / "face.png"
PROBE_PLAN = {"name": "mine", "rules": [{"scales": [4, -1], "method": "probe", "stride": 4, "share": 0.1}]}


def without_encoder(content):
    """A safetensors file less its tensors of the encoder."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8:8 + size]), content[8 + size:]
    kept, out = {}, b""
    for name, tensor in header.items():
        if name == "__metadata__" or name.startswith("encoder."):
            continue
        begin, end = tensor["data_offsets"]
        kept[name] = {**tensor, "data_offsets": [len(out), len(out) + end - begin]}
        out += data[begin:end]
    text = json.dumps(kept).encode()
    return struct.pack("<Q", len(text)) + text + out


class CommandTest(cli_test.CliTest):
    def ok(self, *arguments, **options):
        result = run(*arguments, **options)
        self.assertEqual(result.returncode, 0, result.stderr.decode())
        return result

    def plan_file(self, plan=PROBE_PLAN):
        path = self.dir / "mine.json"
        path.write_text(json.dumps(plan))
        return path


class Compare(CommandTest):
    def test_plans_beside_dense(self):
        model, plan, sheet = self.small_model(), self.plan_file(), self.out / "compare.png"
        report = json.loads(self.ok("compare", "red heart, noto style", "--plans", f"{plan},csla", "--seed", 5, "--model", model,
                                    "--cold", "-o", sheet, "--quiet", "--json").stdout)
        self.assertEqual([entry["plan"]["name"] for entry in report["plans"]], ["mine", "csla"])
        mine, csla = report["plans"]
        self.assertFalse(mine["equal"])
        self.assertGreater(mine["psnr"], 5)
        self.assertLess(mine["ssim"], 1)
        # No preset is sparse on seven scales: the same seed draws the same picture.
        self.assertTrue(csla["equal"])
        self.assertIsNone(csla["psnr"])
        self.assertEqual(csla["ssim"], 1)
        shares = [scale["share_of_pairs"] for scale in mine["scales"]]
        self.assertEqual(shares[:4], [1, 1, 1, 1])
        self.assertTrue(all(share < 1 for share in shares[5:]), shares)
        self.assertEqual(len(report["dense"]["scales"]), 7)
        width, height, _, texts = read_png(sheet)
        self.assertEqual(width, 3 * 128 + 4 * 8)
        self.assertGreater(height, 2 * 128)
        self.assertEqual((texts["prompt"], texts["seed"]), ("red heart, noto style", "5"))
        self.assertEqual([p["name"] for p in json.loads(texts["plans"])], ["mine", "csla"])

        # The pictures are those of generate.
        single = self.out / "dense.png"
        self.ok("generate", "red heart, noto style", "--attention", "dense", "--seed", 5, "--model", model, "-o", single, "--quiet")
        rows, of_sheet = read_png(single)[2], read_png(sheet)[2]
        self.assertEqual(len(rows), 128 * (1 + 3 * 128))
        self.assertGreater(len(of_sheet), 2 * len(rows))

    def test_the_report_for_people(self):
        model = self.small_model()
        text = self.ok("compare", "red apple", "--plans", self.plan_file(), "--model", model).stdout.decode()
        for word in ("dense", "mine", "PSNR", "SSIM", "dB", "16x16", "100.00 %", "Warm times"):
            self.assertIn(word, text)

    def test_bad_input(self):
        plan = self.plan_file()
        for arguments, code, *words in [
            ([], 2, "prompt"),
            (["red", "apple"], 2, "quote"),
            (["red", "--plans", "prob"], 2, "prob", "probe"),
            (["red", "--plans", "csla,,probe"], 2, "--plans"),
            (["red", "--plans", "none.json"], 1, "none.json"),
            (["red", "--plans", ",".join(["csla"] * 17)], 2, "17"),
            (["red", "--gain", "0"], 2, "--gain"),
            (["red", "-o", self.out / "a.jpg"], 2, ".png"),
            (["red", "-o", self.dir / "none" / "a.png"], 1, "does not exist"),
            (["red", "--plan", plan], 2, "--plan", "--plans"),
        ]:
            with self.subTest(arguments):
                self.assert_refused(run("compare", *arguments, cwd=self.out), code, *words)


class Plan(CommandTest):
    def test_the_published_figure(self):
        mask, exported = self.out / "mask.png", self.out / "plan.json"
        report = json.loads(self.ok("plan", "--model", cli_test.MODEL, "--attention", "csla", "--scale", 12, "-o", mask, "--export",
                                    exported, "--json").stdout)
        self.assertEqual((report["queries"], report["keys"]), (4096, 10521))
        self.assertEqual((report["by_block"]["computed"], report["by_block"]["all"]), (435, 2656))
        self.assertAlmostEqual(100 * report["by_block"]["sparsity"], 83.62, places=2)
        self.assertEqual((report["by_list"]["most"], round(report["by_list"]["mean"])), (746, 682))
        width, height, rows, texts = read_png(mask)
        self.assertLessEqual(width, 2048)
        self.assertGreaterEqual(height, 4096 // report["tokens_per_pixel"])
        self.assertEqual(json.loads(texts["plan"])["name"], "csla")
        again = json.loads(self.ok("plan", "--plan", exported, "--scale", 12, "--json").stdout)
        self.assertEqual(again["plan"], report["plan"])
        self.assertEqual(again["by_token"], report["by_token"])
        self.assertEqual(len(rows), height * (1 + 3 * width))

    def test_what_depends_on_the_picture(self):
        model, plan = self.small_model(), self.plan_file()
        text = self.ok("plan", "--model", model, "--plan", plan).stdout.decode()
        self.assertIn("the picture chooses 52 keys a tile", text)  # a tenth of 521
        self.assertIn("--prompt", text)
        static = json.loads(self.ok("plan", "--model", model, "--plan", plan, "--json").stdout)
        self.assertEqual((static["counted"], static["chosen_keys"]), ("static part", 52))
        seen = json.loads(self.ok("plan", "--model", model, "--plan", plan, "--prompt", "red apple", "-o", self.out / "a.png", "--json",
                                  "--quiet").stdout)
        self.assertEqual(seen["counted"], "picture")
        for name in ("least", "mean", "most"):
            self.assertGreaterEqual(seen["by_list"][name], static["by_list"][name])
        self.assertGreater(seen["by_list"]["mean"], static["by_list"]["mean"])
        self.assertLessEqual(seen["by_list"]["most"], static["by_list"]["most"] + 52)
        self.assertTrue((self.out / "a.png").exists())

    def test_geometries_and_layers(self):
        text = self.ok("plan", "--geometry", "infinity-8b", "--attention", "published", "--layer", 20).stdout.decode()
        self.assertIn("0 to 10 cs4a, 11 to 39 csla", text)
        self.assertIn("435 of 2656", text)

    def test_bad_input(self):
        for arguments, code, *words in [
            (["--scale", "13"], 2, "scale 13", "0 to 12"),
            (["--layer", "8"], 2, "layer 8", "0 to 7"),
            (["--show", "keys"], 2, "--show", "lists"),
            (["--tokens-per-pixel", "0"], 2, "--tokens-per-pixel"),
            (["--geometry", "infinity-9b"], 2, "infinity-9b", "infinity-8b"),
            (["--geometry", "infinity-8b", "--prompt", "a"], 2, "--geometry"),
            (["--export", self.out / "a.png"], 2, ".json"),
            (["--model", self.dir / "none"], 1, "none"),
            (["--attention", "csla", "--plan", "a.json"], 2, "--plan"),
            (["--scael", "3"], 2, "--scale"),
        ]:
            with self.subTest(arguments):
                self.assert_refused(run("plan", *arguments, cwd=self.out), code, *words)


class Reconstruct(CommandTest):
    def test_picture_bits_picture(self):
        picture, bits = self.out / "out.png", self.out / "bits.npz"
        report = json.loads(self.ok("reconstruct", FACE, "-o", picture, "--bits", bits, "--json").stdout)
        self.assertGreater(report["psnr"], 20)
        self.assertGreater(report["ssim"], 0.8)
        self.assertEqual(report["fitting"], "as it is")
        self.assertEqual(report["bits"], 16 * sum(n * n for n in [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64]))
        self.assertEqual(read_png(picture)[:2], (512, 512))
        with zipfile.ZipFile(bits) as archive:
            self.assertIsNone(archive.testzip())  # checksums
            self.assertEqual(archive.namelist()[0], "scales.npy")
            self.assertEqual(len(archive.namelist()), 14)
            content = archive.read("bits.s12.npy")
        self.assertEqual(content[:8], b"\x93NUMPY\x01\x00")
        size = struct.unpack("<H", content[8:10])[0]
        self.assertEqual((10 + size) % 64, 0)
        self.assertEqual(ast.literal_eval(content[10:10 + size].decode()),
                         {"descr": "|u1", "fortran_order": False, "shape": (64, 64, 16)})
        self.assertEqual(set(content[10 + size:]), {0, 1})
        self.assertEqual(len(content), 10 + size + 64 * 64 * 16)
        try:
            import numpy
        except ImportError:
            return
        with numpy.load(bits) as arrays:
            self.assertEqual(arrays["scales"].tolist()[-1], [64, 64])
            self.assertEqual(arrays["bits.s3"].shape, (6, 6, 16))
            self.assertEqual(arrays["bits.s12"].tobytes(), content[10 + size:])

    def test_fewer_scales_keep_less(self):
        model = self.small_model()
        quality = []
        for skip in (0, 2, 4):
            text = self.ok("reconstruct", FACE, "--model", model, "--skip-scales", skip, "-o", self.out / "a.png").stdout.decode()
            self.assertIn("resized (Lanczos) to 128x128", text)
            quality.append(float(re.search(r"PSNR +([0-9.]+) dB", text)[1]))
        self.assertEqual(sorted(quality, reverse=True), quality)

    def test_bad_input(self):
        model = self.model_copy("blind", vae__safetensors=without_encoder((cli_test.MODEL / "vae.safetensors").read_bytes()))
        (self.dir / "svg.png").write_text("<svg/>")
        out = self.out / "a.png"
        for arguments, code, *words in [
            ([FACE, "--model", model, "-o", out], 1, "blind", "no encoder", "--model"),
            ([FACE], 2, "-o"),
            (["-o", out], 2, "one picture"),
            ([FACE, FACE, "-o", out], 2, "2 were given"),
            ([self.dir / "none.png", "-o", out], 1, "none.png"),
            ([self.dir / "svg.png", "-o", out], 1, "svg.png"),
            ([FACE, "-o", out, "--skip-scales", "13"], 2, "13"),
            ([FACE, "-o", out, "--bits", self.out / "a.zip"], 2, ".npz"),
            ([FACE, "-o", FACE], 2, "is an input"),
        ]:
            with self.subTest(arguments):
                self.assert_refused(run("reconstruct", *arguments, cwd=self.out), code, *words)


class Bench(CommandTest):
    def test_attention_grid(self):
        report = json.loads(self.ok("bench", "attention", "--device", "cpu", "--attention", "csla,dense", "--scale", "5,6", "--dtype",
                                    "bf16,f32", "--threads", "1,2", "--heads", 1, "--dim", 16, "-r", 1, "--json", "--quiet").stdout)
        rows = report["rows"]
        self.assertEqual(len(rows), 16)
        self.assertEqual({(r["attention"], r["scale"], r["dtype"], r["threads"]) for r in rows},
                         {(a, s, d, t) for a in ("csla", "dense") for s in (5, 6) for d in ("bf16", "f32") for t in (1, 2)})
        self.assertTrue(report["machine"]["processor"])
        self.assertTrue(report["commit"])
        for row in rows:  # against double precision of the same inputs: rounding, and nothing else
            least, most = (1e-9, 1e-5) if row["dtype"] == "f32" else (1e-4, 4e-3)
            self.assertTrue(least < row["kernel_error"] < most, row)
            self.assertGreater(row["percent_of_floor"], 0)
        # The line of a row makes the row.
        again = self.ok(*rows[3]["command"].split()[1:], "--format", "csv", "--quiet").stdout.decode()
        row, = csv.DictReader(io.StringIO(again))
        for key in ("attention", "scale", "dtype", "queries", "keys", "command"):
            self.assertEqual(row[key], str(rows[3][key]), key)
        self.assertEqual(row["commit"], report["commit"])

    def test_dense_beside_sparse(self):
        text = self.ok("bench", "attention", "--device", "cpu", "--attention", "dense,probe,cs4a", "--scale", 10, "--heads", 1, "--dim", 32,
                       "-r", 1, "--format", "md", "--quiet").stdout.decode()
        table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
        self.assertEqual([row[0] for row in table[2:]], ["dense", "probe", "cs4a"])
        faster = table[0].index("against_dense")
        self.assertEqual(table[2][faster], "")
        self.assertGreater(float(table[3][faster]), 0)
        self.assertIn("`sparvar bench attention --device cpu --attention probe", table[3][-1])
        keys = table[0].index("kernel_keys")
        self.assertEqual(table[2][keys], "4121")
        self.assertLess(float(table[3][keys]), 1000)
        self.assertEqual(table[4][keys], "")  # the decision scale attends both ways

    def test_published_lists_of_cs4a(self):
        plan = REPOSITORY / "bench" / "cs4a-112.json"
        report = json.loads(self.ok("bench", "attention", "--device", "cpu", "--attention", plan, "--scale", 12, "--heads", 1, "--dim", 8,
                                    "-r", 1, "--json", "--quiet").stdout)
        self.assertEqual(report["rows"][0]["kernel_keys"], 2128)  # 784 chosen, 560 and 784 of windows: multiples of 112

    def test_model_and_tokenizer(self):
        model = self.small_model()
        report = json.loads(self.ok("bench", "model", "--model", model, "--attention", f"dense,{self.plan_file()}", "-r", 1, "--json",
                                    "--quiet").stdout)
        dense, mine = report["rows"]
        self.assertEqual(dense["attention"], "dense")
        self.assertAlmostEqual(mine["against_dense"], dense["total_s"] / mine["total_s"])
        report = json.loads(self.ok("bench", "tokenizer", "--model", model, "--dtype", "f32", "-r", 1, "--json", "--quiet").stdout)
        self.assertEqual(report["rows"][0]["width"], 128)
        self.assertGreater(report["rows"][0]["encode_s"], 0)

    def test_a_geometry_with_random_weights(self):
        config = json.loads((cli_test.MODEL / "config.json").read_text())
        config["scales"] = config["scales"][:5]
        (self.dir / "tiny.json").write_text(json.dumps(config))
        arguments = ["bench", "model", "--geometry", self.dir / "tiny.json", "--random-weights", "-r", 1, "--device", "cpu", "--quiet"]
        report = json.loads(self.ok(*arguments, "--json").stdout)
        self.assertEqual(len(report["scales"]), 5)
        self.assertGreater(report["parameters"], 1_000_000)
        self.assertIn("random parameters", self.ok(*arguments).stdout.decode())

    def test_orders_of_tokens(self):
        config = json.loads((cli_test.MODEL / "config.json").read_text())
        config["scales"] = config["scales"][:4]
        (self.dir / "tiny.json").write_text(json.dumps(config))
        rows = json.loads(self.ok("bench", "model", "--geometry", self.dir / "tiny.json", "--random-weights", "-r", 1, "--device", "cpu",
                                  "--quiet", "--token-order", "rows,2x3", "--json").stdout)["rows"]
        self.assertEqual([r["token_order"] for r in rows], ["rows", "2x3"])
        self.assertNotIn("--token-order", rows[0]["command"])
        again = json.loads(self.ok(*shlex.split(rows[1]["command"])[1:], "--json", "--quiet").stdout)
        self.assertEqual(again["token_order"], "2x3")
        rows = json.loads(self.ok("bench", "attention", "--device", "cpu", "--attention", "csla,probe", "--token-order", "rows,8x16", "--scale", 11,
                                  "--heads", 1, "--dim", 16, "-r", 1, "--quiet", "--json").stdout)["rows"]
        self.assertEqual([(r["token_order"], r["attention"]) for r in rows], [(o, a) for o in ("rows", "8x16") for a in ("csla", "probe")])
        self.assertEqual(rows[0]["kernel_keys"], rows[2]["kernel_keys"])
        self.assertTrue(all(1e-4 < r["kernel_error"] < 4e-3 for r in rows), rows)

    def test_the_whole_table_in_one_command(self):
        config = json.loads((cli_test.MODEL / "config.json").read_text())
        config["scales"] = config["scales"][:4]
        (self.dir / "tiny.json").write_text(json.dumps(config))
        grid = ["bench", "model", "-r", 1, "--device", "cpu", "--quiet", "--attention", "dense,csla", "--skip-scales", "0,1",
                "--uncond-until", "all,2"]
        for source in (["--geometry", self.dir / "tiny.json", "--random-weights"], ["--model", self.small_model()]):
            with self.subTest(source):
                rows = json.loads(self.ok(*grid, *source, "--weights", "bf16,fp8", "--json").stdout)["rows"]
                self.assertEqual([(r["weights"], r["skip_scales"], r["uncond_until"], r["attention"]) for r in rows],
                                 [(w, s, u, a) for w in ("bf16", "fp8") for s in (0, 1) for u in ("all", "2")
                                  for a in ("dense", "csla")])
                for r in rows:
                    if r["weights"] == "fp8":  # what the device does not run is marked, and does not end the table
                        self.assertIn("Hopper", r["refused"])
                        self.assertIsNone(r["total_s"])
                    else:
                        self.assertIsNone(r["refused"])
                        self.assertGreater(r["total_s"], 0)
                    self.assertEqual(r["against_dense"] is not None, r["weights"] == "bf16" and r["attention"] == "csla")
                # The line of a row makes the row; where nothing at all runs it is an error.
                again = json.loads(self.ok(*shlex.split(rows[7]["command"])[1:], "--json", "--quiet").stdout)
                again = again["rows"][0] if "rows" in again else again
                self.assertEqual((again["skip_scales"], again["uncond_until"], again["attention"]), (1, "2", "csla"))
                self.assert_refused(run(*shlex.split(rows[8]["command"])[1:], "--quiet", cwd=self.out), 2, "Hopper", "--weights bf16")

    def test_bad_input(self):
        for arguments, *words in [
            ([], "attention", "model", "tokenizer"),
            (["modle"], "did you mean model?"),
            (["model", "--geometry", "infinity-2b"], "--random-weights"),
            (["model", "--random-weights"], "--geometry"),
            (["attention", "--scale", "13"], "--scale 13", "0 to 12"),
            (["attention", "--scale", "1,x"], "--scale", "x"),
            (["attention", "--dtype", "f16"], "--dtype", "f16"),
            (["model", "--weights", "bf16,fp4"], "--weights", "fp4"),
            (["model", "--skip-scales", "3"], "--skip-scales", "0 to 2"),
            (["model", "--uncond-until", "5,x"], "--uncond-until", "x"),
            (["model", "--dtype", "f32", "--weights", "fp8", "--device", "cpu", "--quiet"], "--dtype bf16"),
            (["attention", "--format", "xml"], "--format", "csv"),
            (["attention", "--repaet", "3"], "bench attention", "--repeat"),
            (["attention", "--device", "gpu"], "gpu", "cuda"),
            (["attention", "--token-order", "8"], "--token-order", "HxW"),
            (["attention", "--token-order", "8x0"], "--token-order", "0"),
            (["model", "--token-order", "8x8", "--quiet"], "--token-order", "--geometry"),
            (["tokenizer", "more"], "more"),
        ]:
            with self.subTest(arguments):
                self.assert_refused(run("bench", *arguments, cwd=self.out), 2, *words)


class Declarations(CommandTest):
    def test_the_reference_is_up_to_date(self):
        made = self.ok("reference").stdout.decode()
        self.assertEqual(made, (REPOSITORY / "docs" / "commands.md").read_text(),
                         "run: build/release/apps/cli/sparvar reference > docs/commands.md")

    def complete(self, *words):
        """What bash offers for the last word."""
        (self.dir / "sparvar.bash").write_bytes(self.ok("completion", "bash").stdout)
        script = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _sparvar; printf "%s\\n" "${COMPREPLY[@]}"'
        result = subprocess.run(["bash", "-c", script, "bash", self.dir / "sparvar.bash", "sparvar", *words], capture_output=True,
                                text=True, check=True, cwd=self.out)
        self.assertEqual(result.stderr, "")
        return result.stdout.split()

    def test_completion(self):
        (self.out / "mine.json").write_text("{}")
        (self.out / "folder").mkdir()
        self.assertEqual(self.complete("rec"), ["reconstruct"])
        self.assertEqual(self.complete("bench", "to"), ["tokenizer"])
        self.assertEqual(self.complete("plan", "--exp"), ["--export"])
        self.assertEqual(self.complete("plan", "--attention", "csla"), ["csla", "csla-blocks"])
        self.assertEqual(self.complete("generate", "red apple", "--dtype", ""), ["f32", "bf16"])
        self.assertEqual(self.complete("generate", "--dtype", "=", "b"), ["bf16"])
        self.assertEqual(self.complete("compare", "red", "--plans", "dense,pro"), ["dense,probe"])
        self.assertEqual(self.complete("generate", "--plan", "mi"), ["mine.json"])
        self.assertEqual(self.complete("plan", "--model", ""), ["folder"])
        self.assertEqual(self.complete("bench", "model", "--geometry", "infinity-1"), ["infinity-125m"])
        self.assertEqual(self.complete("plan", "--scale", ""), [])
        self.assertIn("--skip-scales", self.complete("reconstruct", "a.png", "-"))

    def test_every_command_has_help(self):
        reference = (REPOSITORY / "docs" / "commands.md").read_text()
        for command in re.findall("^## (.*)$", reference, re.M):
            help_text = self.ok(*command.split(), "--help").stdout.decode()
            for flag in re.findall(r"^\| `(-[^` ]*)", reference.split(f"\n## {command}\n")[1].split("\n## ")[0], re.M):
                self.assertIn(flag, help_text, command)

    def test_bad_input(self):
        self.assert_refused(run("completion", "zsh"), 2, "zsh", "bash")
        self.assert_refused(run("completion"), 2, "bash")
        self.assert_refused(run("reference", "--markdown"), 2, "--markdown")


if __name__ == "__main__":
    cli_test.PROGRAM, cli_test.MODEL = os.path.abspath(sys.argv[1]), Path(sys.argv[2]).resolve()
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=2)
