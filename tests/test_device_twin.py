"""What a device that is not the CPU asks for, held without one: a twin of the CPU that PyTorch takes for a device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_on_the_twin_of_a_device():
    """In a process of its own, as the device stays: nothing of two devices meets, and the host waits for none."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "on_device_twin.py")]
    done = subprocess.run(command, cwd=HERE.parent, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    print(done.stdout[-6000:], done.stderr[-2000:])
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 50
