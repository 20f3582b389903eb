"""Batches that are a function of (seed, epoch, batch) alone, on every rank and with any number of workers."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_convert
from torch.utils.data import Dataset as TorchDataset

from .augment import Augment
from .drop_path import generator_for
from .files import UserError
from .formats import Files, Images

ORDER, BATCH, SAMPLE = 101, 102, 103  # what a key's numbers are drawn for
GRACE = 20  # seconds that a worker goes on after SIGTERM
Item = tuple[int, int]  # epoch, index


class Views(TorchDataset):
    """Streamed images as the network sees them, before normalisation; in worker processes."""

    def __init__(self, files: Files, augment: Augment, seed: int) -> None:
        self.files, self.augment, self.seed = files, augment, seed

    def __getitems__(self, items: list[Item]) -> Tensor | UserError:
        """uint8 [B, C, S, S]; an error is returned, since the loader's own way of raising it takes many lines."""
        try:
            views = [self.augment.view(self.files.open(i), (SAMPLE, self.seed, epoch, i)) for epoch, i in items]
        except UserError as error:
            return error
        side = self.augment.view_size
        return torch.stack(views) if views else torch.empty(0, 3, side, side, dtype=torch.uint8)


def linger(_: int) -> None:
    """Ctrl-C and SIGTERM are often sent to all processes of a training: its own one answers, and may need a batch more
    until it has written its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class Loader:
    """Batches of images in memory, or decoded by worker processes.

    The last batch of an epoch may be smaller. Every rank has a contiguous part of every batch, as equal as possible,
    perhaps empty; side by side they are the batch of a single process, bit for bit.

    Args:
        images: `Images`, kept on the device, or `Files`.
        batch_size: of all ranks together. seed: of the order and of the augmentation.
        augment: in evaluation `augment.eval()`. shuffle: a new order in every epoch.
        rank, world_size: this process and their number. workers: processes that decode `Files`, per rank.
    Example:
        >>> loader = Loader(Images(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5)), 2, seed=0,
        ...                 augment=Augment((0.5,), (0.25,)))
        >>> [(len(y), size) for x, y, size in loader.epoch(0, start=1)]
        [(2, 2), (1, 1)]
    """

    def __init__(
        self,
        images: Images | Files,
        batch_size: int,
        *,
        seed: int,
        augment: Augment,
        device: torch.device | str = "cpu",
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        numbers = {"batch_size": (batch_size, 1), "world_size": (world_size, 1), "workers": (workers, 0)}
        for name, (value, least) in numbers.items():
            if type(value) is not int or value < least:
                raise UserError(f"{name}: expected a whole number >= {least}, got {value!r}")
        if not 0 <= rank < world_size:
            raise UserError(f"rank: expected 0 to {world_size - 1}, got {rank!r}")
        self.images, self.batch_size, self.seed, self.augment, self.shuffle = images, batch_size, seed, augment, shuffle
        self.device, self.rank, self.world_size = torch.device(device), rank, world_size
        self.count, self.y = len(images), images.y.to(self.device)
        if isinstance(images, Images):
            self.x = images.x.to(self.device)
            return
        _ = augment.view_size  # an error here rather than in the first batch
        self._batches: list[list[Item]] = []  # filled anew for every epoch, so that workers outlive epochs
        self._views = DataLoader(
            Views(images, augment, seed),
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=default_convert,
            worker_init_fn=linger,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # else every epoch draws from PyTorch's own
        )

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-self.count // self.batch_size)

    def close(self) -> None:
        """Ends the worker processes, which outlive epochs; the next epoch starts others.

        Where the garbage collector ends them, their queues can be gone before they are told: seconds for each.
        """
        if isinstance(self.images, Files) and self._views._iterator is not None:
            self._views._iterator._shutdown_workers()
            self._views._iterator = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, int]]:
        """This rank's (x float32 [B, C, S, S], y int64 [B], size of the global batch), from batch `start` on.

        One epoch at a time; the next one may begin before the end of this one.
        """
        order = torch.arange(self.count, device="cpu")
        if self.shuffle:
            order = torch.randperm(self.count, generator=generator_for(ORDER, self.seed, epoch), device="cpu")
        spans = [self._span(batch) for batch in range(start, len(self))]
        if isinstance(self.images, Files):
            streamed = self._stream(epoch, [order[a:b].tolist() for a, b, _, _ in spans])
        order = order.to(self.device, non_blocking=True)
        for batch, (a, b, offset, total) in enumerate(spans, start):
            part = order[a:b]
            x = self.x[part] if isinstance(self.images, Images) else next(streamed)
            yield self.augment(x, (BATCH, self.seed, epoch, batch), start=offset, total=total), self.y[part], total

    def part(self, total: int) -> tuple[int, int]:
        """Where this rank's part of a batch of so many images begins and ends."""
        return total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size

    def whole(self) -> Loader:
        """These batches as a single process has them; the images and the worker processes are shared."""
        one = copy.copy(self)
        one.rank, one.world_size = 0, 1
        return one

    def _span(self, batch: int) -> tuple[int, int, int, int]:
        """This rank's part of a batch: from, to, its place in the batch, and the batch's size."""
        first = batch * self.batch_size
        total = min(self.batch_size, self.count - first)
        a, b = self.part(total)
        return first + a, first + b, a, total

    def _stream(self, epoch: int, batches: list[list[int]]) -> Iterator[Tensor]:
        self._batches[:] = [[(epoch, i) for i in indices] for indices in batches]
        for x in self._views:
            if isinstance(x, UserError):
                raise x
            yield x.to(self.device, non_blocking=True)
