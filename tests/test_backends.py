"""What is available, what the report says, the library without its extension, and its instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fractal_kernels
from fractal_kernels import available_backends, backends, info

BLOCK = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "fractal_kernels._C":
            raise {error}

sys.meta_path.insert(0, Block())
import torch
import fractal_kernels as fk
"""
MISSING = BLOCK.format(error="ModuleNotFoundError('No module named fractal_kernels._C', name=name)")
BROKEN = BLOCK.format(error="ImportError('undefined symbol: aoti_torch_x')")


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    root = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, **env}
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *args] if code else [sys.executable, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_available_backends(cpu_backend):
    assert available_backends()[:2] == ("cpu", "reference")
    assert all(not backends.why_not(name) for name in available_backends())


@pytest.mark.parametrize("lacking, expected", [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "reference")])
def test_automatic_on_a_gpu(lacking, expected, monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, device: "why" if name in ("cpu", *lacking) else "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda")
    assert backends.resolve("join", None, device, torch.bfloat16) == expected
    assert backends.resolve("join", None, device, torch.float64) == "reference"


def test_automatic_leaves_triton_where_it_may_not_run(monkeypatch):
    """It is there, and still: the interpreter, AMD's devices, old ones."""
    monkeypatch.setattr(backends, "why_not", lambda name, device: "why" if name in ("cpu", "cuda") else "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends, "_interpreted", False)
    device = torch.device("cuda")
    assert backends.automatic(device, torch.float32) == "triton"
    for module, name, value in (
        (backends, "_interpreted", True), (torch.version, "hip", "6.0"),
        (torch.cuda, "get_device_capability", lambda index: (7, 5)), (torch.cuda, "is_available", lambda: False),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert backends.automatic(device, torch.float32) == "reference"


def test_triton_without_a_c_compiler(monkeypatch):
    """Its first launch would fail, with words of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_has_triton", True)
    monkeypatch.setattr(backends, "_interpreted", False)
    for there, said in ((True, ""), (False, "Triton's launches need a C compiler; install gcc, or name one by CC")):
        monkeypatch.setattr(backends, "_has_c_compiler", lambda there=there: there)
        assert backends.why_not("triton") == backends.why_not("triton", torch.device("cuda:0")) == said
    with pytest.raises(
        fractal_kernels.BackendUnavailable, match="join: expected backend .* got 'triton': Triton's launches"
    ):
        backends.resolve("join", "triton", torch.device("cuda:0"), torch.float32)


@pytest.mark.parametrize("there, expected", [(("clang",), True), ((), False)])
def test_a_c_compiler_is_looked_for_once(there, expected, monkeypatch):
    asked = []
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backends.shutil, "which", lambda name: asked.append(name) or (name if name in there else None))
    backends._finds_c_compiler.cache_clear()
    assert backends._has_c_compiler() == backends._has_c_compiler() == expected and asked == ["gcc", "clang"]
    backends._finds_c_compiler.cache_clear()


def test_report_names_the_automatic_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "automatic", lambda device, dtype: "cuda")
    monkeypatch.setattr(backends, "_good", {0})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("FRACTAL_BACKEND", "cpu")
    assert "CUDA device: ops on its tensors use the backend 'cuda' unless another is named" in info.report()


def test_report(cpu_backend):
    report = info.report()
    for words in (
        f"fractal_kernels {fractal_kernels.__version__}",
        f"torch {torch.__version__}",
        "extension: compiler ",
        "torch_target 2.11",
        "backend cpu: available",
        "backend reference: available",
    ):
        assert words in report


def test_report_as_a_command(cpu_backend):
    done = python("", "-m", "fractal_kernels.info")
    assert done.returncode == 0 and "backend cpu: available" in done.stdout, done.stderr


def test_build_info(cpu_backend):
    module, problem = backends.extension()
    assert module is not None and problem == ""
    build = module.build_info()
    assert {"compiler", "torch_target", "torch_built_against", "simd"} <= set(build)
    assert "baseline" in build["simd"]


def test_public_names():
    for name in fractal_kernels.__all__:
        assert getattr(fractal_kernels, name).__doc__, name


WORKS = """
from fractal_kernels import info
assert fk.available_backends()[0] == "reference"
ys = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
fk.masked_mean_join(ys, torch.tensor([True, False])).sum().backward()
fk.bn_relu_join(ys, None, None, None, None, training=True, pool="before").sum().backward()
fk.ConvBNReLU(3, 4)(ys[0]).sum().backward()
torch.compile(fk.masked_mean_join, backend="aot_eager", fullgraph=True)(ys)
report = info.report()
print(report)
assert "extension: missing: " in report and "backend cpu: unavailable: " in report
assert "backend reference: available" in report and "FRACTAL_BUILD=cpu pip install" in report
try:
    fk.masked_mean_join(ys, backend="cpu")
except fk.BackendUnavailable as error:
    assert "masked_mean_join: expected backend" in str(error) and "FRACTAL_BUILD=cpu pip install" in str(error)
else:
    raise SystemExit("a named backend fell back")
print("works")
"""


def test_without_the_extension():
    done = python(MISSING + WORKS)
    assert done.returncode == 0 and "works" in done.stdout, done.stderr
    assert "was not built" in done.stdout and "C++ compiler" in done.stdout


def test_with_an_extension_that_does_not_load():
    """Built against another PyTorch: the linker's words, and what to do."""
    done = python(BROKEN + WORKS)
    assert done.returncode == 0 and "works" in done.stdout, done.stderr
    assert "does not load (undefined symbol: aoti_torch_x)" in done.stdout and "rebuild it" in done.stdout


def test_what_an_extension_itself_lacks_is_not_hidden(monkeypatch):
    def lacking(name):
        raise ModuleNotFoundError("No module named 'other'", name="other")

    with monkeypatch.context() as patched, pytest.raises(ModuleNotFoundError, match="other"):
        patched.setattr(backends.importlib, "import_module", lacking)
        backends._load("_C", "cpu", "C++", "a C++ compiler")


def test_environment_names_a_missing_backend():
    code = MISSING + "fk.masked_mean_join([torch.ones(1, 1)])"
    done = python(code, FRACTAL_BACKEND="cpu")
    assert done.returncode == 1 and "BackendUnavailable: masked_mean_join: expected FRACTAL_BACKEND" in done.stderr
    assert python(code, FRACTAL_BACKEND="reference").returncode == 0


def test_import_is_quiet():
    done = python("import fractal_kernels")
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""


# --- instruction sets --------------------------------------------------------------------------


def test_importing_brings_no_compiler():
    """It takes longer than everything else that an import does."""
    done = python("import sys, fractal_kernels; print(*({'torch._dynamo', 'triton', 'sympy'} & set(sys.modules)))")
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


ISA_CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import unread
from cases import Case, check, draw
from fractal_kernels import masked_mean_join
for case in (Case(3), Case(5, mask="sample", stats="live", pool="before"), Case(2, pool="after", activation="output"),
             Case(3, affine=False, normalise=False, mask="batch"), Case(4, training=False, mask="sample")):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for layout in ("channels_last", "contiguous", "channel_slice"):
            for channels in (3, 16, 37):
                check(case, draw(case, dtype, (3, channels, 7, 6), [layout]), "cpu")
unread.ends("cpu")
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):  # what is written past the caches
    ys = [torch.randn(16 // dtype.itemsize, 64, 56, 56).to(dtype).requires_grad_()]
    ys += [ys[0].detach().requires_grad_() for _ in range(7)]
    out = masked_mean_join(ys, backend="cpu")
    torch.testing.assert_close(out, ys[0])
    assert all(torch.equal(g, ys[0] / 8) for g in torch.autograd.grad(out, ys, ys[0]))
from fractal_kernels import _C
print("checked with", _C.simd_in_use())
"""


def machine_has(isa: str) -> bool:
    if isa == "baseline":
        return True
    capability = torch.backends.cpu.get_cpu_capability()
    return capability.startswith("AVX512") or (isa == "avx2" and capability == "AVX2")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa, cpu_backend):
    if not machine_has(isa):
        pytest.skip(f"this machine has no {isa}: PyTorch sees {torch.backends.cpu.get_cpu_capability()}")
    done = python(ISA_CHECK, os.path.dirname(__file__), FRACTAL_CPU_ISA=isa)
    assert done.returncode == 0 and done.stdout.endswith(f"\nchecked with {isa}\n"), done.stdout + done.stderr[-3000:]


HALVES_CHECK = """
import torch
from fractal_kernels import _C, bn_relu_join, masked_mean_join
from fractal_kernels.library import Flags
from fractal_kernels.ops.join import _PlainJoin
every = torch.arange(1 << 16).to(torch.int16).view(1, 64, 32, 32)
for dtype in (torch.float16, torch.bfloat16):
    a = every.view(dtype)
    same = masked_mean_join([a], backend="cpu")
    assert torch.equal(same.isnan(), a.isnan()) and torch.equal(same[~same.isnan()], a[~a.isnan()])
    steps = torch.tensor([0.0, 2.0**-24, 0.5, 8.0, 15.99, 16.0, 2.0**100])
    for b in (*steps, *-steps):
        b = b.to(dtype).expand(a.shape)
        got, want = _PlainJoin.apply(int(Flags.SUM), "cpu", None, a, b), (a.float() + b.float()).to(dtype)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got[~got.isnan()], want[~want.isnan()]), b
    b = (every + 1).view(dtype)
    nan, zeros, ones = torch.full((64,), 0x7FFFFFFF).int().view(torch.float32), [torch.zeros(64)], [torch.ones(64)]
    for bias in (nan, -nan):  # of all ones, whose rounding must not carry into the sign, nor past it
        assert bn_relu_join([a], None, [bias], zeros, ones, backend="cpu").isnan().all()
    got, want = masked_mean_join([a, b], backend="cpu"), ((a.float() + b.float()) / 2).to(dtype)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got[~got.isnan()], want[~want.isnan()])
print("checked with", _C.simd_in_use())
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_half(isa, cpu_backend):
    """Of 16 bits: each is kept, and sums and means are rounded as PyTorch does, ties, subnormals, infinities too."""
    if not machine_has(isa):
        pytest.skip(f"this machine has no {isa}: PyTorch sees {torch.backends.cpu.get_cpu_capability()}")
    done = python(HALVES_CHECK, FRACTAL_CPU_ISA=isa)
    assert done.returncode == 0 and done.stdout == f"checked with {isa}\n", done.stdout + done.stderr[-3000:]
