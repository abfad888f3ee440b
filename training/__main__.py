"""python -m training STAGE ...: one command per stage."""

import argparse
import sys
from pathlib import Path

from .errors import TrainingError

HERE = Path(__file__).parent


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)

    def stage(name: str, text: str) -> argparse.ArgumentParser:
        sub = stages.add_parser(name, help=text, description=text)
        sub.add_argument("--preset", default="emoji", help="emoji (the bundled model) or tiny (tests)")
        return sub

    def where(sub: argparse.ArgumentParser, needs_data: bool = True) -> None:
        sub.add_argument("--data", type=Path, required=needs_data, help="folder of SOURCE.jsonl.xz")
        sub.add_argument("--work", type=Path, default=Path("out/training-work"), help="pictures and full checkpoints")
        sub.add_argument("--out", type=Path, default=Path("out/training-run"), help="compact checkpoint, log, sheets")
        sub.add_argument("--resume", type=Path, help="compact checkpoint of an earlier run")
        sub.add_argument("--tokenizer", type=Path, help="sentencepiece model (default: WORK/spiece.model)")
        sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
        sub.add_argument("--workers", type=int, help="processes that render (default: all cores)")
        sub.add_argument("--processes", type=int, help="processes that train (default: one for each GPU)")
        sub.add_argument("--budget", type=float, default=1.0, help="share of the preset's seconds that stages take")
        sub.add_argument("--list-limit", type=int, help="names of each list that evaluation uses (default: all)")

    sub = stage("lists", "writes the lists of names that evaluation uses into the package")
    sub.add_argument("--data", type=Path, required=True)
    sub = stage("render", "draws the SVG files")
    where(sub)
    sub = stage("tokenizer", "trains the sentencepiece model on captions")
    where(sub)
    for name, text in (("vae", "trains the BSQ-VAE"), ("transformer", "trains text encoder and transformer")):
        sub = stage(name, f"{text}, continuing what is there")
        where(sub)
        sub.add_argument("--seconds", type=float, default=1e9, help="at most so long (default: to the end)")
    sub = stage("run", "all stages in turn, continuing what is there, for a number of seconds")
    where(sub)
    sub.add_argument("--seconds", type=float, required=True)
    sub = stage("evaluate", "measures a trained model against its bars")
    where(sub)
    sub = stage("export", "writes the engine's model folder")
    sub.add_argument("--checkpoint", type=Path, required=True, help="folder with vae-* and ar-*.safetensors")
    sub.add_argument("--tokenizer", type=Path, required=True)
    sub.add_argument("--dtype", default="bf16", help="bf16, int8 (per row; text encoder and transformer) or f32")
    sub.add_argument("--cfg", type=float, help="default guidance (default: the report's beside the checkpoint, else 4)")
    sub.add_argument("--tau", type=float, help="default temperature (likewise, else 0.7)")
    sub.add_argument("-o", "--output", type=Path, required=True)
    sub = stage("fixture", "writes expected tensors of an exported model for the engine's `conformance`")
    sub.add_argument("--model", type=Path, required=True)
    sub.add_argument("--thin", action="store_true", help="small: the picture of the first prompt alone")
    sub.add_argument("-o", "--output", type=Path, required=True)
    sub = stage("card", "writes the model card into an exported model's folder")
    sub.add_argument(
        "--checkpoint", type=Path, required=True, help="with report.json, sheet-36.jpg, state.json, log.jsonl"
    )
    sub.add_argument("--model", type=Path, required=True)
    sub.add_argument("--machine", default="one H100", help="what it was trained on")
    sub.add_argument("--limit", type=int, help="bytes that the model folder may have: the sample sheet is made to fit")
    sub = stage("curves", "draws the training log")
    sub.add_argument("--log", type=Path, required=True)
    sub.add_argument("-o", "--output", type=Path, required=True)
    return parser


def _run_stages(arguments: argparse.Namespace) -> None:
    """The stages that train, render or evaluate."""
    from .checkpoint import Folders
    from .config import preset
    from .data import read_drawings
    from .render import render
    from .run import Run, run_all
    from .tokens import train_tokenizer

    if arguments.budget <= 0:
        raise TrainingError(f"--budget {arguments.budget:g}: must be above 0", 2)
    chosen = preset(arguments.preset).with_budget(arguments.budget)
    tokenizer = arguments.tokenizer or arguments.work / "spiece.model"
    if arguments.stage == "render":
        size = chosen.pixels
        render(read_drawings(arguments.data), arguments.work / f"pictures-{size}", size, arguments.workers)
        return
    if arguments.stage == "tokenizer":
        train_tokenizer(read_drawings(arguments.data), tokenizer, chosen.text.vocab)
        return
    run = Run(
        chosen, arguments.data, tokenizer, Folders(arguments.work, arguments.out, arguments.resume),
        getattr(arguments, "seconds", 1e9), arguments.device, arguments.workers, arguments.list_limit, arguments.stage,
        arguments.processes,
    )  # fmt: skip
    run_all(run)


def _export(arguments: argparse.Namespace) -> None:
    import json

    from .config import preset
    from .export import export_model
    from .sampling import Settings

    report = arguments.checkpoint / "report.json"
    defaults = json.loads(report.read_text())["defaults"] if report.exists() else {"cfg": 4.0, "tau": 0.7}
    settings = Settings(cfg=arguments.cfg or defaults["cfg"], tau=arguments.tau or defaults["tau"])
    done = export_model(
        preset(arguments.preset), arguments.checkpoint, arguments.tokenizer, arguments.output, settings, arguments.dtype
    )
    error = f", largest relative error of a matrix {done.worst_error:.4f}" if arguments.dtype == "int8" else ""
    print(f"{arguments.output}: {done.size / 1e6:.2f} MB, cfg {settings.cfg:g}, tau {settings.tau:g}{error}")


def _lists(arguments: argparse.Namespace) -> None:
    from .data import LISTS, make_lists, read_drawings
    from .files import write_bytes

    for name, keys in make_lists(read_drawings(arguments.data)).items():
        head = f"# {len(keys)} keys style/name, fixed by a seed: python -m training lists --data DIR\n"
        write_bytes(LISTS / f"{name}.txt", (head + "\n".join(keys) + "\n").encode())
        print(f"{LISTS / f'{name}.txt'}: {len(keys)}")


def _main(arguments: argparse.Namespace) -> None:
    if arguments.stage == "export":
        _export(arguments)
    elif arguments.stage == "lists":
        _lists(arguments)
    elif arguments.stage == "fixture":
        from .config import preset
        from .fixture import write_fixture

        write_fixture(preset(arguments.preset), arguments.model, arguments.output, thin=arguments.thin)
    elif arguments.stage == "card":
        from .card import write_card

        write_card(arguments.checkpoint, arguments.model, arguments.machine, arguments.limit)
    elif arguments.stage == "curves":
        from .curves import draw_curves

        draw_curves(arguments.log, arguments.output)
    else:
        _run_stages(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 the command line asks for something impossible, 130 Ctrl-C."""
    try:
        _main(_parser().parse_args(arguments))
    except TrainingError as error:
        print(f"training: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"training: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("training: stopped; the last checkpoint holds", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
