"""Training by a recipe, on one device or many: the loop, and what it needs to go on exactly where it stopped.

Whatever is random follows from the seed and the place in the training: the order of images and their views (Loader),
dropout, and the paths of drop-path. So a checkpoint holds the weights, running statistics, optimizer, scaler and
schedule, and the place; there is no state of generators or workers that could be lost.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checkpoints, evaluate, outputs, sources
from .augment import Augment
from .config import FREE, Config
from .devices import fabric_for, follow, is_parallel, lay_out, unfuse, zero_momenta
from .drop_path import Path, generator_for, tied_loss
from .files import UserError, folder_for, require, signals, stopped
from .graphed import GraphedStep
from .layers import is_whole
from .loader import Loader
from .model import FractalNet
from .plain import PlainNet
from .schedules import scheduler as scheduler_for

if TYPE_CHECKING:
    from lightning.fabric import Fabric

AGREE_EVERY = 10  # steps between two looks at whether a rank was told to stop


def network(
    config: Config, data: str, classes: int, channels: int, image_size: int, what: str
) -> tuple[FractalNet | PlainNet, dict[str, Any]]:
    """The network of a recipe for such images, and all the arguments that make it."""
    shape = {"num_classes": classes, "in_channels": channels, "image_size": image_size}
    if classes < 2:
        raise UserError(f"data {data}: expected 2 classes or more, got {classes}")
    arguments = {**shape, **config.network}
    for name, value in shape.items():
        got, many = arguments[name], name == "num_classes"
        if not is_whole(got) or (got < value if many else got != value):
            there = f"{value} or more" if many else str(value)
            raise UserError(f"{what}: --network.{name}: expected {there} for {data}, got {got!r}")
    return evaluate.build(arguments, what), arguments


def optimizer_for(config: Config, net: torch.nn.Module, what: str) -> torch.optim.Optimizer:
    """The optimizer of a recipe, if this training can use it."""
    try:
        made = config.optimizer(net.parameters())
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{what}: optimizer: {' '.join(str(error).split())}") from error
    kind, unfit = type(made).__name__, {"LBFGS": "it calls the step again", "SparseAdam": "its gradients are sparse"}
    if config.strategy == "fsdp":
        unfit["Adafactor"] = "PyTorch has none of weights that --strategy fsdp shards"
    if kind in unfit:
        raise UserError(f"{what}: optimizer: expected one of torch.optim but {kind}: {unfit[kind]}")
    fused = getattr(made, "_step_supports_amp_scaling", False)
    if config.precision == "fp16" and config.clip is not None and fused:
        raise UserError("train: --clip: expected --optimizer.fused false beside --precision fp16, got a fused one")
    return made


class Run:
    """A training on one rank: all of its state, one method per thing that is done with it."""

    def __init__(self, config: Config, plain: dict[str, Any], name: str, fabric: Fabric) -> None:
        self.config, self.plain, self.name, self.fabric = config, plain, name, fabric
        with fabric.rank_zero_first():
            self.data = sources.load(config.data.source, config.data.root, config.data.image_size)
        options = {key: getattr(config.data, key) for key in ("mirror", "translate", "padding", "normalise")}
        self.augment = Augment.of(self.data, **options)
        common = {"seed": config.seed, "device": fabric.device, "workers": config.data.workers}
        common |= {"rank": fabric.global_rank, "world_size": fabric.world_size}
        self.loader = Loader(self.data.train, config.batch_size, augment=self.augment, **common)
        least, got = fabric.world_size, min(config.batch_size, self.loader.count)
        if got < least and not config.sync_bn:  # a rank without images has no statistics to be averaged
            raise UserError(f"train: --sync_bn false: expected batches of {least} or more on as many ranks, got {got}")
        size = max(evaluate.CHUNK if not self.data.streamed else config.batch_size, fabric.world_size)
        self.holdout = Loader(self.data.test, size, augment=self.augment.eval(), shuffle=False, **common)

        torch.manual_seed(config.seed)
        shape = len(self.data.classes), self.data.channels, self.data.image_size
        self.net, self.arguments = network(config, self.data.name, *shape, f"recipe {name}")
        if isinstance(self.net, FractalNet):
            self.net.path_seed = config.network.get("path_seed", config.seed)
            if self.net.global_mode == "tied" and self.net.granularity == "sample" and fabric.world_size > 1:
                raise UserError("train: expected granularity batch for global_mode tied on several ranks, got sample")
        self.net = fabric.strategy.precision.convert_module(self.net)
        self.net.to(fabric.device, memory_format=torch.channels_last)  # stems and plain networks: blocks are
        self.average = self._average()
        if fabric.world_size > 1 and config.sync_bn:
            self._synchronise()
        model = torch.compile(self.net) if config.compile else self.net
        self.model = fabric.setup_module(model)
        self.optimizer = fabric.setup_optimizers(optimizer_for(config, self.net, f"recipe {name}"))
        if config.strategy == "fsdp" and isinstance(self.optimizer.optimizer, torch.optim.SGD):
            unfuse(self.optimizer.optimizer)
        if config.precision == "fp16":
            zero_momenta(self.optimizer.optimizer)
        steps = -(-len(self.loader) // config.accumulate)  # of an epoch
        self.scheduler = scheduler_for(self.optimizer, config.schedule, config.epochs, steps)
        self.graphed = self._graphs() if config.graphs else None
        self.epoch = self.batch = 0  # what comes next
        self.loss = torch.zeros((), dtype=torch.float64, device=fabric.device)  # of this epoch's images so far, summed
        self.best: dict[str, Any] = {"accuracy": -1.0, "checkpoint": None}
        self.rate = self.inside = 0.0  # of the last step; seconds of this epoch's steps
        self.history: list[dict[str, Any]] = []

    def _average(self) -> Any:
        if self.config.ema is None:
            return None
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        averaging = get_ema_multi_avg_fn(self.config.ema)
        return AveragedModel(self.net, multi_avg_fn=averaging, use_buffers=True)

    def _synchronise(self) -> None:
        from fractal_kernels import sync_batch_norm

        try:
            self.net.sync_batch_norm() if isinstance(self.net, FractalNet) else sync_batch_norm(self.net)
        except ValueError as error:
            raise UserError(f"train: {error}; --sync_bn false keeps statistics per rank") from error

    def _graphs(self) -> GraphedStep | None:
        """Steps as CUDA graphs, or the reason why not, which is printed."""
        config, made = self.config, GraphedStep(self.net, self.optimizer.optimizer, self.work)
        several = "steps of several devices wait for one another" if is_parallel(self.fabric) else ""
        grouped = "gradients of several batches are added up" if config.accumulate > 1 else ""
        compiled = "steps that torch.compile has are not captured" if config.compile else ""
        if reason := several or grouped or compiled or made.problem:
            self.fabric.print(f"--graphs: not used: {reason}")
            return None
        return made

    @property
    def subject(self) -> FractalNet | PlainNet:
        """What is evaluated and kept."""
        return self.average.module if self.average is not None else self.net

    @property
    def steps(self) -> int:
        """Batches so far."""
        return self.epoch * len(self.loader) + self.batch

    # --- a step ------------------------------------------------------------------------------------

    def step(self, x: Tensor, y: Tensor, size: int) -> None:
        """Forward and backward of a batch of which this rank has a part; the optimizer's step when its group is full.

        Ranks have parts of different sizes, and their gradients are averaged: so every rank divides its summed loss by
        the images of all ranks, and multiplies by the number of ranks.
        """
        place = (self.config.seed, self.epoch, self.batch, self.fabric.global_rank)
        torch.manual_seed(generator_for(*place).initial_seed())  # of dropout
        whole = self.graphed is not None and len(x) == self.config.batch_size
        path = self.path(size)
        self.loss += self.graphed(x, y, path) if whole else self.work(x, y, path)
        self.rate = self.optimizer.param_groups[0]["lr"]
        full = self.full()
        self.batch += 1
        if full:
            if self.average is not None:
                follow(self.average, self.net)
                if isinstance(self.net, FractalNet):  # it goes on with the next path, as the network itself would
                    self.average.module.path_step = self.net.path_step
            self.scheduler.step()

    def full(self) -> bool:
        """Whether this batch is the last one of its group."""
        return (self.batch + 1) % self.config.accumulate == 0 or self.batch + 1 == len(self.loader)

    def work(self, x: Tensor, y: Tensor, path: Path | None, dense: bool = False) -> Tensor:
        """The device's part of a step, and the summed loss. A graph records it, and the numbers that the host gives."""
        config, full = self.config, self.full()
        first = self.batch - self.batch % config.accumulate
        images = min(config.accumulate * config.batch_size, self.loader.count - first * config.batch_size)
        # Not enabled=False: Fabric's context for sharded models would leave them unsynchronised behind it.
        with nullcontext() if full else self.fabric.no_backward_sync(self.model):
            logits = self.model(x) if path is None else self.model(x, path=path, dense=dense)
            loss = tied_loss(logits, y, self.criterion)
            self.fabric.backward(loss * (self.fabric.world_size / images))
        if full:
            if config.clip is not None:
                options = {"max_norm": config.clip, "error_if_nonfinite": False}  # a scaler's first steps overflow
                self.fabric.clip_gradients(self.model, self.optimizer, **options)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def criterion(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=self.config.label_smoothing, reduction="sum")

    def path(self, size: int) -> Path | None:
        """The path of this rank's part: on every rank that of the whole batch. None: the network has its own."""
        if not isinstance(self.net, FractalNet) or self.net.global_mode == "tied":
            return None
        generator = generator_for(self.net.path_seed, self.net.path_step, 0)  # as the network's own
        path = self.net.sample_path(size, generator)
        if path.keep.dim() == 3:
            return path
        order, ranks = torch.arange(size), self.fabric.world_size
        if not self.config.sync_bn:  # statistics of each rank's own part: it is to hold every kind of sample
            order = torch.cat([order[first::ranks] for first in range(ranks)])
        return Path(path.keep[..., order[slice(*self.loader.part(size))]])

    # --- an epoch ----------------------------------------------------------------------------------

    def train_epoch(self, out: FilePath, bar: Any, came: list[int]) -> None:
        """What is left of an epoch, and a checkpoint before it is evaluated."""
        config, self.inside = self.config, 0.0
        self.model.train()
        for x, y, size in self.loader.epoch(self.epoch, self.batch):
            begun = time.perf_counter()
            self.step(x, y, size)
            self.inside += time.perf_counter() - begun
            bar.update()
            complete = self.batch % config.accumulate == 0 and self.batch < len(self.loader)
            if complete and self.told(came):
                raise stopped(came, self.save(out))
            every = config.save_every  # or the first complete group after it
            if complete and every and self.batch // every > (self.batch - config.accumulate) // every:
                self.save(out)
        self.agree()
        self.save(out)

    @torch.no_grad()
    def agree(self) -> None:
        """Running statistics that ranks took of their own parts alone become their mean."""
        if self.fabric.world_size > 1 and not self.config.sync_bn:
            nets = [self.net] if self.average is None else [self.net, self.subject]
            for buffer in (b for net in nets for b in net.buffers() if b.is_floating_point()):
                buffer.copy_(self.fabric.all_reduce(buffer.clone(), reduce_op="mean"))

    def told(self, came: list[int]) -> bool:
        """Whether any rank was told to stop; all ranks get the same answer."""
        if self.fabric.world_size == 1:
            return bool(came)
        if self.batch // self.config.accumulate % AGREE_EVERY:
            return False
        flag = torch.tensor(float(bool(came)), device=self.fabric.device)
        return bool(self.fabric.all_reduce(flag, reduce_op="sum") > 0)

    def scores(self) -> dict[str, dict[str, float]]:
        dtype = torch.float64 if self.config.precision == "fp64" else torch.float32
        with self.fabric.autocast():
            batches = ((x.to(dtype), y) for x, y, _ in self.holdout.epoch(0))
            return evaluate.scores(self.subject, batches)

    def finish_epoch(self) -> dict[str, Any]:
        """The epoch's row of the log; what comes next is the next epoch."""
        total = self.fabric.all_reduce(self.loss, reduce_op="sum").item() / self.loader.count
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss.zero_()
        row: dict[str, Any] = {"epoch": self.epoch, "lr": self.rate, "train_loss": total}
        if self.epoch % self.config.evaluate_every == 0 or self.epoch == self.config.epochs:
            row["holdout"] = self.scores()
        self.history.append(row)
        return row

    # --- checkpoints -------------------------------------------------------------------------------

    def state(self, log: int = 0) -> dict[str, Any]:
        state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state | {
            "scaler": self.fabric.strategy.precision.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "place": {"epoch": self.epoch, "batch": self.batch, "rate": self.rate, "best": self.best},
            "loss": self.fabric.all_gather(self.loss).view(-1).cpu(),  # of every rank
            "log": log,  # bytes of metrics.jsonl that belong to this state
            "run": {"recipe": self.name, "config": json.dumps(self.plain), "data": self.data.fingerprint},
        }

    def save(self, out: FilePath) -> FilePath:
        """A checkpoint of this moment, if it is worth one."""
        folder, loss = out / "checkpoints", self.fabric.all_reduce(self.loss.clone(), reduce_op="sum").item()
        if not loss < float("inf"):
            why = f"the loss is {loss} in epoch {self.epoch + 1}: the training has diverged; lower the lr, in a new run"
            raise UserError(f"{why}; what was written before is in {folder}")
        path = checkpoints.save(self.fabric, folder, self.steps, self.state(outputs.log_size(out)))
        if self.fabric.is_global_zero:
            checkpoints.prune(folder, self.config.keep, self.best["checkpoint"])
        return path

    def save_epoch(self, out: FilePath, row: dict[str, Any]) -> FilePath:
        accuracy = row.get("holdout", {}).get("full", {}).get("accuracy", -1.0)
        if accuracy > self.best["accuracy"]:
            self.best = {"accuracy": accuracy, "checkpoint": f"step-{self.steps:09d}.ckpt"}
        return self.save(out)

    def resume(self, out: FilePath, path: FilePath) -> None:
        """Goes back to the moment of a checkpoint; the log forgets what came after it."""

        def fits(run: dict[str, Any]) -> None:
            differ = outputs.differences(json.loads(run["config"]), self.plain, FREE)
            if differ:
                raise UserError(f"checkpoint {path}: written under other options: {'; '.join(differ)}")
            if run["data"] != self.data.fingerprint:
                raise UserError(f"checkpoint {path}: {self.data.name} holds other images now than when it was written")

        state = self.state()
        checkpoints.load(self.fabric, path, state, fits)
        lay_out(self.optimizer.optimizer)
        try:
            place = state["place"]
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.fabric.strategy.precision.load_state_dict(state["scaler"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.epoch, self.batch, self.best, self.rate = (place[key] for key in ("epoch", "batch", "best", "rate"))
            if isinstance(self.net, FractalNet):  # a path per batch; Fabric reads no extra state into sharded modules
                self.net.path_step = self.steps
            losses, rank = state["loss"], self.fabric.global_rank
            if len(losses) != self.fabric.world_size:  # other devices than before: what matters is the sum
                losses = torch.cat([losses.sum().view(1), losses.new_zeros(self.fabric.world_size - 1)])
            self.loss.copy_(losses[rank])
            log = state["log"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"checkpoint {path}: its content does not fit ({type(error).__name__}: {error})") from error
        self.history = outputs.rewind(out, log, self.fabric.is_global_zero)
        if self.fabric.is_global_zero:
            for later in checkpoints.saved(out / "checkpoints"):
                if checkpoints.step_of(later) > self.steps:  # of a future that this run will not have
                    later.unlink()
        self.fabric.barrier()


def run(
    config: Config, plain: dict[str, Any], name: str, out: FilePath, resume: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Trains, measures, prints and writes: what `python -m fractalnet train` does. Returns what metrics.json holds.

    Args:
        config, plain: of `config.load`. name: of the recipe. out: the run folder.
        resume: "newest", or a checkpoint of the folder. overwrite: an earlier run in the folder may go.
    Raises:
        UserError: what the caller can mend. Stopped: SIGTERM or SIGINT came, and a checkpoint is written.
    """
    require("lightning", "torchmetrics", "matplotlib", "tqdm", "yaml")
    fabric = fabric_for(config)
    fabric.launch()
    with folder_for(out), outputs.alone(fabric, out):
        checkpoint = outputs.find(out, resume, overwrite)
        this = Run(config, plain, name, fabric)  # looks at data and options before anything in the folder changes
        outputs.prepare(fabric, out, checkpoint is None, config.tensorboard)
        if checkpoint is not None:
            this.resume(out, checkpoint)
        log = outputs.Log(fabric, out, config, this.steps, len(this.loader))
        log.begin(name, plain, this.data.describe())
        outputs.introduce(this)
        with closing(this.loader), closing(this.holdout):
            with signals() as came:
                train(this, out, log, came)
            with log.told():
                metrics = outputs.conclude(this, out)
        fabric.barrier()
    return metrics


def train(this: Run, out: FilePath, log: outputs.Log, came: list[int]) -> None:
    """From where the run is to its last epoch."""
    from tqdm import tqdm

    batches, epochs = len(this.loader), this.config.epochs
    look = {"desc": "training", "unit": "batch", "dynamic_ncols": True, "disable": not this.fabric.is_global_zero}
    look["mininterval"] = 0.1 if sys.stderr.isatty() else 10  # seconds between two states: a log needs fewer
    with tqdm(total=batches * epochs, initial=this.steps, **look) as bar:
        while this.epoch < epochs:
            begun, first = time.perf_counter(), this.batch
            times = {"epoch": this.epoch + 1}
            try:
                this.train_epoch(out, bar, came)
            finally:
                trained = time.perf_counter()
                times |= {"batches": this.batch - first, "seconds": trained - begun, "in_steps": this.inside}
                log.time(times)
            trained = time.perf_counter()
            row = this.finish_epoch()
            log.write(row, this.history)
            path = this.save_epoch(out, row)
            log.time({"epoch": this.epoch, "evaluating_and_saving": time.perf_counter() - trained})
            if "holdout" in row:
                full = row["holdout"]["full"]["accuracy"]
                bar.set_postfix_str(f"epoch {this.epoch}/{epochs}, hold-out {full:.1%}", refresh=False)
            if this.epoch < epochs and this.told(came):
                raise stopped(came, path)
