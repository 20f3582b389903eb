"""The run folder: what goes on, row by row, and what is left of it in the end.

config.yaml (itself a recipe), environment.json, metrics.jsonl (a row per epoch) and the same as metrics.csv,
tensorboard/, timing.jsonl, checkpoints/; at the end model.pt, metrics.json, report.md and the plots. Times are in
timing.jsonl, metrics.json, the report and TensorBoard's events alone: a resumed run leaves the same bytes everywhere
else.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fractal_kernels import available_backends

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

from . import checkpoints, evaluate, plots, trained
from .config import FREE, HEAD, Config, load, paper
from .files import UserError, write
from .model import FractalNet

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from .train import Run

WAIT = 10.0  # seconds for the data workers of a training that was killed, which hold its lock until they notice
ROWS, TIMES = "metrics.jsonl", "timing.jsonl"
RESULTS = ("model.pt", "metrics.json", "report.md", "loss.png", "accuracy.png", "steps.png")
LOGS = (ROWS, TIMES, "metrics.csv")
FILES = ("config.yaml", "environment.json")
FOLDERS = {"checkpoints": (checkpoints.NAME, f".{checkpoints.NAME}.tmp"), "tensorboard": ("events.out.tfevents.*",)}
# Beside the number of epochs, in which a run of the paper's recipe may differ from it.
UNIMPORTANT = ("seed", "precision", "compile", "strategy", "sync_bn", "evaluate_every")
PACKAGES = (
    "fractal-kernels",
    "torch",
    "triton",
    "numpy",
    "lightning",
    "torchmetrics",
    "datasets",
    "scikit-learn",
)


# --- before --------------------------------------------------------------------------------------


def find(out: Path, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint of the folder to go on from, or None."""
    folder, found = out / "checkpoints", checkpoints.saved(out / "checkpoints")
    if resume is None:
        choices = "--overwrite replaces it, --out names another folder"
        if not overwrite and (found or (out / ROWS).exists()):
            raise UserError(f"{out} holds a run: --resume goes on with it, {choices}")
        there = [name for name in (*FOLDERS, *LOGS, *RESULTS, *FILES) if (out / name).exists()]
        if not overwrite and there:
            raise UserError(f"{out} holds {', '.join(there)}, which a run writes: {choices}")
        return None
    if resume == "newest" and not found:
        raise UserError(f"--resume: there is no checkpoint in {folder}")
    checkpoint = found[-1] if resume == "newest" else Path(resume)
    checkpoints.prove(checkpoint)
    return checkpoint


@contextlib.contextmanager
def alone(fabric: Fabric, out: Path) -> Iterator[None]:
    """No other training writes to the folder meanwhile: of two, each would spoil the other's log."""
    taken, handle, until = False, None, time.monotonic() + WAIT
    if fabric.is_global_zero and fcntl is not None:
        handle = os.open(out, os.O_RDONLY)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = time.monotonic() > until
                if not taken:
                    time.sleep(0.1)
                    continue
            except OSError:  # of a file system that has no locks
                pass
            break
    try:
        if fabric.broadcast(taken):
            raise UserError(f"{out}: another training writes to this folder")
        yield
    finally:
        if handle is not None:
            os.close(handle)


def prepare(fabric: Fabric, out: Path, anew: bool, board: bool = False) -> None:
    """Makes the folder ready on the first rank: what an earlier run left goes, unless it is gone on with."""
    fabric.barrier()  # every rank has looked at the folder
    folder = out / "checkpoints"
    if fabric.is_global_zero:
        try:
            old = list(folder.glob(FOLDERS["checkpoints"][1]))  # of a run that was killed while it wrote
            ours = re.compile(rf"\.({'|'.join(map(re.escape, (*LOGS, *RESULTS, *FILES)))})\.\d+\.tmp")
            old += [file for file in out.iterdir() if ours.fullmatch(file.name)]
            if board and (out / "tensorboard").is_file():
                raise UserError(f"{out / 'tensorboard'}: expected a folder, or nothing, got a file")
            if anew:
                old += [file for name, kinds in FOLDERS.items() for kind in kinds for file in (out / name).glob(kind)]
                old += [out / name for name in (*LOGS, *RESULTS)]
            for file in old:
                file.unlink(missing_ok=True)
            folder.mkdir(exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to the folder {out}: {error.filename or ''}: {reason}") from error
    fabric.barrier()


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in its keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return result


def differences(old: dict[str, Any], new: dict[str, Any], free: Iterable[str]) -> list[str]:
    """The options in which two configurations differ, but for the free ones."""
    a, b = flat(old), flat(new)
    keys = [key for key in dict.fromkeys((*a, *b)) if key not in tuple(free) and a.get(key) != b.get(key)]
    return [f"--{key} was {a.get(key)}, is {b.get(key)}" for key in keys]


def log_size(out: Path) -> int:
    return (out / ROWS).stat().st_size if (out / ROWS).exists() else 0


def rewind(out: Path, size: int, first: bool) -> list[dict[str, Any]]:
    """The log as it was when it had so many bytes; the rest is cut off (by the first rank)."""
    path = out / ROWS
    if log_size(out) < size:
        raise UserError(
            f"{path}: expected {size} bytes or more, as when the checkpoint was written, got {log_size(out)}"
        )
    text = path.read_bytes()[:size] if size else b""
    if first and path.exists():
        os.truncate(path, size)
    return [json.loads(line) for line in text.decode().splitlines()]


# --- while it runs -------------------------------------------------------------------------------


class Log:
    """Rows and times as files, and as TensorBoard's events; on the first rank alone."""

    def __init__(self, fabric: Fabric, out: Path, config: Config, step: int, batches: int) -> None:
        self.out, self.first, self.batches, self.board = out, fabric.is_global_zero, batches, None
        if self.first and config.tensorboard:
            from lightning.fabric.loggers import TensorBoardLogger

            self.board = TensorBoardLogger(out, name="", version="tensorboard", purge_step=step)

    def begin(self, name: str, plain: dict[str, Any], data: dict[str, Any]) -> None:
        if not self.first:
            return
        import yaml

        text = f"# {name}{HEAD} config.yaml does it again\n{yaml.safe_dump(plain, sort_keys=False)}"
        files = {"config.yaml": text.encode(), "environment.json": as_json(environment() | {"data": data})}
        write(self.out, files)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        path = self.out / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab+") as file:
                file.seek(max(0, size - 1))
                half = file.read() not in (b"", b"\n")  # a row, where a machine went down
                file.write(b"\n" * half + json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # no half of a row stays
            raise

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Says what is safe where something cannot be written."""
        try:
            yield
        except (OSError, UserError) as error:
            reason = str(error) if isinstance(error, UserError) else f"cannot write to the folder {self.out}: {error}"
            raise UserError(f"{reason}; {checkpoints.last_good(self.out / 'checkpoints')}") from error

    def write(self, row: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """A row of metrics; `history` is all of them."""
        if not self.first:
            return
        with self.told():
            self._append(ROWS, row)
            rows = [flat(r) for r in history]
            buffer = io.StringIO()
            writer = csv.DictWriter(buffer, list(dict.fromkeys(key for r in rows for key in r)))
            writer.writeheader()
            writer.writerows(rows)
            write(self.out, {"metrics.csv": buffer.getvalue().encode()})
            if self.board is not None:
                scalars = {key.replace(".", "/"): value for key, value in rows[-1].items()}
                self.board.log_metrics(scalars, row["epoch"] * self.batches)
                self.board.save()

    def time(self, row: dict[str, Any]) -> None:
        if self.first:
            with self.told():
                self._append(TIMES, row)


def versions() -> dict[str, str]:
    """What this run ran on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = str(getattr(sys.modules.get(package.replace("-", "_")), "__version__", "not installed"))
    found["torch"] = str(torch.__version__)  # with its build, +cu132, which a package's metadata may lack
    return found


def environment() -> dict[str, Any]:
    """Versions, devices, and the commit of the checkout that runs, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "not a checkout"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "commit": commit,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "backends": list(available_backends()),
    }


def as_json(values: Any) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def introduce(this: Run) -> None:
    """The run in a line."""
    if not this.fabric.is_global_zero:
        return
    net, data = this.net, this.data
    columns = f"FractalNet of {net.columns} columns" if isinstance(net, FractalNet) else "plain network"
    done = f" (of which {this.epoch} are done)" if this.epoch or this.batch else ""
    print(
        f"{this.name}: {len(data.train)} training and {len(data.test)} hold-out images; {columns}, {len(net.channels)} "
        f"blocks, {net.depth()} layers, {sum(p.numel() for p in net.parameters()):,} parameters; "
        f"{this.config.epochs} epochs{done} on {this.fabric.world_size} x {this.fabric.device.type}, "
        f"{torch.get_num_threads()} threads",
        flush=True,
    )


# --- after ---------------------------------------------------------------------------------------


def conclude(this: Run, out: Path) -> dict[str, Any]:
    """Measures the trained network, writes what is left of the run and prints its tables; on the first rank."""
    state = trained.whole_state(this.subject)
    if not this.fabric.is_global_zero:
        return {}
    model = evaluate.build(this.arguments, this.name)
    model.load_state_dict(state)
    model.to(this.fabric.device, torch.float32).eval()
    images = trained.facts(this.config.data, this.augment, this.data)
    # First and by itself, whatever becomes of what follows.
    write(out, {"model.pt": trained.pack(this.arguments, state, this.name, this.plain, images)})
    seconds, inside, beside = (spent(out, key) for key in ("seconds", "in_steps", "evaluating_and_saving"))
    print(f"trained in {seconds:.0f} s; measuring ...", flush=True)
    x, _, _ = next(this.holdout.whole().epoch(0))  # the first rank's part may be empty
    columns = evaluate.measure(model, this.history[-1]["holdout"], x, len(this.data.test))
    metrics = {
        "recipe": this.name,
        "config": this.plain,
        **environment(),
        "data": this.data.describe(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": seconds,
        # A GPU's steps are not over when their calls are.
        "overhead": seconds / inside - 1 if inside and this.fabric.device.type == "cpu" else None,
        "evaluating_seconds": beside,
        "columns": columns,
        "history": this.history,
    }
    files: dict[str, bytes] = {}
    if len(columns) > 1:
        files["accuracy.png"] = plots.accuracies(columns)
    measured = [row for row in this.history if "holdout" in row]
    files["loss.png"] = plots.losses(measured)
    tables = [evaluate.table(columns)]
    if this.config.compare_eager and isinstance(model, FractalNet):
        metrics["steps"] = evaluate.compare_steps(model, this)
        files["steps.png"] = plots.steps(metrics["steps"])
        tables.append(evaluate.step_table(metrics["steps"]))
    if reached := compare([metrics]):
        tables.append(reached)
    files["metrics.json"] = as_json(metrics)
    files["report.md"] = report(metrics, tables, [f for f in files if f.endswith(".png")]).encode()
    write(out, files)
    print("\n" + "\n\n".join(tables) + f"\n\nwrote {', '.join(['model.pt', *files])} to {out}")
    return metrics


def spent(out: Path, key: str) -> float:
    """Seconds of all parts of a run. A part that was killed wrote nothing."""
    text = (out / TIMES).read_text() if (out / TIMES).exists() else ""
    whole = [line for line in text.splitlines() if line.endswith("}")]  # not half a row, where a machine went down
    return sum(json.loads(line).get(key, 0.0) for line in whole)


def report(metrics: dict[str, Any], tables: list[str], pictures: list[str]) -> str:
    """The run as a page to be read."""
    import yaml

    parts = [f"# {metrics['recipe']}", f"Commit {metrics['commit']}, PyTorch {metrics['versions']['torch']}."]
    parts[1] += f" Trained in {metrics['training_seconds']:.0f} s, evaluated and saved in"
    parts[1] += f" {metrics['evaluating_seconds']:.0f} s."
    if metrics["overhead"] is not None:
        parts[1] += f" Beside the steps the loop took {100 * metrics['overhead']:.1f} % of their time."
    parts += [f"```\n{table}\n```" for table in tables]
    parts += [f"![{name}]({name})" for name in pictures]
    parts.append("The figures are of the last epoch: none was chosen by its accuracy on the hold-out.")
    parts.append(f"## Configuration\n\n```yaml\n{yaml.safe_dump(metrics['config'], sort_keys=False)}```")
    return "\n\n".join(parts) + "\n"


def compare(runs: Iterable[dict[str, Any]]) -> str:
    """Test errors of the paper against those reached, for runs of its recipes; "" where there is none.

    A run of other images, of another network or trained otherwise is none, whatever it was called by.
    """
    known, rows = paper(), []
    for metrics in runs:
        if metrics["recipe"] not in known or not is_recipe(metrics):
            continue
        for what, printed in known[metrics["recipe"]].items():
            contender, _, top = what.partition(" top ")
            score = next((c for c in metrics["columns"] if c["name"] == contender), None)
            if what == "crops" or score is None:
                continue
            reached = 100 * (1 - score["accuracy_top5" if top else "accuracy"])
            epochs = str(metrics["config"]["epochs"])
            crops = known[metrics["recipe"]].get("crops")
            crops = f" (paper: {crops} crops, here 1)" if crops else ""
            rows.append([f"{metrics['recipe']}, {what}{crops}", epochs, f"{printed:.2f}", f"{reached:.2f}"])
    return evaluate.grid([["test error, %", "epochs", "paper", "reached"], *rows]) if rows else ""


def is_recipe(metrics: dict[str, Any]) -> bool:
    """Whether a run's options are its recipe's, but for its length and what changes rounding and random numbers."""
    try:
        _, plain = load(metrics["recipe"], ["--epochs", str(metrics["config"]["epochs"])])
    except (UserError, KeyError, TypeError):  # of another program, or of another time
        return False
    return not differences(plain, metrics["config"], (*FREE, *UNIMPORTANT))


def found(folder: Path) -> list[dict[str, Any]]:
    """metrics.json of every run below a folder; files of other programs are left out."""
    runs = []
    for path in sorted(folder.rglob("metrics.json")):
        with contextlib.suppress(ValueError, OSError):
            metrics = json.loads(path.read_bytes())
            kinds = {"recipe": str, "config": dict, "columns": list}
            known = isinstance(metrics, dict) and all(isinstance(metrics.get(k), kind) for k, kind in kinds.items())
            if known and all(isinstance(c, dict) and isinstance(c.get("accuracy"), float) for c in metrics["columns"]):
                runs.append(metrics)
    return runs
