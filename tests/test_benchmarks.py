"""The benchmarks run: once each and untimed, those that show every helper and take little time."""

import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from fractalnet import evaluate

from benchmarks import bench_gpu_steps, steps
from benchmarks.cases import Net

ROOT = Path(__file__).resolve().parents[1]


def test_benchmarks_run():
    chosen = ["benchmarks/bench_join.py::test_mean_join_forward[bf16-all]", "benchmarks/bench_depth.py::test_building"]
    command = [sys.executable, "-m", "pytest", "-q", *chosen, "--benchmark-disable"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


TINY = {
    "fused": Net("tiny", 2, (4, 8), 4, 8, 1, 5, 8),
    "composed": Net("tiny", 3, (8, 16), 4, 6, 1, 5, 8, (("column_widths", (1, 0.5, 0.25)), ("kernel_mix", 0.5))),
    "stem": Net("tiny", 2, (4, 8), 4, 4, 1, 5, 33, (("stem", "resnet"), ("last_pool", False))),
}
# For the compiler, which traces every unit of every kind of path: two columns have all kinds of units.
COMPILED = TINY | {
    "composed": Net("tiny", 2, (8, 16), 4, 4, 1, 5, 8, (("column_widths", (1, 0.5)), ("kernel_mix", 0.5)))
}
CELLS = (("fused", "bf16"), ("composed", "fp32"), ("stem", "fp16"))
AGAIN = ("graphs", "autotuned")
COMPILES = ("compiled", "own", *AGAIN)


@pytest.mark.parametrize("name, precision, against, drop_path", [
    *((*cell, against, "mixture") for cell, against in product(CELLS, bench_gpu_steps.AGAINST)),
    *((*cell, "eager", "off") for cell in CELLS),
    ("fused", "bf16", "own", "off"),
])  # fmt: skip
def test_the_steps_of_a_gpu_on_the_cpu(name, precision, against, drop_path, monkeypatch):
    """Every contender of a GPU's rows agrees with the others and steps; the compiler only traces here.

    The dense network's gradients are traced once; its other modes, of which there is none here, see the same graph.
    """
    for key, value in {"DEVICE": "cpu", "OURS": {"ours": "cpu", "triton": "reference"}}.items():
        monkeypatch.setattr(bench_gpu_steps, key, value)
    nets, backend = (COMPILED if against in COMPILES else TINY), "eager" if against in AGAIN else "aot_eager"
    monkeypatch.setitem(bench_gpu_steps.GPU_NETS, name, nets[name])
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compiler(f, backend=backend, **options))
    rows = []

    def compare(group, what, contenders, rounds, cycle=None, extra=None, case=None):
        for contender in contenders.values():
            contender(0)
            contender(rounds - 1)
        rows.append((group, set(contenders), extra({}), case))

    try:
        bench_gpu_steps.test_training_step(compare, name, 4, precision, drop_path, against)
    finally:
        bench_gpu_steps._kept.clear()
        torch._dynamo.reset()
    ((group, contenders, extra, case),) = rows
    assert group == "gpu_step" and contenders == {"ours", *bench_gpu_steps.AGAINST[against]}
    assert extra["tflop"] > 0 and case["drop_path"] == drop_path
    if against == "eager":
        assert 0 < extra["saved_mb_ungraphed"] < extra["saved_mb_eager"]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", list(TINY))
def test_the_eager_network_stays_in_its_layout_and_dtype(name, masked, monkeypatch):
    """Nothing that eager need not do is in its time: no convolution reads NCHW or float32 after the first."""
    plain = torch.Tensor.sum

    def of_cuda(t, *args, dtype=None, **options):  # whose autocast takes a sum in float32 unless told otherwise
        return plain(t, *args, dtype=dtype or (torch.float32 if t.is_floating_point() else None), **options)

    monkeypatch.setattr(torch.Tensor, "sum", of_cuda)
    _, public, _ = steps.three_nets(TINY[name])
    public.to(memory_format=torch.channels_last).drops = masked
    seen = []
    convs = [m for m in public.modules() if isinstance(m, torch.nn.Conv2d)]
    for conv in convs:
        conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(4, 3, TINY[name].image, TINY[name].image).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        public(x)
    assert len(seen) == len(convs) and all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
    assert all(t.dtype == torch.bfloat16 for t in seen if t is not x)


def saved_by(forward):
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        forward()
    return seen


@pytest.mark.parametrize("form", ["ours", "dense"])
@pytest.mark.parametrize("name", ["fused", "composed"])
def test_saved_bytes_count_no_casts_of_weights(name, form):
    """In whatever order a copy has the sizes of a weight."""
    ours, _, dense = steps.three_nets(TINY[name])
    x, path = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last), steps.full_path(TINY[name])
    model = ours if form == "ours" else dense
    call = (lambda: ours(x, path=path)) if form == "ours" else (lambda: dense(x, dense.full_masks()))
    with torch.autocast("cpu", torch.bfloat16):
        seen, counted = saved_by(call), evaluate.saved_bytes(model, call)
    sizes = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() > 1}
    casts = {t.data_ptr(): t.nbytes for t in seen if t.dtype == torch.bfloat16 and tuple(sorted(t.shape)) in sizes}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen}
    everything = sum(size for address, size in kept.items() if address not in own)
    assert len(casts) >= 3 and 0 < counted <= everything - sum(casts.values())


def test_the_headline_of_the_gpu_comes_first():
    rows = bench_gpu_steps.ROWS
    first = [("fractalnet20", 100, "bf16"), ("fractalnet40", 100, "bf16"), ("fractalnet34", 64, "bf16")]
    for start, drop_path in ((0, "mixture"), (9, "off")):
        assert rows[start : start + 3] == [(*cell, drop_path, "eager") for cell in first]
        compiled = [(*cell, drop_path, other) for cell in first for other in ("compiled", "graphs")]
        assert rows[start + 3 : start + 9] == compiled
    assert len(rows) == len(set(rows)) == 27 * 2 * 5 + 6
    cells = [row[:3] for row in rows[18:]]
    assert all(a == b or b not in cells[:i] for i, (a, b) in enumerate(pairwise(cells), 1))  # each at once
    assert all(net.paths % (2 * net.columns) == 0 for net in bench_gpu_steps.GPU_NETS.values())
