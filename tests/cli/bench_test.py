#!/usr/bin/env python3
"""The lists of prompts and the table of sparse quality, as bench/ makes them: bench_test.py PROGRAM MODEL_DIR"""
import json
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

import cli_test
from commands_test import REPOSITORY, CommandTest

sys.path.insert(0, str(REPOSITORY / "bench"))
import quality  # noqa: E402

DOCUMENT = "before\n<!-- bench/quality.py: begin -->\nold\n<!-- bench/quality.py: end -->\nafter\n"


class Prompts(CommandTest):
    def test_lists_are_what_the_script_makes(self):
        made = subprocess.run([sys.executable, REPOSITORY / "bench" / "prompts.py", self.out], check=True, capture_output=True).stdout.decode()
        self.assertIn("held-out.txt: 100 prompts", made)
        names = {}
        for file in ("tuning", "held-out"):
            committed = (REPOSITORY / "bench" / "prompts" / f"{file}.txt").read_text()
            self.assertEqual((self.out / f"{file}.txt").read_text(), committed, "run: bench/prompts.py")
            names[file] = [prompt.rsplit(", ", 1)[0] for prompt in committed.splitlines()]
        self.assertEqual(len(set(names["held-out"])), 100)
        self.assertGreaterEqual(len(set(names["tuning"])), 30)
        self.assertFalse(set(names["held-out"]) & set(names["tuning"]))


class Quality(CommandTest):
    def quality(self, *arguments):
        done = subprocess.run([sys.executable, REPOSITORY / "bench" / "quality.py", "--program", cli_test.PROGRAM, "--results", self.out / "results",
                               "--prompts", self.prompts, "--document", self.document, *map(str, arguments)], capture_output=True, timeout=600)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return done

    def setUp(self):
        super().setUp()
        config = json.loads((cli_test.MODEL / "config.json").read_text())
        config["scales"] = config["scales"][:9]
        self.model = self.model_copy("nine", config__json=json.dumps(config).encode())
        self.prompts, self.document = self.dir / "prompts.txt", self.dir / "benchmarks.md"
        self.prompts.write_text("red apple, 3d style\nred heart, noto style\n")
        self.document.write_text(DOCUMENT)

    def test_the_table(self):
        plan = self.plan_file({"name": "mine", "rules": [{"scales": [8, -1], "method": "probe", "stride": 4, "share": 0.1}]})
        arguments = ["--model", self.model, "--plan", plan, "--threads", 1, "--presets", "csla,probe"]
        self.quality(*arguments)
        text = self.document.read_text()
        self.assertTrue(text.startswith("before\n<!--") and text.endswith("-->\nafter\n"), text)
        self.assertIn("2 pictures of 2 prompts", text)
        names = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
        self.assertEqual(names[:3], ["csla", "probe", "mine.json"])
        self.assertRegex(names[3], r"^fastvar=mine\.json \(keeps 0\.\d+\)$")
        self.assertRegex(names[4], r"^fastvar:[01][.\d]*$")
        self.assertEqual(names[5:], ["published+skip2+uncond6", "mine.json+skip2+uncond6"])
        pairs = [float(line.split("|")[2].split("%")[0]) for line in text.splitlines() if line.startswith("| `")]
        self.assertAlmostEqual(pairs[2], pairs[3], delta=0.5, msg="FastVAR computes as many pairs as the plan")
        report, = (self.out / "results").glob("quality-*/report/report.json")

        # A run that was stopped goes on: what is there is not drawn again.
        whole = json.loads(report.read_text())
        report.write_text(json.dumps({**whole, "complete": False, "cases": whole["cases"][:1]}))
        self.document.write_text(DOCUMENT)
        again = self.quality(*arguments)
        self.assertIn("1/2 (warming up)", again.stderr.decode())
        self.assertEqual(json.loads(report.read_text())["cases"][0], whole["cases"][0])
        self.assertIn("2 pictures of 2 prompts", self.document.read_text())

        # A look at a few leaves the document alone.
        self.document.write_text(DOCUMENT)
        printed = self.quality(*arguments, "--first", 1).stdout.decode()
        self.assertIn("1 pictures of 1 prompts", printed)
        self.assertEqual(self.document.read_text(), DOCUMENT)

    def test_rows_are_the_programs_presets(self):
        known = subprocess.run([cli_test.PROGRAM, "completion", "bash"], capture_output=True, text=True, check=True).stdout
        self.assertLessEqual(set(quality.PRESETS), set(re.split(r"[^\w-]+", known)))
        rows = quality.plans_of(quality.arguments_of(["--plan", "mine.json"]), "mine.json", 0.5, 9)
        self.assertEqual(rows, [*quality.PRESETS, "mine.json", "fastvar=mine.json", "fastvar:0.5", "published+skip2+uncond6",
                                "mine.json+skip2+uncond6"])

    def test_the_share_that_takes_as_long(self):
        times = {0.2: 1.0, 0.5: 2.0, 0.8: 4.0}
        for seconds, share in [(1.0, 0.2), (1.5, 0.35), (3.0, 0.65), (0.5, 0.05), (5.0, 0.95), (9.0, 1.0), (0.1, 0.05)]:
            self.assertAlmostEqual(quality.ratio_of_time(times, seconds), share, msg=seconds)


if __name__ == "__main__":
    cli_test.PROGRAM, cli_test.MODEL = os.path.abspath(sys.argv[1]), Path(sys.argv[2]).resolve()
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=2)
