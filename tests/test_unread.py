"""What a mask drops is not loaded, for the batch or per sample: it lies in memory that may not be read."""

from __future__ import annotations

import pytest
from unread import read_nothing


def test_cpu():
    read_nothing("cpu")


def test_triton_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    read_nothing("triton", TRITON_INTERPRET="1")


def test_reading_is_seen():
    """The reference selects after it has loaded everything."""
    with pytest.raises(MemoryError, match="reference read what is dropped"):
        read_nothing("reference")
