"""python -m fractalnet: train a recipe, evaluate a checkpoint, take a network elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from fractal_kernels import BackendUnavailable
from fractal_kernels.schedule import MAX_COLUMNS

from . import anytime, config, evaluate, export, outputs, plots, probes, study, trained
from .files import Stopped, UserError, folder_for, require, write

EPILOG = """Every value of a recipe is an option: --epochs 2 --batch-size 50 --optimizer AdamW --optimizer.lr 1e-3 ...
All of them: python -m fractalnet train --options. SIGTERM writes a checkpoint and exits with 0, Ctrl-C with 130."""


class Parser(argparse.ArgumentParser):
    """Options in full only, and errors that list what exists."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def options(self) -> str:
        return ", ".join(o for action in self._actions for o in action.option_strings if o.startswith("--"))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole(least: int):
    """A whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
        return value

    return parse


def run_train(arguments: argparse.Namespace, rest: list[str]) -> None:
    """`rest`: the recipe, if it comes first, and its options, which jsonargparse knows."""
    first = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if arguments.options:
        print(config.parser().format_help().rstrip())
        return
    if first and arguments.recipe:
        raise UserError(f"--recipe: expected one recipe, got {first!r} and {arguments.recipe!r}")
    name, out = first or arguments.recipe, arguments.out
    if name is None and arguments.resume and out:
        name = str(out / "config.yaml")  # what the run was begun with
    if name is None and arguments.resume:
        raise UserError("--resume: expected a RECIPE, or --out DIR, the folder of the run")
    if name is None:
        raise UserError(f"expected a RECIPE: {', '.join(config.recipes())}, or a YAML file")
    found, plain = config.load(name, rest, arguments.parser.options())
    name = config.known_as(name)
    if arguments.dry_run:
        from .summary import dry_run

        print(dry_run(found, plain, name))
        return
    from . import train

    out = out or Path("runs") / name.replace("/", "-")
    train.run(found, plain, name, out, arguments.resume, arguments.overwrite)


def run_eval(arguments: argparse.Namespace) -> None:
    model, content = trained.unpack(arguments.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    with contextlib.closing(trained.holdout(content, arguments.root, arguments.crops, device)) as loader:
        found = evaluate.scores(model, trained.views(loader, arguments.crops))
        x, _ = next(iter(trained.views(loader, arguments.crops)))
        x = x[0] if x.dim() == 5 else x  # one view of every image
    print(evaluate.table(evaluate.measure(model, found, x, loader.count)))


def run_anytime(arguments: argparse.Namespace) -> None:
    if arguments.out:
        require("matplotlib")
    model, content = trained.unpack_fractal(arguments.checkpoint)
    split, device = trained.split(content, arguments.root), "cuda" if torch.cuda.is_available() else "cpu"
    x, y = split.test_x.to(device), split.test_y.to(device)
    model.to(device)
    print(anytime.answers_table(anytime.answers(model, x, y), len(y)))
    with folder_for(arguments.out) if arguments.out else contextlib.nullcontext():
        rows = anytime.exits(model, x, y)
        print(f"\n{anytime.exits_table(rows, len(y))}")
        if arguments.out:
            found = {"images": len(y), **study.machine(), "rows": rows}
            write(arguments.out, {"anytime.json": outputs.as_json(found), "anytime.png": plots.early_exit(rows)})


def run_compare(arguments: argparse.Namespace) -> None:
    table = outputs.compare(outputs.found(arguments.runs))
    if not table:
        raise UserError(f"{arguments.runs}: expected folders of finished runs of the paper's recipes, found none")
    print(table)


def run_depth(arguments: argparse.Namespace) -> None:
    given = (arguments.columns, arguments.epochs, arguments.seeds, arguments.lr, arguments.kinds)
    study.depth(*given, arguments.out or Path("runs/depth"))


def run_statistics(arguments: argparse.Namespace) -> None:
    study.statistics(arguments.epochs, arguments.seeds, arguments.out or Path("runs/statistics"))


def run_probes(arguments: argparse.Namespace) -> None:
    probes.run(arguments.checkpoint, arguments.root, arguments.out or Path("runs/probes"))


def listed(parse: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    """One or more of these, with commas between them, each once."""

    def parse_all(text: str) -> tuple[object, ...]:
        return tuple(dict.fromkeys(parse(part) for part in text.split(",")))

    return parse_all


def count(text: str) -> int:
    value = whole(1)(text)
    if value > MAX_COLUMNS:
        raise argparse.ArgumentTypeError(f"expected whole numbers from 1 to {MAX_COLUMNS}, got {text!r}")
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def kind(text: str) -> str:
    if text not in study.KINDS:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(study.KINDS)}, got {text!r}")
    return text


def add_checkpoint(command: argparse.ArgumentParser, images: bool = False) -> None:
    command.add_argument("--checkpoint", type=Path, metavar="FILE", required=True, help="a model.pt of train")
    if images:
        text = "where its images are, if not where they were in training"
        command.add_argument("--root", type=Path, metavar="DIR", help=text)


def add_studies(commands: argparse._SubParsersAction) -> None:
    top = commands.add_parser("study", help="properties of the paper on real data: depth, probes, statistics")
    top.set_defaults(parser=top)
    studies = top.add_subparsers(dest="study", required=True, metavar="STUDY", parser_class=Parser)
    out = {"type": Path, "metavar": "DIR"}
    seeds = {"type": listed(whole(0)), "metavar": "S,S", "help": "of weights, batches and paths (default: 0)"}
    command = studies.add_parser("depth", help="plain and fractal networks of growing depth, trained alike")
    columns = {"type": listed(count), "metavar": "C,C", "help": "(default: 1,2,3,4,5,6)"}
    command.add_argument("--columns", default=tuple(range(1, 7)), **columns)
    kinds = f"some of {', '.join(study.KINDS)} (default: {','.join(study.DEFAULT_KINDS)})"
    command.add_argument("--kinds", type=listed(kind), metavar="K,K", default=study.DEFAULT_KINDS, help=kinds)
    command.add_argument("--epochs", type=whole(1), metavar="N", default=study.EPOCHS, help="(default: %(default)s)")
    command.add_argument("--lr", type=positive, metavar="X", default=study.LR, help="(default: %(default)s)")
    command.add_argument("--seeds", default=(0,), **seeds)
    command.add_argument("--out", help="where the results go (default: runs/depth)", **out)
    command.set_defaults(run=run_depth, parser=command)
    command = studies.add_parser("statistics", help="the demo's network with one set of running statistics and two")
    command.add_argument("--epochs", type=whole(1), metavar="N", default=20, help="(default: %(default)s)")
    command.add_argument("--seeds", default=(0, 1, 2), **seeds | {"help": "(default: 0,1,2)"})
    command.add_argument("--out", help="where the results go (default: runs/statistics)", **out)
    command.set_defaults(run=run_statistics, parser=command)
    command = studies.add_parser("probes", help="linear classifiers on the features of every depth of a checkpoint")
    add_checkpoint(command, images=True)
    command.add_argument("--out", help="where the results go (default: runs/probes)", **out)
    command.set_defaults(run=run_probes, parser=command)


def for_export(arguments: argparse.Namespace) -> tuple[evaluate.Network, dict[str, object]]:
    """The network of --checkpoint, which has the column of --column, and what its users have to know."""
    unpack = trained.unpack if arguments.column is None else trained.unpack_fractal
    model, content = unpack(arguments.checkpoint)
    if arguments.column is not None and arguments.column >= model.columns:
        raise UserError(f"--column: expected 0 to {model.columns - 1}, got {arguments.column}")
    return model, trained.for_users(content)


def run_extract(arguments: argparse.Namespace) -> None:
    model, metadata = for_export(arguments)
    try:
        export.save_column(model, arguments.column, arguments.out, fold=arguments.fold, metadata=metadata)
    except ImportError as error:
        raise UserError(str(error)) from error
    print(f"wrote {arguments.out}")


def run_export(arguments: argparse.Namespace) -> None:
    writers = {".onnx": export.to_onnx, ".pt2": export.to_pt2}
    if arguments.out.suffix not in writers:
        raise UserError(f"--out: expected a name that ends in {' or '.join(writers)}, got {arguments.out.name!r}")
    model, metadata = for_export(arguments)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's exporter copies PyTorch's own deprecated class
            writers[arguments.out.suffix](model, arguments.out, arguments.column, metadata=metadata)
    except ImportError as error:
        raise UserError(str(error)) from error
    print(f"wrote {arguments.out}")


def parser() -> Parser:
    top = Parser(prog="python -m fractalnet", description="Trains and evaluates FractalNets.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    text = "train a network by a recipe, measure it, draw what it learned"
    long = f"Recipes: {', '.join(config.recipes())}, and any YAML file. {EPILOG}"
    command = commands.add_parser("train", help=text, usage=f"{top.prog} train RECIPE [options]", description=long)
    command.add_argument("--recipe", metavar="RECIPE", help="in place of the first argument")
    command.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/RECIPE)")
    text = "go on from the folder's newest checkpoint, or from this one; with --out a RECIPE need not be said again"
    command.add_argument("--resume", nargs="?", const="newest", metavar="FILE", help=text)
    command.add_argument("--overwrite", action="store_true", help="replace an earlier run in the folder")
    command.add_argument("--dry-run", action="store_true", help="print the whole recipe and its costs, train nothing")
    command.add_argument("--options", action="store_true", help="print every option of recipes")
    command.set_defaults(run=run_train, parser=command)
    for name, run, text in (
        ("eval", run_eval, "accuracy and time of a checkpoint's full network and of each column alone"),
        ("anytime", run_anytime, "a checkpoint's answers, shallow column first, and when they are there"),
    ):
        command = commands.add_parser(name, help=text)
        add_checkpoint(command, images=True)
        if name == "eval":
            text = "mean of so many views: the corners, the centre, their mirror images"
            command.add_argument("--crops", type=int, choices=(1, 10), default=1, help=text)
        else:
            command.add_argument(
                "--out", type=Path, metavar="DIR", help="where its JSON and plot go (default: nowhere)"
            )
        command.set_defaults(run=run, parser=command)
    command = commands.add_parser("compare", help="the paper's test errors against those of finished runs")
    command.add_argument("runs", type=Path, metavar="DIR", nargs="?", default=Path("runs"), help="(default: runs)")
    command.set_defaults(run=run_compare, parser=command)
    for name, run, text in (
        ("extract", run_extract, "writes one column as a plain network: weights and layers in a safetensors file"),
        ("export", run_export, "writes the full network, or one column, as ONNX or as a torch.export program"),
    ):
        command = commands.add_parser(name, help=text)
        add_checkpoint(command)
        column = {"type": whole(0), "metavar": "C", "required": name == "extract"}
        command.add_argument("--column", help="this column alone, 0 the shallowest", **column)
        out = "FILE" if name == "extract" else "FILE.onnx|FILE.pt2"
        command.add_argument("--out", type=Path, metavar=out, required=True, help="what to write")
        command.set_defaults(run=run, parser=command)
        if name == "extract":
            command.add_argument("--fold", action="store_true", help="fold batch norms into the convolutions")
    add_studies(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        arguments, rest = parser().parse_known_args(argv)
        trains = arguments.run is run_train
        if rest and not trains:
            command = arguments.parser
            command.error(f"unknown argument {' '.join(rest)}; the options are: {command.options()}")
        arguments.run(arguments, rest) if trains else arguments.run(arguments)
    except (UserError, BackendUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who read has enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the end does not write there either
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up as an interrupt does
    sys.exit(main())
