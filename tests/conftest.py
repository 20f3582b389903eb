"""Poisoned memory, threads, seeds, the backends under test and the profile of the property tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from zlib import crc32

import cases
import pytest
import torch

from fractal_kernels import available_backends, backends

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine with a GPU and no network
    settings = None
    collect_ignore = ["test_properties.py"]

BACKENDS = ("reference", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIMULATED = os.environ.get("FRACTAL_SIMT", "")  # a library of the CUDA kernels that executes them on the host
TWIN = os.environ.get("FRACTAL_TWIN") == "1"  # the twin of a device has the place of a GPU: device_twin.py
GPU_BACKENDS = ("triton",) if INTERPRETED else ("cuda",) if SIMULATED or TWIN else ("triton", "cuda")
GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BACKENDS]
needs_gpu = pytest.mark.skipif(INTERPRETED or TWIN or bool(SIMULATED), reason="needs a GPU, not what has its place")
# Begun first: what takes minutes, so that two processes (``make test``) end together; and graphs and what only a GPU
# can show, which a round on one must not miss for want of time.
LONG = (
    "test_graphed.py",
    "test_graphed_changes.py",
    "test_graphed_training.py",
    "test_gpu.py",
    "test_triton.py",
    "test_cuda.py",
    "test_unread.py",
    "test_tiles.py",
    "test_study.py",
    "test_train.py",
)

TORTURE = int(os.environ.get("FRACTAL_TORTURE", "0"))  # examples of each property, others in every run

if settings is not None:
    settings.register_profile(
        "fractal",
        deadline=None,
        derandomize=not TORTURE,
        print_blob=True,
        max_examples=TORTURE or 40,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("fractal")


def pytest_report_header() -> str:
    return "" if settings else "test_properties.py left out: hypothesis is not installed"


def _poison() -> None:
    """Every torch.empty, empty_like, empty_strided and new_empty of the run holds NaN until it is written.

    FRACTAL_TEST_POISON=0: not, for tools that see reads of memory that nobody has written.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("FRACTAL_TEST_POISON") != "0"


def pytest_configure(config: pytest.Config) -> None:
    _poison()
    if SIMULATED:
        torch.ops.load_library(SIMULATED)
        backends._simulated = True
    if TWIN:
        import device_twin

        kernels = ExitStack()
        kernels.enter_context(device_twin.kernels())
        config.add_cleanup(kernels.close)
    if INTERPRETED:
        import quick_interpreter

        quick_interpreter.quicken(sanitize=os.environ.get("FRACTAL_INTERPRET") == "all")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N", help="every N-th of the tests, from the I-th")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Most of a test's time on Triton is compiling or interpreting: several processes share the suite, mixed, so that
    what they reach in a time is of every kind; of a GPU's backends, first the CUDA kernels, which are compiled."""
    first, of = map(int, config.getoption("--shard").split("/"))

    def order(item: pytest.Item) -> tuple[bool, int, int]:
        file = LONG.index(item.path.name) if item.path.name in LONG else len(LONG)
        if of == 1:
            return False, file, 0
        late = "triton" in item.nodeid or item.path.name in ("test_tiles.py", "test_tuning.py")  # Triton's alone
        return GPU_BACKENDS[-1] == "cuda" and late, file, crc32(item.nodeid.encode())

    items.sort(key=order)
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % of != first])
    items[:] = items[first::of]


@pytest.fixture(autouse=True)
def same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts from poisoned memory, one seed and its module's ``THREADS``, or one.

    Where processes share the cores, threads wait for each other's time slice at the end of every operator.
    """
    _poison()
    torch.manual_seed(0)
    torch.set_num_threads(getattr(request.module, "THREADS", 1))
    torch.backends.cudnn.allow_tf32 = False  # convolutions of a GPU round their factors by default
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield


def need_backend(name: str) -> None:
    """Fails without the extension, so that a broken build is never green; FRACTAL_TEST_NO_EXTENSION=1 allows it."""
    if name in available_backends():
        return
    if name in GPU_BACKENDS:
        pytest.fail(f"backend {name!r} is not available: {backends.why_not(name)}; deselect its tests: -m 'not gpu'")
    if os.environ.get("FRACTAL_TEST_NO_EXTENSION") == "1":
        pytest.skip(f"backend {name!r} is not available and FRACTAL_TEST_NO_EXTENSION=1")
    pytest.fail(f"backend {name!r} is not available; build the extension, or set FRACTAL_TEST_NO_EXTENSION=1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take a backend run on all of them; those of modules with ``GPU = True`` on a GPU's too."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize(
            "backend", [*BACKENDS, *(GPU if getattr(metafunc.module, "GPU", False) else [])], indirect=True
        )

    if "gpu_backend" in metafunc.fixturenames:
        metafunc.parametrize("gpu_backend", GPU, indirect=True)


@pytest.fixture
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on_backend(str(request.param)) as name:
        yield name


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on_backend(str(request.param)) as name:
        yield name


@contextmanager
def on_backend(name: str) -> Iterator[str]:
    """Whatever is made without a device is made where this backend runs, and no wider than it takes."""
    need_backend(name)
    if name in GPU_BACKENDS:
        cases.WIDEST = torch.float32
        torch.set_default_device("cpu" if INTERPRETED or SIMULATED else "twin" if TWIN else "cuda")
    try:
        yield name
    finally:
        cases.WIDEST = torch.float64
        torch.set_default_device("cpu")


@pytest.fixture
def cpu_backend() -> str:
    need_backend("cpu")
    return "cpu"


@pytest.fixture
def cpu_conv_here(cpu_backend) -> None:
    """The convolution of our own, for which a processor needs AVX2."""
    from fractal_kernels import _C

    if _C.simd_in_use() == "baseline":
        pytest.skip("this processor has neither AVX2 nor AVX-512")


@pytest.fixture
def refused(capsys):
    """Runs the command line, which must refuse the call with status 2 and one line that has these words in it."""
    from fractalnet.__main__ import main

    def check(argv, words):
        try:
            status = main(argv)
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr().err
        assert status == 2 and all(word in said for word in words), said
        assert len(said.splitlines()) == 1

    return check


@pytest.fixture
def packed():
    """The bytes of a model.pt of a network with these arguments, as a training on the digits leaves it."""
    from fractalnet import sources, trained
    from fractalnet.augment import Augment
    from fractalnet.config import Data

    def pack(model, arguments):
        images = sources.load("digits")
        facts = trained.facts(Data("digits"), Augment.of(images), images)
        return trained.pack(arguments, model.state_dict(), "tiny", {"seed": 0}, facts)

    return pack
