"""Training steps of the paper's networks on a GPU: graphed and not, against eager and compiled networks.

Run with ``pytest benchmarks/bench_gpu_steps.py -m gpu``. The rows that matter most come first, since a round has a
limit. "ours", graphed steps on the CUDA kernels, is in every row, and draws a path in each step. Against eager:
"ungraphed" steps; "eager", the network as public code has it, in channels_last with masks drawn on the device. The
others have a row each, since they compile for a minute: "compiled", torch.compile of a clean dense network that takes
the masks; "compiled_graphs", with torch.compile's own CUDA graphs; "ours_compiled", our network with those instead of
ours; "triton", ours on Triton's kernels; "compiled_max", the dense network autotuned, the headline's networks alone.
The report puts the rows of a step together. A contender that does not run is left out of its row, which says why.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fractalnet import GraphedStep, evaluate
from fractalnet.drop_path import Path, column_path
from fractalnet.summary import work as multiply_adds
from torch import Tensor, nn

from benchmarks import cases, steps
from benchmarks.cases import GPU_NETS
from benchmarks.compare import Contender, Different, hold_together, relative_error
from fractal_kernels import use_backend

pytestmark = [pytest.mark.gpu, pytest.mark.keep_compiled]
DEVICE = "cuda"
OURS = {"ours": "cuda", "triton": "triton"}  # contenders, and their backends
# Contenders, and torch.compile's modes.
MODES = {"compiled": "default", "compiled_graphs": "reduce-overhead", "compiled_max": "max-autotune"}
OWN_MODE = "reduce-overhead"
AGAINST = {
    "eager": ("ungraphed", "eager"),
    "compiled": ("compiled",),
    "graphs": ("compiled_graphs",),
    "own": ("ours_compiled",),
    "triton": ("triton",),
    "autotuned": ("compiled_max",),
}
EAGER = "channels_last"  # what reads its joins; in rows that do not say so these were NCHW
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}  # of a loss, after layers of that precision
GRADIENTS = 1e-2  # of all of them in float32, as one vector
NOISE = 30  # times what a rounding of the images changes
BATCHES = {"fractalnet20": (100, 1024), "fractalnet40": (100, 1024), "fractalnet34": (64,)}
# Batches and precisions of the headline, then the others.
CELLS = [
    [(name, batch, precision) for name in GPU_NETS for batch in BATCHES.get(name, (100,)) if (batch > 100) == large]
    for precision in ("bf16", "fp32", "fp16")
    for large in (False, True)
]
GOALS = ("eager",), ("compiled", "graphs")  # what they are held against; what compiles does so for minutes
HEADLINE = [cell for cell in CELLS[0] if cell[0] in BATCHES]
# Of the others all rows of a network one after the other: they share its forms, what is compiled and what is captured.
ROWS = [
    (*cell, drop_path, against)
    for drop_path in ("mixture", "off")
    for goals in GOALS
    for cell in HEADLINE
    for against in goals
]
ROWS += [
    (*cell, drop_path, against)
    for cells in (HEADLINE, *CELLS)
    for cell in cells
    for against in AGAINST
    for drop_path in ("mixture", "off")
    if against != "autotuned" or cell in HEADLINE
]
ROWS = list(dict.fromkeys(ROWS))


def nudged(x: Tensor) -> Tensor:
    """Images that differ by about a rounding of float32."""
    return x + 1e-7 * torch.randn_like(x)


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
        self.paths = evaluate.mixture(ours, self.net.batch, self.net.paths, 0)
        self.masks = [path.keep.to(DEVICE) for path in self.paths]
        self.full = self.dense.full_masks().to(DEVICE)
        self.steps: dict[str, GraphedStep] = {}  # captured once for both kinds of drop-path
        self.graph_mb: dict[str, float] = {}  # what these hold between steps
        self.gated: set[str] = set()  # of OURS
        self.left_out: dict[str, str] = {}  # of the last row, and why
        self.compiled = {name: torch.compile(self.dense, fullgraph=True, mode=mode) for name, mode in MODES.items()}
        self.own = torch.compile(self.ours, mode=OWN_MODE)

    def gate(self, contender: str) -> None:
        """The forms agree in float32, with everything kept and on drawn paths, before anything is timed.

        As far as the network lets them: at 160 layers, batch norm makes 1e-3 and more of a rounding of the images. What
        the dense network makes of it is the measure.
        """
        if contender in self.gated:
            return
        x, everything = self.x, steps.full_path(self.net)
        self.restore()
        for model in (self.ours, self.public, self.dense):
            model.train()
        with torch.no_grad(), use_backend(OURS[contender]):
            expected = self.dense(x, self.full)
            self.tolerance = max(steps.TOLERANCE, NOISE * relative_error(self.dense(nudged(x), self.full), expected))
            if not self.gated:  # later its weights are others: it has been trained
                hold_together("eager", [self.public(x, self.full)], [expected], self.tolerance)
            hold_together(f"{contender}, full", [self.ours(x, path=everything)], [expected], self.tolerance)
            for i, path in enumerate(self.paths[:4]):
                wanted = self.dense(x, self.masks[i])
                for dense in (False, True):
                    got = self.ours(x, path=path, dense=dense)
                    hold_together(f"{contender}, path {i}", [got], [wanted], self.tolerance)
        self.gated.add(contender)
        x = x[:64]  # the dense network's activations in float32 are tens of GB for 1024 images
        expected = self.gradients(self.dense, lambda: self.dense(x, self.full))
        noise = NOISE * relative_error(self.gradients(self.dense, lambda: self.dense(nudged(x), self.full)), expected)
        if noise > 1:
            print(f"gradients are not held together: {noise / NOISE:.2g} of them is a rounding of the images")
            return
        with use_backend(OURS[contender]):
            got = self.gradients(self.ours, lambda: self.ours(x, path=everything))
        hold_together(f"{contender}, gradients", [got], [expected], max(GRADIENTS, noise))

    def gradients(self, model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
        """Of all weights in the dense network's order, as one vector; nothing else is changed."""
        logits = forward()
        F.cross_entropy(logits, self.y[: len(logits)]).backward()
        if model is self.ours:  # into that order by the way of the weights
            with torch.no_grad():
                for p in self.ours.parameters():
                    p.copy_(p.grad)
                self.dense.load_from(self.ours)
            found = torch.cat([p.detach().flatten() for p in self.dense.parameters()])
        else:
            found = torch.cat([p.grad.flatten() for p in self.dense.parameters()])
        model.zero_grad(set_to_none=True)
        self.restore()
        return found

    def restore(self) -> None:
        """The weights and statistics that all began with: contenders share a network and train it."""
        with torch.no_grad():
            for name, value in self.ours.state_dict().items():
                if name in self.began:
                    value.copy_(self.began[name])
            self.dense.load_from(self.ours)

    def mixed(self) -> Any:
        """The autocast of a step."""
        dtype = steps.PRECISIONS[self.precision]
        return torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None)

    def hold(self, what: str, step: Callable[[], Tensor], path: Path) -> None:
        """The loss of a step against that of the dense network from the same weights, on a path."""
        self.restore()
        with torch.no_grad(), self.mixed():
            expected = F.cross_entropy(self.dense(self.x, path.keep.to(DEVICE)), self.y)
        self.restore()
        hold_together(what, [step()], [expected], max(TOLERANCE[self.precision], self.tolerance))
        self.restore()

    def graphed(self, backend: str) -> GraphedStep:
        """Graphed steps of ours, all kinds captured, and replays held against the loss of the dense network."""
        step = steps.MixedStep(self.ours, self.precision, DEVICE)

        def work(x: Tensor, y: Tensor, path: Path, dense: bool) -> Tensor:
            with use_backend(backend):
                return step(lambda: self.ours(x, path=path, dense=dense), y)

        made, before = GraphedStep(self.ours, step.optimizer, work), reserved()
        columns = [column_path(len(self.net.channels), self.net.columns, c) for c in range(self.net.columns)]
        for path in (steps.full_path(self.net), *columns):
            for _ in range(3):
                made(self.x, self.y, path)
        for path in (steps.full_path(self.net), *columns, *self.paths[:4]):  # other masks than those of the capture
            self.hold(f"graphed, {path}", lambda path=path: made(self.x, self.y, path), path)
        if made.problem and DEVICE == "cuda":
            raise AssertionError(made.problem)
        self.graph_mb[backend] = 1e-6 * (reserved() - before)
        return made

    def contenders(self, mixture: bool, against: str) -> dict[str, Contender]:
        """Those of a row, but for what has not enough memory beside the others."""
        everything, x, y = steps.full_path(self.net), self.x, self.y
        self.public.drops = mixture

        def path(i: int) -> Path:
            return self.paths[i % len(self.paths)] if mixture else everything

        generator = torch.Generator()

        def drawn(i: int) -> Path:
            """Not the path of this step, which is of the list, but the time to draw one: the eager network does."""
            if mixture:
                self.ours.sample_path(len(x), generator)
            return path(i)

        def mask(i: int) -> Tensor:
            return self.masks[i % len(self.masks)] if mixture else self.full

        def step(model: nn.Module, forward: Callable[[int], Tensor], backend: str | None = None) -> Contender:
            mixed = steps.MixedStep(model, self.precision, DEVICE)

            def call(i: int) -> Tensor:
                with use_backend(backend) if backend else nullcontext():
                    return mixed(lambda: forward(i), y)

            return call

        def graphed(contender: str) -> Contender:
            self.gate(contender)
            if contender not in self.steps:
                self.steps[contender] = self.graphed(OURS[contender])
            return lambda i: self.steps[contender](x, y, drawn(i))

        def own(i: int) -> Tensor:  # as in graphs of ours: a column by itself, everything with the masks on the device
            torch.compiler.cudagraph_mark_step_begin()
            one = drawn(i)
            return self.own(x, path=one if one.column is not None else Path(mask(i)), dense=one.column is None)

        makers: dict[str, Callable[[], Contender]] = {
            "triton": lambda: graphed("triton"),
            "ungraphed": lambda: step(self.ours, lambda i: self.ours(x, path=drawn(i)), OURS["ours"]),
            "eager": lambda: step(self.public, lambda i: self.public(x)),
            "ours_compiled": lambda: step(self.ours, own, OURS["ours"]),
            **{
                name: lambda model=model: step(self.dense, lambda i: model(x, mask(i)))
                for name, model in self.compiled.items()
            },
        }
        found = {"ours": graphed("ours")}
        self.left_out.clear()
        for name in AGAINST[against]:
            try:
                call = makers[name]()
                if name == "eager":  # it draws its masks itself; its forward was held to given ones
                    call(0)
                else:
                    for i in range(4):  # the compiler's graphs are recorded in the second step
                        self.hold(f"{name}, step {i}", lambda call=call, i=i: call(i), path(i))
                found[name] = call
            except Exception as error:  # of what others compile; and memory, of what is there beside it
                memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
                if not memory and (name in ("ungraphed", "triton") or isinstance(error, Different)):
                    raise
                print(f"{name}: left out\n{traceback.format_exc()}", flush=True)
                self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                torch.cuda.empty_cache()
        if len(found) == 1:
            raise AssertionError(f"every contender was left out: {self.left_out}")
        return {name: waited(call) for name, call in found.items()}


def reserved() -> int:
    """Bytes that are not free for others."""
    if DEVICE != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


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
    return _kept[cell]


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def peak(call: Contender, rounds: int) -> float:
    """MB that a step allocates at most, over all paths, beside what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for i in range(rounds):
        call(i)
    return 1e-6 * (torch.cuda.max_memory_allocated() - before)


def saved(this: Nets, contenders: Iterable[str], mixture: bool) -> dict[str, float]:
    """MB that a forward pass saves for backward, with nothing dropped; under the mixture eager has masks even so."""
    everything, x = steps.full_path(this.net), this.x
    forwards: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "ungraphed": (this.ours, lambda: this.ours(x, path=everything)),
        "eager": (this.public, lambda: this.public(x, this.full if mixture else None)),
    }
    found = {}
    for name in contenders:
        if name in forwards:
            model, forward = forwards[name]
            with use_backend(OURS["ours"]), this.mixed():
                found[f"saved_mb_{name}"] = 1e-6 * evaluate.saved_bytes(model, forward)
    return found


@pytest.mark.parametrize("name, batch, precision, drop_path, against", ROWS, ids=lambda value: str(value))
def test_training_step(
    compare: Callable[..., None], name: str, batch: int, precision: str, drop_path: str, against: str
) -> None:
    """Forward, cross-entropy, backward, SGD with momentum; under the mixture the mean over a list of paths."""
    this = nets(name, batch, precision)
    mixture = drop_path == "mixture"
    contenders = this.contenders(mixture, against)
    rounds = this.net.paths if mixture else 10

    def extra(row: dict[str, Any]) -> dict[str, float]:
        found: dict[str, Any] = {"tflop": this.tflop, **saved(this, contenders, mixture), "eager": EAGER}
        found |= {f"left_out_{name}": why for name, why in this.left_out.items()}
        if DEVICE == "cuda":
            measured = [key for key in ("ungraphed", "eager", "compiled") if key in contenders]
            found |= {f"peak_mb_{key}": peak(contenders[key], rounds) for key in measured}
            found["graph_mb"] = this.graph_mb[OURS["ours"]]
        return found

    what = f"training step, {this.net.title}, batch {batch}, {precision}, drop-path {drop_path}, against {against}"
    case = {"net": name, "batch": batch, "precision": precision, "drop_path": drop_path}
    compare("gpu_step", what, contenders, rounds, cycle=rounds if mixture else None, extra=extra, case=case)
