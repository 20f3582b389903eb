"""Poisoned memory, threads, seeds, the backends under test and the profile of the property tests."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from fractal_kernels import available_backends

BACKENDS = ("reference", "cpu")
THREADS = 2

settings.register_profile(
    "fractal",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fractal")


def _poison() -> None:
    """Every torch.empty, empty_like, empty_strided and new_empty of the run holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_configure(config: pytest.Config) -> None:
    _poison()
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from poisoned memory, one seed and the same number of threads."""
    _poison()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield


def need_backend(name: str) -> None:
    """Fails without the extension, so that a broken build is never green; FRACTAL_TEST_NO_EXTENSION=1 allows it."""
    if name in available_backends():
        return
    if os.environ.get("FRACTAL_TEST_NO_EXTENSION") == "1":
        pytest.skip(f"backend {name!r} is not available and FRACTAL_TEST_NO_EXTENSION=1")
    pytest.fail(f"backend {name!r} is not available; build the extension, or set FRACTAL_TEST_NO_EXTENSION=1")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    need_backend(request.param)
    return str(request.param)


@pytest.fixture
def cpu_backend() -> str:
    need_backend("cpu")
    return "cpu"
