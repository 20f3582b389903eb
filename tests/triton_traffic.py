"""Bytes that the Triton kernels load and store, counted under the interpreter, for every output element.

Prints the table as JSON; ``--write`` puts it where the test expects it. Run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import quick_interpreter
import torch
from torch import Tensor
from triton.runtime import interpreter

import fractal_kernels.triton as launchers
from fractal_kernels.library import Flags

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "triton" / "traffic.json"
SHAPE = (3, 8, 6, 10)


class Meter:
    """Counts the bytes at the addresses of the tensors it watches."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.bytes = 0
        builder = interpreter.InterpreterBuilder
        self.load, self.store = builder.create_masked_load, builder.create_masked_store
        meter = self

        def load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            meter.count(ptrs, mask)
            return meter.load(builder, ptrs, mask, *rest)

        def store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            meter.count(ptrs, mask)
            return meter.store(builder, ptrs, value, mask, *rest)

        builder.create_masked_load, builder.create_masked_store = load, store

    def count(self, ptrs: Any, mask: Any) -> None:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        for first, last in self.ranges:
            self.bytes += size * int((mask.data & (ptrs.data >= first) & (ptrs.data < last)).sum())

    def of(self, tensors: list[Tensor], launch: Any, *args: Any) -> int:
        self.ranges = [(t.untyped_storage().data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes())
                       for t in tensors]  # fmt: skip
        self.bytes = 0
        launch(*args)
        return self.bytes


def rows() -> list[dict[str, Any]]:
    meter, table = Meter(), []
    for dtype, k, pool, masked, channels_last in itertools.product(
        (torch.float32, torch.float16), (1, 3), (Flags(0), Flags.POOL_BEFORE), (False, True), (True, False)
    ):
        size, flags = dtype.itemsize, Flags.RELU_BRANCH | pool

        def tensor(shape: tuple[int, ...]) -> Tensor:
            t = torch.randn(shape).to(dtype)  # noqa: B023
            return t.to(memory_format=torch.channels_last) if channels_last else t  # noqa: B023

        n, c, h, w = SHAPE
        ys, dys = ([tensor(SHAPE) for _ in range(k)] for _ in range(2))
        out = tensor((n, c, h // 2, w // 2) if pool else SHAPE)
        mask = torch.ones(k, n, dtype=torch.bool)
        if masked:
            mask[0, 1] = False
        live, given = int(mask.sum()) / n, mask if masked else None
        vectors = [torch.rand(c) + 0.5 for _ in range(k)]
        norm = (vectors, vectors, vectors, vectors)
        mean, var, count = torch.empty(k, c), torch.empty(k, c), torch.empty(k)
        sums = [mean, var, torch.ones(k)]
        code = int(flags | Flags.STATS_LIVE)
        y, o, d = ys[0].numel() * size, out.numel() * size, k * ys[0].numel() * size  # bytes of a branch, out, dys
        calls: list[tuple[str, list[Tensor], float, Any, tuple[Any, ...]]] = [
            ("join_forward", [*ys, out], live * y + o, launchers.join_forward,
             (out, ys, given, *norm, 1e-5, code, channels_last)),
            ("join_backward_reduce", [*ys, out], live * y + o, launchers.join_backward_reduce,
             (mean, var, out, ys, given, *norm, 1e-5, code, channels_last)),
            ("join_backward_apply", [*ys, out, *dys], live * y + o + d, launchers.join_backward_apply,
             (dys, out, ys, given, *norm, sums, 1e-5, code, channels_last)),
        ]  # fmt: skip
        if not pool:
            calls.insert(0, ("channel_stats", ys, live * y, launchers.channel_stats,
                             (mean, var, count, ys, given, [], 0.0, None, channels_last)))  # fmt: skip
        for name, tensors, minimum, launch, args in calls:
            table.append(
                {
                    "kernel": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "branches": k,
                    "pool": "before" if pool else None,
                    "live": round(live, 4),
                    "layout": "channels_last" if channels_last else "contiguous",
                    "bytes_per_element": round(meter.of(tensors, launch, *args) / out.numel(), 4),
                    "minimum": round(minimum / out.numel(), 4),
                }
            )
    return table


if __name__ == "__main__":
    quick_interpreter.quicken(sanitize=False)
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows()) + "\n]\n"
    if "--write" in sys.argv:
        TABLE.write_text(text)
    print(text)
