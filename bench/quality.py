#!/usr/bin/env python3
"""Makes the part of docs/benchmarks.md on what sparse pictures are worth: plans against dense attention on 100 prompts that
no plan was searched on (bench/prompts/held-out.txt).

    bench/quality.py                                   # the bundled model, an hour on two cores with AVX-512-BF16
    bench/quality.py --model DIR --plan tuned.json     # another model, with a plan that `sparvar tune` found for it
    bench/quality.py --first 4                         # a look at four prompts: printed, the document stays
    bench/quality.py --drawn report.json --first 10    # quality as `sparvar evaluate` measured it on a GPU, times of ten prompts here

For the last line, on the GPU: sparvar evaluate --device cuda --prompts bench/prompts/held-out.txt --seed 1000 --plans ... -o DIR

Started again, it goes on where it was stopped: results are kept in build/bench, in a folder for each model, commit and settings.
"""
import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import tables

ROOT = Path(__file__).resolve().parents[1]
PART = "bench/quality.py"
PRESETS = ["csla", "csla-blocks", "published", "cs4a-rows", "cs4a", "cs4a-nocache", "probe", "sparvar"]
TRIED_RATIOS = (0.2, 0.5, 0.8)  # of FastVAR, to find the one that takes as long as the plan beside it
TRIED_PICTURES = 3


def arguments_of(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (the bundled one)")
    parser.add_argument("--plan", type=Path, action="append", default=[],
                        help="a plan of the model's own, in a row of its own; may be given again. The last one is what FastVAR is fitted to and what is drawn with scales skipped (the preset sparvar)")
    parser.add_argument("--presets", type=lambda names: names.split(","), default=PRESETS, help=f"rows of presets ({','.join(PRESETS)})")
    parser.add_argument("--prompts", type=Path, default=ROOT / "bench" / "prompts" / "held-out.txt", help="one prompt a line")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N prompts; without --drawn the table is printed")
    parser.add_argument("--drawn", type=Path, metavar="REPORT", help="report.json of an `evaluate` over all prompts: a table of its own, before that of the pictures drawn here")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--device", default="cpu", help="of the program (cpu: FastVAR runs nowhere else)")
    parser.add_argument("--threads", type=int, help="of the CPU (all cores)")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f32"])
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "bench", help="where results are kept")
    parser.add_argument("--program", type=Path, help="the program (built first: build/release/apps/cli/sparvar)")
    return parser.parse_args(argv)


def build():
    subprocess.run(["cmake", "--preset", "release"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", "--preset", "release", "--target", "sparvar"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return ROOT / "build" / "release" / "apps" / "cli" / "sparvar"


class Program:
    """`sparvar evaluate` with what is the same in all runs."""

    def __init__(self, path, options):
        self.path, self.options = path, options
        self.model = ["--model", options.model] if options.model else []

    def json(self, *arguments):
        done = subprocess.run([str(self.path), *map(str, arguments)], stdout=subprocess.PIPE, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        return json.loads(done.stdout)

    def info(self):
        return self.json("info", *self.model, "--device", "cpu", "--json", "--quiet")

    def evaluate(self, prompts, plans, folder):
        o = self.options
        threads = ["--threads", o.threads] if o.threads else []
        return self.json("evaluate", *self.model, *threads, "--device", o.device, "--dtype", o.dtype, "--prompts", prompts,
                         "--seed", o.seed, "--plans", ",".join(plans), "-o", folder, "--json")


def ratio_of_time(times, seconds):
    """The share of tokens at which FastVAR takes `seconds`, between {share: seconds}, in twentieths."""
    points = sorted(times.items())
    for (a, ta), (b, tb) in zip(points, points[1:]):
        if seconds <= tb or (b, tb) == points[-1]:
            share = a + (b - a) * (seconds - ta) / (tb - ta) if tb > ta else b
            return min(1.0, max(0.05, round(20 * share) / 20))
    raise ValueError("two shares are needed")


def fastvar_ratio(program, prompts, best, folder):
    """Measured once a folder: times differ from run to run, and a run that goes on must draw the same plans."""
    kept = folder / "fastvar-ratio.json"
    if not kept.exists():
        few = folder / "few-prompts.txt"
        few.write_text("\n".join(prompts[:TRIED_PICTURES]) + "\n", encoding="utf-8")
        report = program.evaluate(few, [best, *(f"fastvar:{r}" for r in TRIED_RATIOS)], folder / "fastvar-ratio")
        first, *others = [variant["summary"]["seconds"] for variant in report["variants"]]
        kept.write_text(json.dumps({"ratio": ratio_of_time(dict(zip(TRIED_RATIOS, others)), first)}))
    return json.loads(kept.read_text())["ratio"]


def plans_of(options, best, ratio, scales):
    """Rows of the table. Guidance that is dropped late ends where the plans become sparse."""
    late = f"+skip2+uncond{max(1, scales - 3)}"
    own = [str(plan) for plan in options.plan]
    return [*options.presets, *own, f"fastvar={best}", f"fastvar:{ratio:g}", f"published{late}", f"{best}{late}"]


def print_part(report, drawn, options, prompts, best):
    print("## What sparse pictures are worth\n")
    if drawn:
        print_table(drawn, options, drawn["settings"]["prompts"])
    print_table(report, options, prompts)
    print(f"\n`fastvar={label(best)}` prunes tokens until as many pairs are computed as by `{label(best)}`; the other `fastvar` takes about as long. "
          "`+skip2`: the last two scales are left out; `+uncondN`: guidance ends at scale N.\n")


def print_table(report, options, prompts):
    settings, machine = report["settings"], report["machine"]
    name = Path(report["model"]["folder"]).name
    dense = report["variants"][0]["summary"]["dense_seconds"]
    print(f"Made by `bench/quality.py` on {time.strftime('%Y-%m-%d')}: {machine['processor']}, {machine['backend']}; commit {report['commit']}; model {name} "
          f"({report['model']['hash']}), {settings['dtype']}.")
    print(f"{len(report['cases'])} pictures of {len(prompts)} prompts (`{shown(options.prompts)}`, seed {settings['seed']}) against dense ones of the same seed, {dense:.3g} s each. "
          "Pairs: query-key pairs computed at the last three scales, of dense attention's; dense decision scales and probes are counted. "
          "Detail error: RMS difference of fine detail in 8-bit levels. Times are medians of whole pictures, drawn in turn with dense ones on the same device.\n")
    tables.header("plan", "pairs", "PSNR dB", "worst", "±", "SSIM", "worst", "detail error", "s a picture", "against dense")
    for variant in report["variants"]:
        s = variant["summary"]
        tables.row(f"`{label(variant['name'])}`", f"{100 * s['share_of_pairs_last_scales']:.1f} %", f"{s['psnr']['mean']:.2f}", f"{s['psnr']['worst']:.2f}",
                   f"{s['psnr']['deviation']:.2f}", f"{s['ssim']['mean']:.4f}", f"{s['ssim']['worst']:.4f}", f"{s['detail_error']['mean']:.2f}",
                   f"{s['seconds']:.3g}", f"{s['speed_up']:.2f}x")
    print()


def shown(path):
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name


def label(name):
    """A plan's file without its folders."""
    for part in name.replace("=", " ").replace("+", " ").split():
        if "/" in part:
            name = name.replace(part, Path(part).name)
    return name


def key_of(options, prompts):
    """Of all that the figures depend on, the commit included: a run with another key has a folder of its own."""
    plans = [plan.read_text(encoding="utf-8") for plan in options.plan]
    settings = [tables.commit(), prompts, options.presets, plans, options.seed, options.device, options.threads, options.dtype]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


def main(argv):
    options = arguments_of(argv)
    for plan in options.plan:
        if not plan.name.endswith(".json") or "," in str(plan):
            sys.exit(f"{plan}: a plan is a file NAME.json, without a comma")
    drawn = json.loads(options.drawn.read_text(encoding="utf-8")) if options.drawn else None
    program = Program(options.program or build(), options)
    prompts = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()][:options.first]
    info = program.info()
    if drawn and drawn["model"]["hash"] != info["model"]["hash"]:
        sys.exit(f"{options.drawn}: drawn by a model of hash {drawn['model']['hash']}; this one has {info['model']['hash']}")
    best = str(options.plan[-1]) if options.plan else "sparvar"
    folder = options.results / f"quality-{info['model']['hash'][:12]}-{key_of(options, prompts)}"
    folder.mkdir(parents=True, exist_ok=True)
    used = folder / "prompts.txt"
    used.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    ratio = fastvar_ratio(program, prompts, best, folder)
    report = program.evaluate(used, plans_of(options, best, ratio, len(info["model"]["scales"])), folder / "report")
    document = "-" if options.first and not drawn else str(options.document)
    tables.put_part(document, PART, lambda: print_part(report, drawn, options, prompts, best))
    print(f"{folder / 'report' / 'index.html'}\n{document if document != '-' else ''}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
