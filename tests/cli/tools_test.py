#!/usr/bin/env python3
"""evaluate, analyze and tune as a user runs them: tools_test.py PROGRAM MODEL_DIR"""
import base64
import json
import os
import re
import shlex
import sys
import unittest
import xml.etree.ElementTree
from pathlib import Path

import cli_test
from cli_test import read_png, run
from commands_test import CommandTest


class Evaluate(CommandTest):
    def arguments(self, *more):
        prompts = self.dir / "prompts.txt"
        prompts.write_text("red apple, 3d style\nred <heart> & \"co\", noto style\n")
        return ["evaluate", "--prompts", prompts, "--model", self.small, "--threads", 1, "--dtype", "f32", "--worst", 1, *more]

    def setUp(self):
        super().setUp()
        self.small = self.small_model()
        self.plan = self.plan_file()
        self.report = self.out / "report"

    def read_report(self):
        return json.loads((self.report / "report.json").read_text())

    def test_report_and_page(self):
        plans = f"{self.plan},dense,dense+skip2+uncond4"
        printed = json.loads(self.ok(*self.arguments("--plans", plans, "-n", 2, "-o", self.report, "--json", "--quiet")).stdout)
        self.assertEqual(printed, self.read_report())
        self.assertTrue(printed["complete"])
        self.assertEqual(printed["machine"]["backend"].startswith("cpu"), printed["machine"]["why_no_gpu"] != "", "auto asks for a GPU")
        self.assertEqual([case["index"] for case in printed["cases"]], [0, 1, 2, 3])
        mine, dense, short = printed["variants"]
        self.assertEqual(short["name"], "dense+skip2+uncond4")
        self.assertEqual(dense["summary"]["equal"], 4)
        self.assertEqual(dense["summary"]["psnr"], {"mean": 100.0, "worst": 100.0, "deviation": 0.0})
        self.assertEqual(dense["summary"]["share_of_pairs"], 1)
        self.assertGreater(mine["summary"]["psnr"]["worst"], 5)
        self.assertLess(mine["summary"]["psnr"]["worst"], mine["summary"]["psnr"]["mean"])
        self.assertGreater(mine["summary"]["detail_error"]["mean"], 0)
        self.assertLess(mine["summary"]["share_of_pairs_last_scales"], 1)
        # Scales of 8x8 alone are left of the last three, and run without their unconditional half.
        tokens = [1, 4, 16, 36, 64, 144, 256]
        pairs = [n * sum(tokens[:k + 1]) for k, n in enumerate(tokens)]
        self.assertAlmostEqual(short["summary"]["share_of_pairs_last_scales"], pairs[4] / 2 / sum(pairs[4:]))
        self.assertAlmostEqual(short["summary"]["share_of_pairs"], (sum(pairs[:4]) + pairs[4] / 2) / sum(pairs))
        # A case is the picture that generate draws.
        worst = min(printed["cases"], key=lambda case: case["scores"][0]["psnr"])
        self.assertEqual(mine["worst"], [{"index": worst["index"], "picture": f"00-{worst['index']:05}.webp"}])
        kept = [entry["picture"] for variant in printed["variants"] for entry in variant["worst"]]
        self.assertEqual(sorted(path.name for path in (self.report / "worst").iterdir()), sorted(kept))
        page = (self.report / "index.html").read_text()
        pictures = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page)
        self.assertEqual(base64.b64decode(pictures[0]), (self.report / "worst" / kept[0]).read_bytes())
        self.assertNotIn("<heart>", page)
        self.assertNotRegex(page, r"(src|href)=\"(?!data:)")
        plots = re.findall(r"<svg.*?</svg>", page, re.S)
        self.assertEqual(len(plots), 2)
        for plot in plots:
            self.assertEqual(len(list(xml.etree.ElementTree.fromstring(plot).iter("circle"))), 3)

    def test_a_case_is_what_compare_draws(self):
        self.ok(*self.arguments("--plans", str(self.plan), "--seed", 5, "-o", self.report, "--quiet"))
        compared = json.loads(self.ok("compare", "red apple, 3d style", "--plans", self.plan, "--seed", 5, "--model", self.small, "--threads",
                                      1, "--dtype", "f32", "--cold", "--quiet", "--json").stdout)
        score = self.read_report()["cases"][0]["scores"][0]
        self.assertAlmostEqual(score["psnr"], compared["plans"][0]["psnr"], places=9)
        self.assertAlmostEqual(score["ssim"], compared["plans"][0]["ssim"], places=9)

    def test_goes_on_where_it_stopped(self):
        arguments = self.arguments("--plans", str(self.plan), "-o", self.report)
        self.ok(*arguments)
        whole = self.read_report()
        stopped = {**whole, "complete": False, "cases": whole["cases"][1:]}
        (self.report / "report.json").write_text(json.dumps(stopped))
        (self.report / "worst" / "00-00077.webp").write_bytes(b"left by a run that was stopped")
        again = self.ok(*arguments)
        self.assertIn("1/2 (warming up)", again.stderr.decode())
        now = self.read_report()
        self.assertEqual([case["index"] for case in now["cases"]], [0, 1])
        self.assertEqual(now["cases"][1], whole["cases"][1], "a case that was done is not drawn again")
        self.assertEqual(now["cases"][0]["scores"][0]["psnr"], whole["cases"][0]["scores"][0]["psnr"])
        self.assertFalse((self.report / "worst" / "00-00077.webp").exists())
        # Another seed is another report.
        other = run(*arguments, "--seed", 1)
        self.assertEqual(other.returncode, 2)
        self.assertIn("other settings", other.stderr.decode())
        self.assertEqual(self.read_report(), now)
        (self.report / "report.json").write_text("[1]")
        self.assertIn("not a report", run(*arguments).stderr.decode())

    def test_pruning_at_the_pairs_of_a_plan(self):
        plans = f"fastvar:0.4,fastvar={self.plan},fastvar={self.plan}+skip1,cs4a-nocache,{self.plan}"
        # Pruned from scale 8 on where a model has nine scales or more: the bundled one, cut to nine.
        config = json.loads((cli_test.MODEL / "config.json").read_text())
        config["scales"] = config["scales"][:9]
        self.small = self.model_copy("nine", config__json=json.dumps(config).encode())
        printed = json.loads(self.ok(*self.arguments("--plans", plans, "-o", self.report, "--json", "--quiet")).stdout)
        self.assertEqual((printed["machine"]["backend"][:3], printed["machine"]["why_no_gpu"]), ("cpu", ""), "where plans prune, the CPU is chosen")
        given, fitted, short, nocache, mine = printed["variants"]
        keeps = [variant["plan"]["pruning"]["keep"] for variant in printed["settings"]["variants"][:3]]
        self.assertEqual(keeps[0], [0.4])
        self.assertEqual(keeps[1], keeps[2])
        self.assertEqual(fitted["name"], f"fastvar={self.plan} (keeps {keeps[1][0]:g})")
        rule, = printed["settings"]["variants"][3]["plan"]["rules"]
        self.assertEqual((rule["method"], rule["residual"]), ("cs4a", False))
        self.assertLess(short["summary"]["share_of_pairs"], fitted["summary"]["share_of_pairs"])
        self.assertLess(given["summary"]["psnr"]["mean"], 100)

    def test_bad_input(self):
        out = self.out / "report"
        for arguments, code, *words in [
            (["--plans", "csla", "-o", out], 2, "--prompts"),
            (["--prompts", self.plan, "-o", out], 2, "--plans"),
            (["--prompts", self.plan, "--plans", "csla"], 2, "-o"),
            (["--prompts", self.plan, "--plans", "cslaa", "-o", out], 2, "did you mean csla?"),
            (["--prompts", self.plan, "--plans", "csla+skip3", "-o", out], 2, "0 to 2", "3"),
            (["--prompts", self.plan, "--plans", "csla+skp1", "-o", out], 2, "PLAN+skipN"),
            (["--prompts", self.plan, "--plans", "+skip1", "-o", out], 2, "no plan"),
            (["--prompts", self.plan, "--plans", "fastvar=", "-o", out], 2, "no plan behind ="),
            (["--prompts", self.plan, "--plans", "fastvar=prob", "-o", out], 2, "did you mean probe?"),
            (["--prompts", self.plan, "--plans", "fastvar=none.json", "-o", out], 1, "none.json"),
            (["--prompts", self.plan, "--plans", "fastvar:1.5", "-o", out], 2, "fastvar:1.5", "at most 1"),
            (["--prompts", self.plan, "--plans", "csla,fastvar:0.5", "--device", "cuda", "-o", out], 2, "fastvar:0.5", "--device cpu"),
            (["--prompts", self.plan, "--plans", "csla,csla", "-o", out], 2, "twice"),
            (["--prompts", self.dir / "none", "--plans", "csla", "-o", out], 1, "none"),
            (["--prompts", self.plan, "--plans", "none.json", "-o", out], 1, "none.json"),
            (["--prompts", self.plan, "--plans", "csla", "-o", self.out / "no" / "folder", "--model", self.small], 1, "make it first"),
        ]:
            with self.subTest(arguments):
                self.assert_refused(run("evaluate", *arguments, "--quiet"), code, *words)


class Analyze(CommandTest):
    def test_figures_and_maps(self):
        model = self.small_model()
        arguments = ["analyze", "red apple, 3d style", "red heart, noto style", "--model", model, "--threads", 1, "--side", 4, "--scales", "6,5"]
        report = json.loads(self.ok(*arguments, "-o", self.out, "--json", "--quiet").stdout)
        self.assertEqual(report, json.loads((self.out / "attention.json").read_text()))
        layers, heads = report["model"]["layers"], report["model"]["heads"]
        self.assertEqual([(r["layer"], r["scale"]) for r in report["results"]], [(layer, k) for layer in range(layers) for k in (5, 6)])
        for result in report["results"]:
            self.assertEqual(result["queries"], 32, "4x4 of each of two pictures")
            self.assertEqual(len(result["heads"]), heads)
            for head in result["heads"]:
                mass = head["mass_by_key_scale"]
                self.assertAlmostEqual(sum(mass), 1, places=4)
                self.assertAlmostEqual(sum(mass[:5]), head["sinks"], places=4)
                self.assertLessEqual(head["windows"], 1.00001 - head["sinks"])
                self.assertIsNone(head["similarity_by_key_scale"][0])
                self.assertTrue(all(-1 <= value <= 1 for value in head["similarity_by_key_scale"][1:] if value is not None))
                own = head["distances"][-1]
                self.assertEqual(own["key_scale"], result["scale"])
                self.assertAlmostEqual(sum(own["weight"]), mass[-1], places=4)
            mean = sum(head["sinks"] for head in result["heads"]) / heads
            self.assertAlmostEqual(result["mean"]["sinks"], mean, places=4)
            for i, value in enumerate(result["mean"]["similarity_by_key_scale"]):
                of_heads = [head["similarity_by_key_scale"][i] for head in result["heads"] if head["similarity_by_key_scale"][i] is not None]
                self.assertAlmostEqual(value, sum(of_heads) / len(of_heads), places=4) if of_heads else self.assertIsNone(value)
        self.assertEqual([row["layer"] for row in report["layers"]], list(range(layers)))
        for row in report["layers"]:
            for name in ("sinks", "windows", "similarity"):
                self.assertAlmostEqual(row[name], sum(r["mean"][name] for r in report["results"] if r["layer"] == row["layer"]) / 2, places=4)
        self.assertEqual(len(report["heat_maps"]), 2 * layers)
        width, height, _, texts = read_png(self.out / "layer-00-scale-06.png")
        self.assertGreater(height, heads * 16)
        self.assertEqual(texts["prompt"], "red apple, 3d style")
        text = self.ok(*arguments).stdout.decode()
        self.assertIn("scale 6 (16x16), means over heads", text)
        self.assertIn(f"{100 * report['results'][0]['mean']['sinks']:.1f} %", text)
        last = text.split("scales 5, 6, means over scales and heads\n")[1].splitlines()[layers]
        self.assertEqual(last.split()[:5:2], [str(layers - 1), "%", "%"])
        self.assertEqual(last.split()[-1], f"{report['layers'][-1]['similarity']:.3f}")

    def test_bad_input(self):
        prompts = self.dir / "prompts.txt"
        prompts.write_text("a\n")
        for arguments, code, *words in [
            ([], 2, "no prompt"),
            (["a", "-f", prompts], 2, "not from both"),
            (["a", "--scales", "13"], 2, "scale 13", "0 to 12"),
            (["a", "--side", "0"], 2, "--side", "1 to 64"),
            (["a", "-o", self.out / "none"], 1, "make it first"),
        ]:
            with self.subTest(arguments):
                self.assert_refused(run("analyze", *arguments, "--quiet", cwd=self.out), code, *words)


class Pruning(CommandTest):
    def test_a_plan_that_prunes_tokens(self):
        model = self.small_model()
        plan = self.plan_file({"name": "third", "rules": [], "pruning": {"first_scale": 5, "keep": [0.5, 0.25]}})
        report = json.loads(self.ok("compare", "red heart, noto style", "--plans", plan, "--model", model, "--cold", "--quiet", "--json").stdout)
        third, = report["plans"]
        self.assertFalse(third["equal"])
        self.assertEqual(third["plan"]["pruning"], {"first_scale": 5, "keep": [0.5, 0.25]})
        shares = [scale["share_of_pairs"] for scale in third["scales"]]
        self.assertEqual(shares[:5], [1] * 5)
        self.assertAlmostEqual(shares[5], 72 * (121 + 72) / (144 * 265))
        self.assertAlmostEqual(shares[6], 64 * (121 + 72 + 64) / (256 * 521))
        # Two pictures are what each is alone: their tokens are their own.
        arguments = ["generate", "red heart, noto style", "--plan", plan, "--model", model, "--quiet", "--threads", 1]
        self.ok(*arguments, "-n", 2, "-o", self.out)
        self.ok(*arguments, "--first-picture", 1, "-o", self.out / "alone.png")
        both = sorted(path for path in self.out.iterdir() if path.name != "alone.png")
        self.assertEqual(read_png(both[1])[2], read_png(self.out / "alone.png")[2])
        text = self.ok("plan", "--plan", plan, "--model", model).stdout.decode()
        self.assertIn("64 of 256 tokens run", text)

    def test_bad_input(self):
        plan = self.plan_file({"rules": [{"method": "probe", "scales": [4, -1]}], "pruning": {"first_scale": 5}})
        self.assert_refused(run("generate", "a", "--plan", plan, "-o", self.out / "a.png"), 1, "mine.json", "rule 0", "end at 4")
        self.assert_refused(run("bench", "attention", "--attention", "fastvar", "--quiet", "-r", 1), 2, "fastvar", "bench model")


class Tune(CommandTest):
    def prompts(self, name, *lines):
        path = self.dir / name
        path.write_text("\n".join(lines) + "\n")
        return path

    def test_a_plan_that_generate_takes(self):
        model, plan = self.small_model(), self.out / "plan.json"
        prompts = self.prompts("prompts.txt", "red apple, 3d style", "red heart, noto style", "rocket, noto style", "snowman, noto style")
        report = json.loads(self.ok("tune", "--prompts", prompts, "--target-psnr", 18, "--budget", 6, "--model", model, "--threads", 1,
                                    "-o", plan, "--json", "--quiet").stdout)
        self.assertEqual(json.loads(plan.read_text()), report["plan"])
        self.assertEqual(report["tuning_prompts"], ["red apple, 3d style", "rocket, noto style"])
        self.assertEqual(report["held_out_prompts"], ["red heart, noto style", "snowman, noto style"])
        self.assertGreaterEqual(report["chosen"]["held_out_psnr"], 18)
        self.assertEqual(report["chosen"]["held_out_pictures"], report["held_out_pictures"])
        self.assertGreaterEqual(len(report["tried"]), 2)
        dense, = [tried for tried in report["tried"] if set(tried["layers"]) == {"dense"}]
        self.assertEqual((dense["cost"], dense["tuning_psnr"]), (1, 100))
        self.assertLessEqual(report["chosen"]["cost"], 1)
        # The frontier: all on the same held-out pictures, each with its plan, and in the note of the file.
        frontier = report["frontier"]
        self.assertEqual([entry["cost"] for entry in frontier], sorted(entry["cost"] for entry in frontier))
        self.assertEqual({entry["held_out_pictures"] for entry in frontier}, {report["held_out_pictures"]})
        chosen, = [entry for entry in frontier if entry["chosen"]]
        self.assertEqual(chosen["plan"]["rules"], report["plan"]["rules"])
        for entry in frontier:
            self.assertLessEqual(entry["held_out_worst_psnr"], entry["held_out_psnr"])
            self.assertTrue(any(entry["name"] in line and f"{entry['held_out_worst_psnr']:.2f}" in line for line in report["plan"]["note"]), entry)
        # What it says of the plan is what compare says of it.
        drawn = self.ok("generate", "red apple, 3d style", "--plan", plan, "--model", model, "-o", self.out / "a.png", "--json").stdout
        self.assertEqual(json.loads(drawn)["plan"], report["plan"])
        self.assertNotIn("note", json.loads(read_png(self.out / "a.png")[3]["settings"])["plan"])

    def test_counted_trials_make_the_same_plan_again(self):
        model = self.small_model()
        prompts = self.prompts("prompts.txt", "red apple, 3d style", "red heart, noto style", "rocket, noto style", "snowman, noto style")
        found = []
        for name in ("a.json", "b.json"):
            found.append(json.loads(self.ok("tune", "--prompts", prompts, "--target-psnr", 24, "--trials", 60, "--model", model, "--threads", 1, "--dtype",
                                            "f32", "-o", self.out / name, "--json", "--quiet").stdout))
        first, second = found
        self.assertEqual((first["cost"], first["budget"]), ("pairs", {"trials": 60}))
        for result in found:
            for entry in [result["chosen"], *result["frontier"], *result["tried"]]:
                del entry["speed_up"]
        self.assertEqual(first["plan"]["rules"], second["plan"]["rules"])
        self.assertEqual(first["tried"], second["tried"])
        self.assertEqual(first["frontier"], second["frontier"])
        self.assertGreaterEqual(len(first["frontier"]), 2)

    def test_what_cannot_be_held_is_dense(self):
        model, plan = self.small_model(), self.out / "plan.json"
        prompts, others = self.prompts("a.txt", "red apple, 3d style"), self.prompts("b.txt", "red heart, noto style")
        # A high temperature: bits are close calls, so that no sparse plan draws all of them.
        text = self.ok("tune", "--prompts", prompts, "--held-out", others, "--target-psnr", 100, "--budget", 2, "--model", model,
                       "--tau", 2, "--threads", 1, "-o", plan).stdout.decode()
        self.assertEqual(json.loads(plan.read_text())["rules"], [])
        self.assertIn("dense attention does", text)
        self.assertRegex(text, r"> 100\.0 % .* dense\n")

    def test_bad_input(self):
        two, one, plan = self.prompts("two.txt", "a", "b"), self.prompts("one.txt", "a"), self.out / "plan.json"
        for arguments, code, *words in [
            (["-o", plan], 2, "--prompts"),
            (["--prompts", two], 2, "-o"),
            (["--prompts", two, "-o", self.out / "plan.txt"], 2, ".json"),
            (["--prompts", two, "-o", self.out / "none" / "plan.json"], 1, "make it first"),
            (["--prompts", one, "-o", plan], 2, "two or more"),
            (["--prompts", two, "--held-out", one, "-o", plan], 2, "'a' is in", "too"),
            (["--prompts", two, "-o", plan, "--target-psnr", "101"], 2, "1 to 100"),
            (["--prompts", two, "-o", plan, "--budget", "0"], 2, "--budget"),
            (["--prompts", two, "-o", plan, "--budget", "9", "--trials", "9"], 2, "--trials", "--budget"),
            (["--prompts", two, "-o", plan, "--cost", "money"], 2, "--cost", "money"),
        ]:
            with self.subTest(arguments):
                self.assert_refused(run("tune", *arguments, "--quiet", cwd=self.out), code, *words)


class ModelPlan(CommandTest):
    """plan.json in a model's folder is the plan of its pictures."""
    PLAN = {"name": "own", "note": ["for whoever reads it"], "rules": [{"scales": [4, -1], "method": "probe", "stride": 4, "share": 0.1}]}

    def draw(self, model, name, *arguments, **options):
        """The plan that it drew with, and the pixels."""
        file = self.out / name
        arguments = ["generate", "red apple, 3d style", "--seed", 4, "--tau", 2, "--threads", 1, *arguments, "--device", "cpu", "-o", file]
        report = json.loads(self.ok(*arguments, *(["--model", model] if model else []), "--json", "--quiet", **options).stdout)
        return report["plan"]["name"], read_png(file)[2]

    def test_it_is_the_default(self):
        model = self.small_model()
        without = self.draw(model, "without.png")
        self.assertEqual(without[0], "sparvar")
        self.assertNotIn("default plan", self.ok("info", "--model", model).stdout.decode())
        self.assertIsNone(json.loads(self.ok("info", "--model", model, "--json").stdout)["default_plan"])
        plan = model / "plan.json"
        plan.write_text(json.dumps(self.PLAN))
        own = self.draw(model, "own.png")
        self.assertEqual(own, self.draw(model, "named.png", "--plan", plan))
        self.assertEqual(own[0], "own")
        self.assertNotEqual(own[1], without[1])
        # Seven scales are dense by every preset.
        self.assertEqual(self.draw(model, "dense.png", "--attention", "dense"), ("dense", without[1]))
        self.assertEqual(self.draw(model, "wide.png", "--aspect", "2:1")[0], "own")
        self.assertEqual(self.draw(model, "larger.png", "--size", "0.25M")[0], "sparvar", "it counts the scales of the model's own size")
        self.assertIn("default plan  plan.json, own: scales 4 to 6 sparse (probe)", self.ok("info", "--model", model).stdout.decode())
        described = json.loads(self.ok("info", "--model", model, "--json").stdout)["default_plan"]
        self.assertEqual((described["name"], described["rules"][0]["stride"]), ("own", 4))
        compared = json.loads(self.ok("compare", "red apple", "--model", model, "--cold", "--quiet", "--json").stdout)
        self.assertEqual([entry["plan"]["name"] for entry in compared["plans"]], ["sparvar"])

    def test_a_picture_of_it_is_drawn_again(self):
        model = self.small_model()
        (model / "plan.json").write_text(json.dumps(self.PLAN))
        bundled = {"env": {**os.environ, "SPARVAR_MODEL": str(model)}}
        own = self.draw(None, "own.png", **bundled)
        command = json.loads(self.ok("info", self.out / "own.png", "--json", **bundled).stdout)["command"]
        self.assertNotRegex(command, "--plan|--attention|--model")
        words = shlex.split(command)
        self.ok(*words[1:-2], "--device", "cpu", "--threads", 1, "--quiet", "-o", self.out / "again.png", *words[-2:], **bundled)
        self.assertEqual(read_png(self.out / "again.png")[2], own[1])
        # Where the model has another plan by now, the picture's has to be named.
        (model / "plan.json").write_text(json.dumps({**self.PLAN, "name": "newer"}))
        self.assertIn("--plan PLAN.json", json.loads(self.ok("info", self.out / "own.png", "--json", **bundled).stdout)["command"])

    def test_bad_plans(self):
        model = self.small_model()
        plan = model / "plan.json"
        for content, *words in [
            ("{", "not JSON"),
            (json.dumps({"name": "x", "rules": [{"method": "crosswise"}]}), "rule 0", "crosswise", "csla"),
            (json.dumps({"rules": [{"method": "csla"}, {"layers": [4, 40], "method": "csla"}]}), "rule 1: layer 40", "0 to 7"),
            (json.dumps({"rules": [{"layers": [8, -1], "method": "csla"}]}), "rule 0: layer 8", "0 to 7"),
        ]:
            plan.write_text(content)
            for command in (["generate", "red", "-o", self.out / "a.png"], ["info"]):
                with self.subTest(content=content, command=command):
                    self.assert_refused(run(*command, "--model", model, "--quiet"), 1, "plan.json", *words)
        # It is in nobody's way where another plan is named.
        self.assertEqual(self.draw(model, "dense.png", "--attention", "dense")[0], "dense")
        (self.out / "dense.png").unlink()
        plan.unlink()
        plan.symlink_to(self.dir / "nowhere")
        self.assert_refused(run("generate", "red", "--model", model, "--quiet", "-o", self.out / "a.png"), 1, "plan.json", "no such plan file")
        plan.unlink()
        plan.mkdir()
        self.assert_refused(run("generate", "red", "--model", model, "--quiet", "-o", self.out / "a.png"), 1, "plan.json", "found a folder")


if __name__ == "__main__":
    cli_test.PROGRAM, cli_test.MODEL = os.path.abspath(sys.argv[1]), Path(sys.argv[2]).resolve()
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=2)
