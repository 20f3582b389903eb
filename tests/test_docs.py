"""What the documentation shows runs: every docstring's example, Python block, example program and link."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import fractalnet
import fractalnet.interchange
import pytest
import torch

import fractal_kernels

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
]


def modules() -> list[str]:
    """Of both packages, without those that need what is not installed."""
    names = [
        info.name
        for package in (fractal_kernels, fractalnet)
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None)
        if not info.name.endswith(("__main__", "._C", "._cuda"))
    ]
    triton = importlib.util.find_spec("triton") is not None
    return [name for name in ("fractal_kernels", "fractalnet", *names) if triton or ".triton" not in name]


@pytest.mark.parametrize("name", modules())
def test_examples_of_docstrings(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0, "doctest prints what it got"


@pytest.mark.parametrize("package", [fractal_kernels, fractalnet], ids=lambda p: p.__name__)
def test_every_public_name_has_an_example(package):
    """But errors, and tuples that functions return."""
    public = {name: getattr(package, name) for name in package.__all__}
    results = [n for n, it in public.items() if isinstance(it, type) and issubclass(it, (Exception, tuple))]
    assert [n for n, it in public.items() if n not in results and ">>> " not in (it.__doc__ or "")] == []


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_run(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "theirs.pt" in block:
        net = fractalnet.create("fractalnet20", pool_order="after_join")
        torch.save(fractalnet.interchange.save(net, "pt.fractalnet"), "theirs.pt")
    exec(compile(block, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example, tmp_path):
    """As programs; whatever they train has learned something."""
    run = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    learned = [float(percent) for percent in re.findall(r"([\d.]+)%", run.stdout)]
    assert len(learned) >= 2 and min(learned) > 80, run.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
