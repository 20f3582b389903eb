"""The CUDA kernels without a GPU: executed on the host (tests/simt), and as machine code.

``make test`` executes them, ``make simt`` every instance, and compiles them where there is an nvcc. On a GPU they run
with ``-m gpu``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_code
import pytest
import torch
from cases import Case, all_flags, check, draw, plain_flags
from conftest import INTERPRETED, SIMULATED
from unread import read_nothing

from fractal_kernels import BackendUnavailable, available_backends, backends, bn_relu_join, masked_mean_join

HERE = Path(__file__).resolve().parent
SUITE = [
    str(HERE / name)
    for name in ("test_ops.py", "test_edges.py", "test_shortcut.py", "test_running.py", "test_gpu.py", "test_cuda.py")
]
# By the sanitizers: all flags, and what is at the edges.
EDGES = "all_flags or plain_flags or vector or empty_batch or pools_of_odd_sizes or other_ranks or everything_dropped"
EDGES += " or test_edges"
needs_compiler = pytest.mark.skipif(cuda_code.compiler() is None, reason="needs a C++ compiler: c++ or g++")
thorough = pytest.mark.skipif(os.environ.get("FRACTAL_CUDA") != "all", reason="for make simt: FRACTAL_CUDA=all")
needs_nvcc = pytest.mark.skipif(
    not all(map(cuda_code.tool, ("nvcc", "nvdisasm"))), reason="needs nvcc and nvdisasm of the CUDA toolkit"
)
outside = pytest.mark.skipif(bool(SIMULATED), reason="runs in the process that starts the others")


# --- executed on the host ------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "channel_slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vector_loads(dtype, layout, gpu_backend):
    """Every flag and number of branches where all loads are aligned; test_ops.py's shapes are odd."""
    if gpu_backend != "cuda":
        pytest.skip("for the CUDA kernels, which have other instances for aligned tensors")
    for i, case in enumerate([*all_flags(), *plain_flags()]):
        if SIMULATED and i % 3 != (torch.float32, torch.bfloat16, torch.float16).index(dtype):
            continue
        data = draw(case, dtype, (3, 16, 6, 16), [layout])
        if layout == "channel_slice":  # 3 channels into the buffer is not aligned, 8 are
            data.ys = [_aligned_slice(y) for y in data.ys]
        check(case, data, gpu_backend)


def _aligned_slice(y):
    n, c, h, w = y.shape
    buffer = torch.full((n, h, w, c + 16), float("nan"), dtype=y.dtype, device=y.device)
    return buffer[..., 8 : 8 + c].movedim(-1, 1).copy_(y.detach()).requires_grad_()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 16, 4, 16), (2, 5, 5, 7)], ids=["aligned", "odd"])
def test_number_of_branches_and_dtypes(shape, gpu_backend):
    """Each number of branches in each dtype, with and without pooling, in both layouts."""
    if gpu_backend != "cuda":
        pytest.skip("for the CUDA kernels, which are instances: Triton would compile 144 programs, for minutes")
    for k in range(1, 9):
        for pool in (None, "before", "after"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for layout in ("channels_last", "contiguous"):
                    case = Case(k, pool=pool, mask=("none", "sample")[k % 2])
                    check(case, draw(case, dtype, shape, [layout]), gpu_backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_of_a_vector(dtype, gpu_backend):
    """Contiguous pixels that half a load divides and a whole one does not: 6 of float32, 12 of half precision."""
    if gpu_backend != "cuda":
        pytest.skip("for the CUDA kernels, which have instances for it")
    shape = (2, 3, 3, 2) if dtype == torch.float32 else (2, 3, 6, 2)
    for k in (1, 2, 3, 4, 8):
        case = Case(k, mask=("none", "sample")[k % 2])
        check(case, draw(case, dtype, shape, ["contiguous"]), gpu_backend)


@pytest.mark.gpu
@pytest.mark.skipif(SIMULATED and os.environ.get("FRACTAL_CUDA") != "all", reason="half a minute: for make simt")
def test_more_channels_than_a_grid_has_rows(gpu_backend):
    """Blocks take several groups of channels: sums begin anew, and shared memory is free before it is written again."""
    if SIMULATED and gpu_backend != "cuda":
        pytest.skip("the interpreter's blocks take minutes")
    y, grad, results = torch.randn(2, 65_535 + 465, 1, 3), torch.randn(2, 65_535 + 465, 1, 3), []
    for backend in ("reference", gpu_backend):
        leaf = y.clone().requires_grad_()
        out = bn_relu_join([leaf], None, None, None, None, training=True, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaf, grad)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(16, 8, 32, 32), (3, 33, 7, 5), (64, 3, 1, 1)], ids=str)
def test_variance_far_from_zero(shape, layout, gpu_backend):
    """A mean of 500,000 standard deviations takes nothing from the variance: origins are subtracted before means."""
    if gpu_backend != "cuda":
        pytest.skip("for the CUDA kernels, which keep an origin")
    y = (torch.randn(shape) + 5e5).contiguous(memory_format=layout)
    exact = y.double().transpose(0, 1).flatten(1).var(1, correction=0)
    _, var, _ = torch.ops.fractal_kernels.channel_stats([y], None, [], 0.0, None, gpu_backend)
    torch.testing.assert_close(var[0].double(), exact, rtol=2e-6, atol=0)


@pytest.mark.gpu
def test_many_partials(gpu_backend):
    """Threads of a merge take several, and several batches: of 256 blocks and more."""
    if INTERPRETED:
        pytest.skip("blocks of the interpreter take minutes")
    for case in (Case(1), Case(1, mask="sample", stats="live")):
        check(case, draw(case, torch.float32, (7, 1, 149, 149)), gpu_backend)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    # Optimising takes the compiler longer than it could save these short runs.
    return cuda_code.host_library(tmp_path_factory.mktemp("simt"), ["-O0"])


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return cuda_code.host_library(tmp_path_factory.mktemp("sanitized"), flags)


# Of several workers, which share the cores, each has one: a second would only import PyTorch once more.
SHARDS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def execute(library: Path, select: str, shards: int = 1, **environment: str) -> str:
    """The operators' tests on the kernels of this library, in processes of their own."""
    env = {**os.environ, "FRACTAL_SIMT": str(library), "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *SUITE]
    command += ["-k", select] if select else []
    running = [
        subprocess.Popen(
            [*command, "--shard", f"{i}/{shards}"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(shards)
    ]
    output = ""
    for process in running:
        text, _ = process.communicate(timeout=1100)
        assert process.returncode == 0 and " passed" in text, text[-5000:]
        output += text
    return output


@needs_compiler
@outside
def test_every_flag_executed(library):
    """Against the oracle; in every dtype and shape, all instances: the next test."""
    more = "running_statistics or pools_of_odd_sizes or dropped_branches or strides_of_2_31 or far_from_zero or windows"
    more += " or equals_the_oracle or shortcut"
    execute(library, f"all_flags or plain_flags or number_of_branches or test_edges or {more}", shards=SHARDS)


@needs_compiler
@outside
def test_several_hundred_blocks(library):
    execute(library, "many_partials", FRACTAL_SIMT_PROCESSORS="1000")


@needs_compiler
@outside
@thorough
def test_every_kernel_executed(library, tmp_path):
    """Every flag, layout and dtype against the oracle; every instance of every kernel has run."""
    ran = tmp_path / "kernels.txt"
    execute(library, "", shards=SHARDS, FRACTAL_SIMT_KERNELS=str(ran))
    seen, there = set(ran.read_text().split()), cuda_code.kernels_of(library)
    assert len(there) > 100
    assert not there - seen, cuda_code.demangled(there - seen)


@needs_compiler
@outside
@pytest.mark.parametrize("what", ["dropped", "ends"])
def test_what_is_not_to_be_loaded(what, library):
    read_nothing("cuda", what, FRACTAL_SIMT=str(library))


PRINT_RESULTS = """
import hashlib, torch, conftest
from cases import Case, draw, run
conftest.pytest_configure(None)
for case in (Case(mask="sample"), Case(mask="sample", stats="live", pool="before"), Case(8, pool="after"), Case(1)):
    for layout in ("channels_last", "contiguous"):
        for shape in ((8, 32, 12, 16), (4, 5, 6, 7)):
            result = run(case, draw(case, torch.float32, shape, [layout]), "cuda")
            tensors = [result.out.detach(), *result.grads, *result.running]
            print(case, layout, shape, *(hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for t in tensors))
"""


@needs_compiler
@outside
def test_order_of_threads(library):
    """The same bits in whatever order threads and blocks run."""
    env = {**os.environ, "FRACTAL_SIMT": str(library), "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    results = {
        order: cuda_code.run([sys.executable, "-c", PRINT_RESULTS], env={**env, "FRACTAL_SIMT_ORDER": order})
        for order in ("forward", "backward", "random:1")
    }
    assert len(results["forward"].splitlines()) == 16
    assert len(set(results.values())) == 1


@needs_compiler
@outside
@thorough
def test_sanitizers(sanitized):
    """Out of bounds, misaligned and undefined: none, also outside of shared memory."""
    run = subprocess.run([cuda_code.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    preload = run.stdout.strip()
    assert Path(preload).is_absolute(), preload
    options = "detect_leaks=0:detect_stack_use_after_return=0"  # Python's own leaks are none of the kernels'
    execute(sanitized, EDGES, shards=SHARDS, LD_PRELOAD=preload, ASAN_OPTIONS=options)


# --- machine code --------------------------------------------------------------------------------


@needs_nvcc
@thorough
@outside
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code(capability, tmp_path):
    """No spills, stack or float64; registers for the blocks that are to fit; one instruction a load and a store."""
    codes = list(cuda_code.machine_code(tmp_path, capability))
    assert len(codes) == 3 * (3 * 35 + 4) + 2
    for code in codes:
        assert code.spills == code.stack == code.double == 0, code
        assert code.registers <= 65536 // (128 * code.blocks), code
        if code.kernel == "merge_stats":  # several partials on their way at once; running statistics, their momentum
            assert code.loads["LDG.E"] == 32 + 3, code
        if code.lanes == 1:
            continue
        elements = 1 if code.window == 1 else 2 if code.axis == "pixels" else 4
        assert code.loads[code.load] >= code.branches * elements, code
        assert not any(name.startswith(("LDG.E.U16", "LDG.E.S")) for name in code.loads), code
        if code.branches <= 3 and code.window == 1:
            half = code.axis == "channels" and code.kernel in ("join_forward", "join_backward_apply")
            if code.axis == "pixels":  # of each kernel there are both
                half = code.lanes == (2 if code.element == "float" else 4)
            assert code.bytes == (8 if half else 16), code
            if code.kernel in ("join_forward", "join_backward_apply"):
                assert set(code.stores) == {"STG.E.64" if half else "STG.E.128"}, code
                units, tensors = 4 if code.branches == 1 else 2, code.branches + (code.kernel == "join_backward_apply")
                assert code.first >= units * tensors, code  # all of them on their way before the first is used


# --- dispatch ------------------------------------------------------------------------------------


@outside
def test_not_built(monkeypatch):
    missing = backends._load("_cuda_of_no_build", "cuda", "CUDA", "nvcc, a C++ compiler")
    monkeypatch.setattr(backends, "_cuda", missing)
    assert "cuda" not in available_backends()
    with pytest.raises(BackendUnavailable, match="got 'cuda': the CUDA extension was not built; with nvcc") as error:
        masked_mean_join([torch.ones(2, 3)], backend="cuda")
    assert "FRACTAL_BUILD=cuda pip install" in str(error.value)


@outside
@pytest.mark.parametrize("version, accepted", [("12.8", False), ("13.2", True), (None, True)])
def test_other_cuda(version, accepted, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    module, reason = backends._of_this_cuda(Module, "")
    assert (module is Module) == accepted
    assert accepted or ("built by nvcc 13.0" in reason and "is of CUDA 12.8" in reason)
    assert backends._of_this_cuda(None, "why") == (None, "why")


class Module:
    """Stands in for an extension whose kernels do not run on the device."""

    @staticmethod
    def build_info():
        return {"cuda": "13.0"}

    @staticmethod
    def problem(device):
        return f"no kernels were built for device {device}"


@outside
def test_problem_of_the_driver(monkeypatch):
    """A driver that is too old is no device to PyTorch, and the remedy is said all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "_cuda", (Module, ""))
    assert backends.why_not("cuda") == "PyTorch sees no CUDA device: no kernels were built for device 0"
    assert backends.why_not("cuda", torch.device("cuda")) == ""  # of a fake tensor


@outside
def test_problem_of_the_device(monkeypatch):
    monkeypatch.setattr(backends, "_cuda", (Module, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(backends, "_good", {2})
    assert backends.why_not("cuda") == "no kernels were built for device 5"
    assert backends.why_not("cuda", torch.device("cuda", 3)) == "no kernels were built for device 3"
    assert backends.why_not("cuda", torch.device("cuda", 2)) == ""
    assert "cuda" not in available_backends() and "reference" in available_backends()
    assert "the inputs are on cpu" in backends.why_not("cuda", torch.device("cpu"))


@outside
def test_a_problem_may_pass(monkeypatch):
    """It is asked for again until there is none."""
    said = ["out of memory"]
    monkeypatch.setattr(backends, "_cuda", (SimpleNamespace(problem=lambda index: said[0]), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_good", set())
    for _ in range(2):
        assert backends.why_not("cuda", torch.device("cuda", 1)) == "out of memory"
    said[0] = ""
    assert backends.why_not("cuda", torch.device("cuda", 1)) == ""


@outside
def test_float64_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "_simulated", True)
    with pytest.raises(TypeError, match="on the backend 'cuda', got float64"):
        masked_mean_join([torch.ones(2, 3, dtype=torch.float64)], backend="cuda")
