"""The 3x3 convolutions of the CPU backend against the definition in fp64, alone and on the block's path."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import mmap
import os
import random
import re
import threading
import time

import pytest
import torch
import unread
from test_backends import machine_has, python

from fractal_kernels import cpu_conv

THREADS = 2
# Of the largest value: 2**-24 for every operand, times the growth of transforms, and of sums over 256 channels or, in
# the gradient of a weight, 2**16 pixels.
TOLERANCE = 4e-6
# And of a number itself, to which its own dtype rounds it.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
HALVES = [torch.bfloat16, torch.float16]
OF_BOTH = [(dtype, dtype) for dtype in ROUNDING] + [(dtype, torch.float32) for dtype in HALVES]  # images, weights
# batch, input channels, output channels, height, width
SHAPES = [
    (0, 16, 32, 4, 4),
    (0, 16, 32, 9, 9),
    (1, 32, 16, 1, 1),
    (3, 16, 48, 2, 3),
    (2, 48, 16, 5, 4),
    (2, 80, 112, 3, 1),
    (4, 64, 64, 4, 4),  # the most tiles of which the gradient of the weight leaves no core
    (5, 64, 128, 9, 8),
    (3, 256, 96, 7, 7),
    (2, 512, 512, 2, 2),
    (33, 32, 16, 17, 15),  # the gradient of the weight in several passes
    (50, 48, 32, 13, 16),
    (41, 16, 32, 17, 15),  # and in parts, of which some have a tile more
    (2, 16, 16, 40, 70),
    (20, 32, 48, 7, 7),  # from here on, as those of more than 30 images: tiles of 4x4 pixels, if not all of them whole
    (30, 64, 32, 3, 5),
    (26, 128, 128, 4, 4),
    (4, 1024, 16, 16, 16),
    (64, 16, 16, 64, 64),
    (0, 3, 16, 4, 4),  # from here on: few channels
    (2, 1, 16, 1, 1),
    (1, 3, 48, 9, 5),
    (3, 13, 16, 2, 3),
    (40, 3, 48, 17, 15),  # the gradient of the weight in parts
    (2, 15, 80, 40, 70),  # and in bands of few rows
]


def images(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)


def operands(n, c, k, h, w, dtype=torch.float32, of_weight=None):
    """x, the second half of a wide weight, the gradient of the output."""
    torch.manual_seed(0)
    wide = torch.randn(2 * k, 3, 3, c, dtype=of_weight or dtype).permute(0, 3, 1, 2)
    return images(n, c, h, w, dtype=dtype), wide[k:], images(n, k, h, w, dtype=dtype)


def against_the_definition(kernel, n, c, k, h, w, dtype=torch.float32, of_weight=None):
    x, weight, grad = operands(n, c, k, h, w, dtype, of_weight)
    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    y64 = torch.conv2d(x64, w64, padding=1)
    dx64, dw64 = torch.autograd.grad(y64, (x64, w64), grad.double())
    full = torch.full((3 * k, 3, 3, c), float("nan"), dtype=weight.dtype).permute(0, 3, 1, 2)
    y, dx = kernel.conv(x, weight), kernel.conv_backward(grad, x, weight, True, full[k : 2 * k])
    terms = {"y": c / 2**8, "dx": k / 2**8, "dw": n * h * w / 2**16}
    for name, got, want in (("y", y, y64), ("dx", dx, dx64), ("dw", full[k : 2 * k], dw64)):
        assert got.shape == want.shape and got.dtype == (weight.dtype if name == "dw" else dtype)
        want = want.detach()
        tolerance = TOLERANCE * max(1.0, terms[name]) ** 0.5
        error = ((got - want).abs() - ROUNDING[got.dtype] * want.abs()).max().item() if want.numel() else 0.0
        assert error <= tolerance * (want.abs().max().item() if want.numel() else 0.0), (name, error)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert bool(full[:k].isnan().all() and full[2 * k :].isnan().all())  # nothing outside its slice
    again = torch.empty_like(weight)
    assert kernel.conv_backward(grad, x, weight, False, again) is None
    assert torch.equal(again, full[k : 2 * k])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("dtypes", OF_BOTH, ids=str)
def test_on_the_cpu(shape, dtypes, cpu_conv_here):
    against_the_definition(cpu_conv, *shape, *dtypes)


@pytest.mark.parametrize("seed", range(15))
def test_any_size(seed, cpu_conv_here):
    draw = random.Random(seed).randint
    channels = draw(1, 15) if seed % 3 == 0 else 16 * draw(1, 6)
    against_the_definition(cpu_conv, draw(0, (5, 50)[seed % 2]), channels, 16 * draw(1, 6), draw(1, 11), draw(1, 11))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_number_of_threads_changes_no_bit(shape, cpu_conv_here):
    x, weight, grad = operands(*shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            dweight = torch.empty_like(weight)
            dx = cpu_conv.conv_backward(grad, x, weight, shape[1] % 16 == 0, dweight)  # else the library's
            results.append([cpu_conv.conv(x, weight), dweight, *([] if dx is None else [dx])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize(("c", "k", "h", "w"), [(3, 16, 5, 5), (16, 16, 5, 5), (32, 32, 5, 5), (32, 32, 27, 26)])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_pixels_outside_the_image_are_zeros(c, k, h, w, dtype, cpu_conv_here):
    """Also where their neighbours in memory are not numbers. The batch and one image of it have tiles of one size."""
    n = 3
    x, weight, grad = operands(n, c, k, h, w, dtype)
    x[0], x[2], grad[0], grad[2] = (float("nan"),) * 4
    assert torch.equal(cpu_conv.conv(x, weight)[1:2], cpu_conv.conv(x[1:2], weight))
    if c % 16 == 0:  # else the library's
        dx = cpu_conv.conv_backward(grad, x, weight, True, torch.empty_like(weight))
        alone = cpu_conv.conv_backward(grad[1:2], x[1:2], weight, True, torch.empty_like(weight))
        assert torch.equal(dx[1:2], alone)


@pytest.mark.parametrize(
    ("channels", "many", "few"),
    [
        (32, (8, 2, 2), (1, 2, 2)),
        (16, (1, 2, 48), (1, 2, 34)),
        (32, (32, 4, 4), (25, 4, 4)),  # tiles of 4x4 pixels
        (16, (1, 4, 128), (1, 4, 100)),
        (3, (1, 2, 20), (1, 2, 9)),
    ],
)
def test_nothing_is_multiplied_that_was_left_in_memory(channels, many, few, cpu_conv_here):
    """Subnormal numbers there would make it slow. Here it is large ones, whose products raise the overflow flag."""
    found = ctypes.util.find_library("m")
    if found is None:
        pytest.skip("no C library of mathematics to ask for the flag")
    libm, overflow = ctypes.CDLL(found), 8  # FE_OVERFLOW of x86
    torch.set_num_threads(1)  # this one, whose flag it is
    first, second = (images(n, channels, h, w) for n, h, w in (many, few))
    ones = torch.ones(max(channels, 16), 3, 3, channels).permute(0, 3, 1, 2)
    cpu_conv.conv(first.fill_(1e25), ones)
    libm.feclearexcept(overflow)
    assert cpu_conv.conv(second.fill_(1e-20), 1e15 * ones).isfinite().all()
    assert not libm.fetestexcept(overflow)


def test_the_stride_of_one_image_is_any(cpu_conv_here):
    x, weight, grad = operands(4, 16, 32, 8, 9)
    one, dweight = x[::2][:1], torch.empty_like(weight)
    assert cpu_conv.fits(one, weight, "cpu")
    assert torch.equal(cpu_conv.conv(one, weight), cpu_conv.conv(x[:1], weight))
    cpu_conv.conv_backward(grad[::2][:1], one, weight, True, dweight)


def weight_of(k, c, dtype=torch.float32):
    return torch.randn(k, 3, 3, c, dtype=dtype).permute(0, 3, 1, 2)


def test_fits_only_where_it_was_measured(cpu_conv_here):
    weight = weight_of
    x = images(2, 512, 2, 2)
    assert cpu_conv.fits(x, weight(16, 512), "cpu")
    assert cpu_conv.fits(images(2, 32, 4, 4), weight(16, 32), "cpu")
    assert cpu_conv.fits(images(2, 3, 4, 4), weight(16, 3), "cpu")
    assert cpu_conv.fits(images(2, 256, 4, 4), weight(512, 256), "cpu")
    assert cpu_conv.fits(images(1, 128, 8, 8), weight(128, 128), "cpu")
    assert not cpu_conv.fits(images(1, 128, 9, 7), weight(128, 128), "cpu")  # of so few pixels the library's
    assert not cpu_conv.fits(images(0, 16, 8, 8), weight(16, 16), "cpu")  # which is dense in every order
    for other_x, other_weight, backend in (
        (images(2, 32, 4, 4), weight(16, 32), "reference"),
        (x, weight(4, 512), "cpu"),
        (x.contiguous(), weight(16, 512), "cpu"),
        (x, weight(16, 512).contiguous(), "cpu"),
        (x.double(), weight(16, 512).double(), "cpu"),
        (images(2, 32, 4, 4), weight(20, 32), "cpu"),
        (images(2, 36, 4, 4), weight(16, 36), "cpu"),
    ):
        assert not cpu_conv.fits(other_x, other_weight, backend)


@pytest.mark.parametrize("matrices", [False, True])
def test_fits_in_halves(matrices, monkeypatch, cpu_conv_here):
    """In bfloat16, PyTorch's has instructions of its own on some processors; but not for narrow images."""
    monkeypatch.setattr(cpu_conv, "_MATRICES", matrices)
    for dtype in HALVES:
        theirs, weight = matrices and dtype == torch.bfloat16, weight_of(16, 16, dtype)
        assert cpu_conv.fits(images(2, 16, 9, 4, dtype=dtype), weight, "cpu")
        assert cpu_conv.fits(images(2, 16, 4, 5, dtype=dtype), weight, "cpu") is not theirs
        assert cpu_conv.fits(images(2, 16, 4, 5), weight_of(16, 16), "cpu", dtype) is not theirs  # what they will be
        assert cpu_conv.fits(images(1, 16, 4, 4, dtype=dtype), weight, "cpu")  # of one image, too
    assert cpu_conv.fits(images(2, 16, 4, 5), weight_of(16, 16), "cpu")


def test_what_the_library_may_use(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        for limit, there in (("AVX512_CORE_BF16", False), ("AVX512_CORE_AMX", True), ("default", True), ("", True)):
            monkeypatch.setenv(name, limit)
            assert cpu_conv._multiplies_matrices() is there
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not cpu_conv._multiplies_matrices()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x, w, y: (y, x[:, :, :-1], w), "shapes of y, x and weight do not agree"),
        (lambda x, w, y: (y[:1], x, w), "shapes of y, x and weight do not agree"),
        (lambda x, w, y: (y, x, w[..., :2]), "shapes of y, x and weight do not agree"),
        (lambda x, w, y: (y[:, :16], x, w), "shapes of y, x and weight do not agree"),
        (lambda x, w, y: (images(2, 32, 3, 4), x, w), "shapes of y, x and weight do not agree"),
        (lambda x, w, y: (images(2, 32, 4, 3), x, w), "shapes of y, x and weight do not agree"),
        (lambda x, w, y: (y, images(2, 32, 4, 4), w), "shapes of y, x and weight do not agree"),
        (lambda x, w, y: (y, images(4, 16, 4, 4)[::2], w), "expected x dense in channels_last"),
        (lambda x, w, y: (images(2, 20, 4, 4), x, w[:20]), "expected channels in multiples of 16, got 16 and 20"),
        (lambda x, w, y: (images(2, 0, 4, 4), x, w[:0]), "expected channels in multiples of 16, got 16 and 0"),
        (lambda x, w, y: (y, x[:, :0], w[:, :0]), "expected channels in multiples of 16, got 0 and 32"),
        (lambda x, w, y: (y, x.double(), w), "expected x float32, bfloat16 or float16, and weights of its dtype or"),
        (lambda x, w, y: (y, x, w.half()), "expected x float32, bfloat16 or float16, and weights of its dtype or"),
        (lambda x, w, y: (y, x.half(), w.bfloat16()), "expected x float32, bfloat16 or float16, and weights of its"),
        (lambda x, w, y: (y, x.half(), w), "expected y of 4 dimensions and a dtype that goes with the others'"),
        (lambda x, w, y: (y.contiguous(), x, w), "expected y dense in channels_last"),
        (lambda x, w, y: (y, x, w.contiguous()), "expected weight dense in channels_last"),
        (
            lambda x, w, y: (y, images(2, 24, 4, 4), torch.randn(32, 3, 3, 24).permute(0, 3, 1, 2)),
            "expected channels in multiples of 16, got 24 and 32",
        ),
    ],
)
def test_wrong_operands_are_refused(wrong, words, cpu_conv_here):
    x, weight, y = images(2, 16, 4, 4), torch.randn(32, 3, 3, 16).permute(0, 3, 1, 2), images(2, 32, 4, 4)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        torch.ops.fractal_kernels_cpu.conv3x3(*wrong(x, weight, y), False)
    for dw, of_x, grad in (
        (weight, x, y[:1]),
        (weight, x, y[:, :16]),
        (weight, x, images(2, 32, 3, 4)),
        (weight, x, images(2, 32, 4, 3)),
        (weight, images(2, 32, 4, 4), y),
        (weight[:, :, :2], x, y),
        (weight[..., :2], x, y),
    ):
        with pytest.raises(RuntimeError, match="shapes of dweight, x and grad do not agree"):
            torch.ops.fractal_kernels_cpu.conv3x3_weight(dw, of_x, grad)
    for name, *wrong_one in (
        ("dweight", weight.contiguous(), x, y),
        ("x", weight, x.contiguous(), y),
        ("grad", weight, x, y.contiguous()),
    ):
        with pytest.raises(RuntimeError, match=f"expected {name} dense in channels_last"):
            torch.ops.fractal_kernels_cpu.conv3x3_weight(*wrong_one)
    for words, *wrong_one in (
        ("and weights of its dtype or float32", weight.half(), x, y),
        ("expected grad of 4 dimensions and a dtype", weight, x, y.half()),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.fractal_kernels_cpu.conv3x3_weight(*wrong_one)


def test_the_gradient_of_few_channels_is_refused(cpu_conv_here):
    """The library computes it."""
    grad, weight, dx = images(2, 8, 4, 4), torch.randn(8, 3, 3, 16).permute(0, 3, 1, 2), images(2, 16, 4, 4)
    with pytest.raises(RuntimeError, match="expected channels of the gradient in multiples of 16, got 8"):
        torch.ops.fractal_kernels_cpu.conv3x3(dx, grad, weight, True)


def resident() -> float:
    """MiB of memory of this process."""
    with open("/proc/self/statm") as sizes:
        return int(sizes.read().split()[1]) * mmap.PAGESIZE / 2**20


def what_a_thread_keeps() -> list[float]:
    """MiB after a weight's gradient that takes more than 64, after others that take 36 to 42, and when it has ended."""
    found = [resident()]

    def gradients(*channels: int) -> None:
        for c in channels:  # 16 * c**2 floats of sums
            x, weight = images(17, c, 1, 1), torch.empty(c, 3, 3, c).permute(0, 3, 1, 2)
            cpu_conv.conv_backward(x, x, weight, False, weight)
        del x, weight
        found.append(resident())

    thread = threading.Thread(target=lambda: (gradients(1040), gradients(768, 784, 800, 816, 832)))
    thread.start()
    thread.join()
    for _ in range(40):  # join() does not wait for the destructors
        if resident() - found[0] > 30:
            time.sleep(0.05)
    return [f - found[0] for f in (*found[1:], resident())]


KEPT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_conv3x3 as t
print(*t.what_a_thread_keeps())
"""


def test_buffers(cpu_conv_here):
    """A thread keeps none of more than 64 MiB, nothing when it ends, and not those that were too small."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this system does not say how much memory is in use")
    done = python(KEPT, os.path.dirname(__file__), MALLOC_MMAP_THRESHOLD_="1000000")  # what is freed is the system's
    assert done.returncode == 0, done.stderr[-3000:]
    large, others, ended = map(float, done.stdout.split())
    assert large < 40 and others < 100 and ended < 30, done.stdout


def nothing_around_images_is_read_or_written():
    """A process that does dies. In turn: few tiles, tiles of 2x2 and of 4x4 pixels that are not whole."""
    for (n, h, w), c, dtype in itertools.product([(2, 8, 8), (128, 1, 3), (128, 5, 3)], (16, 3), ROUNDING):
        y, grad, x = (unread.between_guards((n, 16, h, w), dtype) for _ in range(3))
        x, weight = x if c == 16 else x[:, :c].clone(), torch.ones(16, 3, 3, c, dtype=dtype).permute(0, 3, 1, 2)
        torch.ops.fractal_kernels_cpu.conv3x3(y, x, weight, False)
        torch.testing.assert_close(y, torch.conv2d(x.float(), weight.float(), padding=1).to(dtype))
        cpu_conv.conv_backward(grad, x, weight, c == 16, torch.empty_like(weight))


CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import test_conv3x3 as t
fits = t.cpu_conv.fits(*t.operands(2, 32, 16, 5, 4)[:2], "cpu")
for shape in t.SHAPES if fits else []:
    for dtypes in t.OF_BOTH:
        t.against_the_definition(t.cpu_conv, *shape, *dtypes)
if fits:
    for dtype in t.ROUNDING:
        t.test_pixels_outside_the_image_are_zeros(32, 32, 5, 5, dtype, None)
    t.nothing_around_images_is_read_or_written()
    try:
        t.test_nothing_is_multiplied_that_was_left_in_memory(32, (8, 2, 2), (1, 2, 2), None)
    except t.pytest.skip.Exception as reason:
        print("not checked:", reason, file=sys.stderr)
from fractal_kernels import _C
print("checked with", _C.simd_in_use(), fits)
"""


@pytest.mark.parametrize(("isa", "fits"), [("baseline", False), ("avx2", True), ("avx512", True)])
def test_instruction_sets(isa, fits, cpu_backend):
    if not machine_has(isa):
        pytest.skip(f"this machine has no {isa}: PyTorch sees {torch.backends.cpu.get_cpu_capability()}")
    done = python(CHECK, os.path.dirname(__file__), FRACTAL_CPU_ISA=isa)
    assert done.returncode == 0 and done.stdout == f"checked with {isa} {fits}\n", done.stdout + done.stderr[-3000:]
