"""Training steps as CUDA graphs: forward, loss, backward and optimizer are one launch.

At the image sizes of CIFAR a step is hundreds of short kernels, and to launch them one by one may take the host longer
than they take the GPU. A graph is a step that was recorded once and is launched whole. What a recorded step does cannot
depend on the host any more, so there is one graph for each global column, in which that column alone runs, and one for
all local steps, in which everything runs and the joins read their masks on the device: the sampled path chooses the
graph and fills the masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .drop_path import Path
from .model import FractalNet

PATIENCE, WORTH = 10, 10  # times one after the other that a start anew came before so many replays

Work = Callable[[Tensor, Tensor, Path | None, bool], Tensor]


class Capturer(Protocol):
    """How a call is recorded: by CUDA, or in the tests by what stands in for it."""

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        """Runs a call as it will be captured."""

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Records a call without running it: what runs it, and the tensor that its result will be in."""

    def forget(self) -> None:
        """Nothing that was captured before will be replayed."""


class _Cuda:
    """Graphs on one stream that share their memory: no two run at a time, and none needs what another left."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm(self, call: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = call()
        current.wait_stream(self.stream)
        return out

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        current = torch.cuda.current_stream(self.device)
        # cuBLAS keeps a workspace per stream. One from before the capture could be freed while replays use it (graphs
        # of torch.compile free all of them), so the graph gets one of its own pool, and nobody else does.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # thread_local: a thread that pins the next batch's memory meanwhile is none of the capture's business.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                out = call()
        except BaseException:
            self._recover(current, before)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return graph.replay, out

    def forget(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()  # a pool all of whose graphs are gone takes no others

    def _recover(self, current: torch.cuda.Stream, before: torch.cuda.Stream) -> None:
        """What PyTorch leaves open when the end of a capture fails: the stream, the device, the pool, the generator."""
        torch.cuda.set_stream(current)
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self.pool)
        with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(self.device)):
            torch.zeros((), device=self.device)
        for stream in (current, before):  # the last one's device is current
            torch.cuda.set_stream(stream)


class _Graph:
    """A kind of step: its inputs, which stay where they are, and, once it is captured, what replays it."""

    def __init__(self, x: Tensor, y: Tensor, path: Path | None, device: torch.device) -> None:
        self.x, self.y = (torch.empty_like(t, device=device) for t in (x, y))
        self.path, self.uses = path, 0
        self.masked = path is not None and path.column is None
        if self.masked:
            self.path = Path(torch.empty_like(path.keep, device=device))
        elif path is not None:
            self.path = Path(path.keep.clone(), path.column)  # its own, as the graph is of what it was
        self.replay: Callable[[], None] | None = None
        self.out = x

    def fits(self, path: Path | None) -> bool:
        """Whether the graph can take this path: a column's is recorded, a local one fills in its masks."""
        if path is None or self.masked:
            return path is None or path.keep.shape == self.path.keep.shape
        return torch.equal(path.keep, self.path.keep)

    def fill(self, x: Tensor, y: Tensor, path: Path | None) -> None:
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        if self.masked:
            self.path.keep.copy_(path.keep, non_blocking=True)


class GraphedStep:
    """A training step that is captured once for each kind of path, and then replayed.

    The first ``warmup`` uses of a kind are ordinary steps; the next one captures, and from then on a step fills in the
    images, targets, masks and learning rates and launches the graph. The loss, gradients and statistics are those of
    the ordinary step: a local step runs dropped branches too and masks them, which changes the rounding, and which
    values dropout drops.

    Batches of another shape than the first one (the last of an epoch) run as ordinary steps. So does everything after
    something could not be captured: a warning gives the reason once, and so does :attr:`problem`.

    Args:
        net: the network whose paths choose the graph, a :class:`FractalNet` or any module without paths, in training
            mode, on a CUDA device. Its tensors stay where they are: values may be loaded into them, ``net.to`` must not
            be called.
        optimizer: the one that ``work`` steps: ``fused=True``. Its learning rates may change from step to step; after
            another setting or state, with other parameters, or where others require gradients or other modules are in
            evaluation mode, its steps are captured anew. What changes a setting every few steps (OneCycleLR the
            momentum, say) leaves nothing to replay.
        work: ``work(x, y, path, dense)`` does all of a step on the device and returns the loss, a tensor: it calls
            ``net(x, path=path, dense=dense)``, the backward, the optimizer, and sets the gradients to None. The host's
            part of it (counters, schedules, printing) would run when it is captured, and never again.
        warmup: ordinary steps of a kind before it is captured.
        capturer: what records and replays; None: CUDA.
    Returns:
        ``step(x, y, path=None)`` returns the loss, a tensor of its own. Without a path one is sampled. x and y may be
        on the host: from pinned memory, which must stay as it is until the device has read it, nobody waits.
    Raises:
        ValueError: warmup is not a whole number >= 1.
    Memory:
        All graphs share one pool: as much as the largest step needs, beside what ordinary steps have cached.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 3, for the two kinds of path.
    Example:
        >>> net = FractalNet(10, 2, (8,), image_size=8)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
        >>> def work(x, y, path, dense):
        ...     loss = nn.functional.cross_entropy(net(x, path=path, dense=dense), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad(set_to_none=True)
        ...     return loss.detach()
        >>> step = GraphedStep(net, optimizer, work)
        >>> step.problem  # on a CUDA device: ''
        'CUDA graphs need a CUDA device, and the network is on cpu'
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        work: Work,
        *,
        warmup: int = 2,
        capturer: Capturer | None = None,
    ) -> None:
        if type(warmup) is not int or warmup < 1:
            raise ValueError(f"GraphedStep: expected warmup >= 1, got {warmup!r}")
        self.net, self.optimizer, self.work, self.warmup = net, optimizer, work, warmup
        self.device = next(net.parameters()).device
        self.problem = "" if capturer is not None else _problem(net, optimizer, self.device)
        self.capturer = capturer or (None if self.problem else _Cuda(self.device))
        self._graphs: dict[int | None, _Graph] = {}
        self._shape: tuple[object, ...] | None = None
        self._recorded: object = None
        self._state: object = None
        self._params: list[list[Tensor]] = []
        self._modules = list(net.modules())
        self._of_each: list[dict[str, Any]] = []  # of the optimizer's state
        self._moments: list[tuple[dict[str, Any], str, Tensor]] = []
        self._in_vain = self._replays = 0  # starts anew that came too soon; replays since the last one
        self._rates: list[Tensor] = []
        self._filled: list[float | None] = []

    def __call__(self, x: Tensor, y: Tensor, path: Path | None = None) -> Tensor:
        drops = isinstance(self.net, FractalNet) and self.net.training and self.net.global_mode != "tied"
        if path is None and drops:
            path = self.net.sample_path(len(x))
        shape = tuple((t.shape, t.stride(), t.dtype) for t in (x, y))
        self._shape = self._shape or shape
        if self.problem or shape != self._shape or not self.net.training or not (self._holds() or self._begin()):
            return self._plainly(x, y, path)
        kind = None if path is None else path.column
        if kind not in self._graphs:
            self._graphs[kind] = _Graph(x, y, path, self.device)
        graph = self._graphs[kind]
        if not graph.fits(path):
            return self._plainly(x, y, path)
        graph.fill(x, y, path)
        if graph.replay is None:
            if graph.uses < self.warmup:
                graph.uses += 1
                with self._on_the_device():
                    return self.capturer.warm(lambda: self._call(graph))
            if not self._capture(graph):
                return self._plainly(x, y, path)
        self._fill_rates()
        graph.replay()
        self._replays += 1
        if self._replays >= WORTH:
            self._in_vain = 0
        return graph.out.clone()

    def _plainly(self, x: Tensor, y: Tensor, path: Path | None) -> Tensor:
        x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
        return self.work(x, y, path, False)

    def _settings(self) -> list[object]:
        """What a capture records of the optimizer, but for the learning rates and its state, and of the network."""
        trained = [*(p.requires_grad for p in self.net.parameters()), *(m.training for m in self._modules)]
        varying = ("params", "lr", "initial_lr")
        groups = self.optimizer.param_groups
        return [trained, *((*map(id, g["params"]), *(v for k, v in g.items() if k not in varying)) for g in groups)]

    def _holds(self) -> bool:
        """Whether what was captured is still what a step is: graphs write into the state's tensors where they were."""
        state = self.optimizer.state
        if self._recorded != self._settings() or self._state is not state:
            return False
        # In their order, to which others may have been added: to look for a parameter would take its hash, Python code.
        there = [*map(id, state.values())][: len(self._of_each)] == [*map(id, self._of_each)]
        return there and all(held.get(key) is t for held, key, t in self._moments)

    def _begin(self) -> bool:
        """Starts anew, after a change of what holds; False: this has come so often that graphs are no use."""
        self._in_vain += self._recorded is not None
        self._replays = 0
        self._forget()
        if self._in_vain > PATIENCE:
            what = "the optimizer's settings or state, or what of the network trains,"
            self.problem = f"{what} change so often that captures are hardly ever used"
            warnings.warn(f"GraphedStep: {self.problem}; steps run one kernel at a time", stacklevel=3)
            return False
        self._recorded, self._state = self._settings(), self.optimizer.state
        groups = self.optimizer.param_groups
        self._params = [group["params"].copy() for group in groups]  # held, since the settings have their ids
        # float32: what the kernels of fused optimizers read.
        self._rates = [torch.empty((), dtype=torch.float32, device=self.device) for _ in groups]
        self._filled = [None] * len(groups)
        return True

    def _forget(self) -> None:
        self._graphs.clear()
        self._of_each, self._moments = [], []
        if self.capturer is not None:
            self.capturer.forget()

    def _call(self, graph: _Graph) -> Tensor:
        return self.work(graph.x, graph.y, graph.path, graph.masked)

    def _capture(self, graph: _Graph) -> bool:
        # An autocast around the step keeps casts of the weights: a replay must make its own, and nobody else use those.
        torch.clear_autocast_cache()
        try:
            with self._on_the_device(capturable=True):
                graph.replay, graph.out = self.capturer.capture(lambda: self._call(graph))
        except RuntimeError as error:  # CUDA's and PyTorch's, out of memory among them
            self.problem = f"a step cannot be captured: {type(error).__name__}: {' '.join(str(error).split())}"
            self._forget()
            self.optimizer.zero_grad(set_to_none=True)  # what was recorded has left no values there
            for name in ("grad_scale", "found_inf"):  # nor in what a scaler hands over during the step
                self.optimizer.__dict__.pop(name, None)
            warnings.warn(f"GraphedStep: {self.problem}; steps run one kernel at a time", stacklevel=3)
            return False
        finally:
            torch.clear_autocast_cache()
        # Held, so that no other tensor comes to where a replay writes.
        state = self.optimizer.state
        self._of_each = list(state.values())
        self._moments = [(held, k, t) for held in self._of_each for k, t in held.items() if isinstance(t, Tensor)]
        return True

    @contextmanager
    def _on_the_device(self, **options: Any) -> Iterator[None]:
        """The optimizer with its learning rates on the device, where a replay can be given other ones."""
        groups = self.optimizer.param_groups
        before = [{key: group[key] for key in ("lr", *options) if key in group} for group in groups]
        self._fill_rates()
        try:
            for group, rate, kept in zip(groups, self._rates, before, strict=True):
                group.update({"lr": rate} | {key: value for key, value in options.items() if key in kept})
            yield
        finally:
            for group, kept in zip(groups, before, strict=True):
                group.update(kept)

    def _fill_rates(self) -> None:
        for i, (group, rate) in enumerate(zip(self.optimizer.param_groups, self._rates, strict=True)):
            if isinstance(group["lr"], Tensor):
                self._filled[i] = None
                rate.copy_(group["lr"], non_blocking=True)
            elif self._filled[i] != group["lr"]:
                self._filled[i] = group["lr"]
                rate.fill_(group["lr"])


def _problem(net: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> str:
    """Why steps of this network cannot be captured, or an empty string."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and the network is on {device.type}"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"the optimizer's step is the host's: expected {type(optimizer).__name__}(fused=True)"
    if any(getattr(module, "sync_group", None) is not None for module in net.modules()):
        return "batch norms are synchronised: a process that cannot capture would leave the others waiting"
    if isinstance(net, DistributedDataParallel):
        return "gradients of several processes are averaged: one that cannot capture would leave the others waiting"
    if isinstance(net, FractalNet) and net.global_mode == "tied":
        return 'global_mode "tied" draws its path inside the step'
    return ""
