"""Training of the supporting-experiment net on made-up images: what the loop costs beside its steps, and what an
evaluation of all columns costs beside the full network's. `python -m benchmarks.training` prints and writes it.

The loop's share depends on nothing that is in the images, so these are random, in CIFAR-100's binary format.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from fractalnet import config, evaluate, outputs, train

from benchmarks.report import RESULTS, commit

IMAGES, EPOCHS = 5000, 3
OPTIONS = ["--network.local_drop", "0.15", "--network.global_ratio", "0.5", "--epochs", str(EPOCHS)]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name, count in (("train", IMAGES), ("test", 500)):
            pixels = bytearray(os.urandom(count * 3074))
            for row in range(count):
                pixels[3074 * row], pixels[3074 * row + 1] = row % 20, row % 100
            (root / f"{name}.bin").write_bytes(pixels)
        found, plain = config.load("fractal_c3/c100++", [*OPTIONS, "--data.root", scratch])
        metrics = train.run(found, plain, "fractal_c3/c100++", root / "run")
        times = [json.loads(line) for line in (root / "run" / "timing.jsonl").read_text().splitlines()]
        times = [t for t in times if "in_steps" in t][1:]
        model = evaluate.build({"num_classes": 100, "image_size": 32, **found.network}, "benchmark").eval()
        model.load_state_dict(torch.load(root / "run" / "model.pt", weights_only=True)["state"])
    x = torch.randn(100, 3, 32, 32)
    with torch.no_grad():
        calls = {
            "full": lambda _: model(x),
            "columns": lambda _: [model(x, column=c) for c in range(model.columns)],
        }
        ms = {name: statistics.median(values) for name, values in evaluate.alternate(calls, cycle=6).items()}
    overheads = [t["seconds"] / t["in_steps"] - 1 for t in times]  # the first epoch warms up
    result = {
        "command": "python -m benchmarks.training",
        "commit": commit(),
        "recipe": "fractal_c3/c100++ " + " ".join(OPTIONS),
        "threads": torch.get_num_threads(),
        "versions": outputs.versions(),
        "step_ms": 1e3 * statistics.median(t["in_steps"] / t["batches"] for t in times),
        "overhead_per_epoch": overheads,
        "overhead": statistics.median(overheads),
        "evaluation_ms": ms,
        "all_columns_to_full": ms["columns"] / ms["full"],
        "parameters": metrics["parameters"],
    }
    path = RESULTS / "training" / "cpu.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nbeside the steps: {result['overhead']:.2%} of their {result['step_ms']:.1f} ms")
    print(f"evaluating all columns: {result['all_columns_to_full']:.2f}x the full network; wrote {path}")


if __name__ == "__main__":
    main()
