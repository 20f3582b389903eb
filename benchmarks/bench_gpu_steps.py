"""Training steps of the paper's networks on a GPU: graphed and not, against eager and compiled networks.

Run with ``pytest benchmarks/bench_gpu_steps.py -m gpu``. The rows that matter most come first: a round has a limit.
Contenders of a row: "ours", graphed steps on the CUDA kernels; "triton", the same on Triton's; "ungraphed" ones;
"eager", the network as public code has it, in channels_last with masks drawn on the device; "compiled", torch.compile
of a clean dense network that takes the masks; and "compiled_graphs", the same with torch.compile's own CUDA graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fractalnet import GraphedStep
from fractalnet.drop_path import Path, column_path
from fractalnet.summary import work as multiply_adds
from torch import Tensor, nn

from benchmarks import cases, steps
from benchmarks.cases import GPU_NETS
from benchmarks.compare import Contender, hold_together
from fractal_kernels import use_backend

pytestmark = [pytest.mark.gpu, pytest.mark.keep_compiled]
DEVICE = "cuda"
OURS = {"ours": "cuda", "triton": "triton"}  # contenders, and their backends
MODES = {"compiled": "default", "compiled_graphs": "reduce-overhead"}
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}  # of a loss, after layers of that precision
BATCHES = {"fractalnet20": (100, 1024), "fractalnet40": (100, 1024), "fractalnet34": (64,)}
# Batches and precisions of the headline, then the others.
CELLS = [
    (name, batch, precision)
    for precision in ("bf16", "fp32", "fp16")
    for large in (False, True)
    for name in GPU_NETS
    for batch in BATCHES.get(name, (100,))
    if (batch > 100) == large
]


class Nets:
    """A network in all its forms, on the device, with the same weights."""

    def __init__(self, name: str, batch: int, precision: str) -> None:
        self.net = replace(GPU_NETS[name], batch=batch)
        self.precision = precision
        x, y = cases.random_batch(self.net)
        self.x, self.y = x.to(DEVICE, memory_format=torch.channels_last), y.to(DEVICE)
        ours, public, dense = steps.three_nets(self.net)
        # Forward and twice as much backward, nothing dropped.
        self.tflop = 6e-12 * batch * multiply_adds(ours, 3, self.net.image)
        self.ours, self.dense = ours.to(DEVICE), dense.to(DEVICE)
        self.public = public.to(DEVICE, memory_format=torch.channels_last)
        self.began = {name: t.clone() for name, t in self.ours.state_dict().items() if t.is_floating_point()}
        self.paths = cases.stratified_paths(ours, self.net)
        self.masks = [path.keep.to(DEVICE) for path in self.paths]
        self.full = self.dense.full_masks().to(DEVICE)
        self.steps: dict[str, GraphedStep] = {}  # captured once for both kinds of drop-path
        self.compiled = {name: torch.compile(self.dense, fullgraph=True, mode=mode) for name, mode in MODES.items()}

    def gate(self) -> None:
        """The forms agree in float32, with everything kept and on drawn paths, before anything is timed."""
        x, everything = self.x, steps.full_path(self.net)
        for model in (self.ours, self.public, self.dense):
            model.train()
        with torch.no_grad():
            expected = self.dense(x, self.full)
            hold_together("eager", [self.public(x, self.full)], [expected], steps.TOLERANCE)
            for contender, backend in OURS.items():
                with use_backend(backend):
                    hold_together(f"{contender}, full", [self.ours(x, path=everything)], [expected], steps.TOLERANCE)
                    for i, path in enumerate(self.paths[:4]):
                        wanted = self.dense(x, self.masks[i])
                        for dense in (False, True):
                            got = self.ours(x, path=path, dense=dense)
                            hold_together(f"{contender}, path {i}", [got], [wanted], steps.TOLERANCE)

    def restore(self) -> None:
        """The weights and statistics that all began with: contenders share a network and train it."""
        with torch.no_grad():
            for name, value in self.ours.state_dict().items():
                if name in self.began:
                    value.copy_(self.began[name])
            self.dense.load_from(self.ours)

    def graphed(self, backend: str) -> GraphedStep:
        """Graphed steps of ours, all kinds captured, and replays held against the loss of the dense network."""
        step = steps.MixedStep(self.ours, self.precision, DEVICE)

        def work(x: Tensor, y: Tensor, path: Path, dense: bool) -> Tensor:
            with use_backend(backend):
                return step(lambda: self.ours(x, path=path, dense=dense), y)

        made = GraphedStep(self.ours, step.optimizer, work)
        columns = [column_path(len(self.net.channels), self.net.columns, c) for c in range(self.net.columns)]
        for path in (steps.full_path(self.net), *columns):
            for _ in range(3):
                made(self.x, self.y, path)
        mixed = {"device_type": DEVICE, "dtype": step.dtype or torch.bfloat16, "enabled": step.dtype is not None}
        for path in (steps.full_path(self.net), *columns, *self.paths[:4]):  # other masks than those of the capture
            self.restore()
            with torch.no_grad(), torch.autocast(**mixed):
                expected = F.cross_entropy(self.dense(self.x, path.keep.to(DEVICE)), self.y)
            hold_together(f"graphed, {path}", [made(self.x, self.y, path)], [expected], TOLERANCE[self.precision])
        self.restore()
        if made.problem and DEVICE == "cuda":
            raise AssertionError(made.problem)
        return made

    def contenders(self, mixture: bool) -> dict[str, Contender]:
        everything, x, y = steps.full_path(self.net), self.x, self.y
        plain = steps.MixedStep(self.ours, self.precision, DEVICE)
        public = steps.MixedStep(self.public, self.precision, DEVICE)
        self.public.drops = mixture

        def path(i: int) -> Path:
            return self.paths[i % len(self.paths)] if mixture else everything

        def mask(i: int) -> Tensor:
            return self.masks[i % len(self.masks)] if mixture else self.full

        def compiled(model: nn.Module) -> Contender:
            step = steps.MixedStep(self.dense, self.precision, DEVICE)
            return lambda i: step(lambda: model(x, mask(i)), y)

        def ungraphed(i: int) -> Tensor:
            with use_backend(OURS["ours"]):
                return plain(lambda: self.ours(x, path=path(i)), y)

        def graphed(step: GraphedStep) -> Contender:
            return lambda i: step(x, y, path(i))

        self.steps = self.steps or {name: self.graphed(backend) for name, backend in OURS.items()}
        found: dict[str, Contender] = {name: graphed(step) for name, step in self.steps.items()}
        found |= {"ungraphed": ungraphed, "eager": lambda i: public(lambda: self.public(x), y)}
        found |= {name: compiled(model) for name, model in self.compiled.items()}
        return {name: waited(call) for name, call in found.items() if name == "ours" or fits(call)}


def fits(call: Contender) -> bool:
    """Whether a contender has enough memory beside the others: what has not is left out of the row."""
    try:
        call(0)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def waited(call: Contender) -> Contender:
    def all_of_it(i: int) -> None:
        call(i)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return all_of_it


_kept: dict[tuple[str, int, str], Nets] = {}  # the last one: what is compiled serves both kinds of drop-path


def nets(*cell: Any) -> Nets:
    if cell not in _kept:
        _kept.clear()
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        _kept[cell] = Nets(*cell)
        _kept[cell].gate()
    return _kept[cell]


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def peak(call: Contender) -> float:
    """MB that a step allocates at most, beside what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    return 1e-6 * (torch.cuda.max_memory_allocated() - before)


@pytest.mark.parametrize("drop_path", ["mixture", "off"])
@pytest.mark.parametrize("name, batch, precision", CELLS, ids=lambda value: str(value))
def test_training_step(compare: Callable[..., None], name: str, batch: int, precision: str, drop_path: str) -> None:
    """Forward, cross-entropy, backward, SGD with momentum; under the mixture the mean over a list of paths."""
    this = nets(name, batch, precision)
    mixture = drop_path == "mixture"
    contenders = this.contenders(mixture)
    rounds = this.net.paths if mixture else 10

    def extra(row: dict[str, Any]) -> dict[str, float]:
        found = {"tflop": this.tflop}
        if DEVICE == "cuda":
            found |= {
                f"peak_mb_{key}": peak(contenders[key])
                for key in ("ungraphed", "eager", "compiled")
                if key in contenders
            }
        return found

    what = f"training step, {this.net.title}, batch {batch}, {precision}, drop-path {drop_path}"
    case = {"net": name, "batch": batch, "precision": precision, "drop_path": drop_path}
    compare("gpu_step", what, contenders, rounds, cycle=rounds if mixture else None, extra=extra, case=case)
