"""What is made of a GPU's results: the summary, the README's tables, the plots. The figures here are made up."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import gpu_plots, gpu_report, report


def contenders(**figures):
    ours = figures["ours"]
    ratios = {name: {"figures": value / ours} for name, value in figures.items() if name != "ours"}
    return {"contenders": {name: {"figure": value} for name, value in figures.items()}, "ratios": ratios}


def kernel(op, backend, share, dtype="bf16", layout="nhwc"):
    case = {"op": op, "direction": "forward", "backend": backend, "dtype": dtype, "layout": layout, "shape": [2, 64]}
    extra = {"gb_per_s": 4000 * share, "share_of_copy": share, "device_ms": 0.9}
    what = f"{backend} {op} {dtype} {layout}"
    return {"group": "gpu", "what": what, "unit": "ms", "extra": extra, "case": case, **contenders(ours=1, copy=share)}


def join(backend, **figures):
    row = kernel("bn_relu_join", backend, 1.0) | contenders(**figures)
    return row | {"what": f"{backend} bn_relu_join forward", "extra": {}}


FIGURES = {"ours": 2.0, "triton": 3.0, "ungraphed": 8.0, "eager": 14.0}


def step(net, batch=100, drop_path="mixture", **figures):
    figures = figures or FIGURES | {"compiled": 7.0, "compiled_graphs": 5.0}
    case = {"net": net, "batch": batch, "precision": "bf16", "drop_path": drop_path}
    extra = {"tflop": 0.5, "peak_mb_ungraphed": 100.0, "peak_mb_eager": 250.0, "peak_mb_compiled": 200.0}
    extra |= {"saved_mb_ungraphed": 40.0, "saved_mb_eager": 100.0}
    what = f"training step {net} {batch} {drop_path}"
    return {"group": "gpu_step", "what": what, "unit": "ms", "extra": extra, "case": case, **contenders(**figures)}


def memory():
    row = {"group": "gpu_memory", "what": "saved for backward, cuda bn_relu_join", "unit": "MB", "extra": {}}
    return row | contenders(ours=100.0, eager=300.0, compiled=200.0)


RESULT = {
    "machine": {
        "device": "Test GPU", "cores": 16, "simd": "AVX512", "torch": "2.11.0", "cuda": "13.0", "copy_gb_per_s": 4000.0,
        "bf16_tflop_per_s": 700.0, "clocks": "1980 MHz",
    },
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "0123456789abcdef",
    "command": "python -m benchmarks.gpu --stages kernels,steps",
    "stages": {"kernels": {"seconds": 90.0, "said": "20 rows; 20 passed", "failed": False}},
    "rows": [
        kernel("forward", "triton", 0.9), kernel("forward", "cuda", 0.95), kernel("stats", "cuda", 0.8, "fp32"),
        kernel("forward", "cuda", 0.4, layout="nchw"), kernel("apply_pool", "triton", 0.7),
        join("cuda", ours=1.0, eager=6.0, compiled=2.0, compiled_max=1.5), step("fractalnet20", **FIGURES),
        step("fractalnet20", ours=4.0, compiled=14.0, compiled_graphs=10.0), step("fractalnet40", drop_path="off"),
        memory(),
    ],
}  # fmt: skip


def test_what_the_readme_says_beside_the_figures():
    """Which eager that was, tests that passed, what graphs hold, kernels of one branch apart from those of three."""
    result = copy.deepcopy(RESULT)
    text = gpu_report.markdown(result, "name")
    assert gpu_report.OLD_EAGER in text and "Tests on this GPU" not in text
    for row in result["rows"]:
        if row["group"] == "gpu_step":
            row["extra"] |= {"eager": "channels_last", "graph_mb": 321.0}
    result["rows"].append(kernel("forward", "cuda", 0.6))
    result["rows"][-1]["case"]["branches"] = 1
    result["stages"]["test"] = {"seconds": 9.0, "said": "5 passed, 2 skipped; 7 passed before", "failed": False}
    text = gpu_report.markdown(result, "name")
    assert gpu_report.OLD_EAGER not in text and "; graphs hold 321 MB" in text
    assert "Tests on this GPU: 5 passed, 2 skipped; 7 passed before." in text
    assert "| forward, 1 branch | bf16 |" in text and "60 %" in text


def test_summary_fits_a_screen():
    text = gpu_report.summary(RESULT)
    for words in ("Test GPU", "copy 4000 GB/s", "fractalnet20", "7.00×", "2.50×", "95 %", "40 %", "kernels: 90 s"):
        assert words in text, text
    large = copy.deepcopy(RESULT)
    large["rows"] += [kernel(f"op{i}", "cuda", 0.5) for i in range(100)]
    large["rows"] += [step(f"net{i}") for i in range(100)] + [memory() for _ in range(20)]
    said = "\n".join(f"line {i} " + "x" * 300 for i in range(50))
    large["stages"] = {name: {"seconds": 1.0, "said": said, "failed": True} for name in "abcdefgh"}
    lines = gpu_report.summary(large).splitlines()
    assert len(lines) <= 60 and any("FAILED" in line for line in lines)


def test_tables_of_the_readme():
    text = gpu_report.markdown(RESULT, "test-gpu-0123456789")
    # The best torch.compile is the faster of its modes.
    assert (
        "| fractalnet20 | 100 | bf16 | mixture | 2.00 ms | 7.00× | 2.50× | 1.50× | 4.00× | 100 MB, 0.40 of eager's "
        "| 40.0 MB, 0.40 of eager's |" in text
    )
    assert "| forward | bf16 | 3600 GB/s, 90 % | 3800 GB/s, 95 % | – |" in text
    assert "| bn_relu_join forward | bf16 | – | – | 1.50× |" in text
    assert "| saved for backward, cuda bn_relu_join | 100 MB | 3.00× | 2.00× |" in text
    assert "0123456789, `python -m benchmarks.gpu --stages kernels,steps`" in text
    assert "(benchmarks/results/test-gpu-0123456789-roofline.svg)" in text


def test_what_was_not_measured_has_no_column():
    rows = [kernel("forward", "cuda", 0.95), step("fractalnet20", ours=1.0, eager=3.0)]
    text = gpu_report.markdown(RESULT | {"rows": rows}, "test-gpu")
    assert "| op | dtype | CUDA |\n|---|---|---:|\n| forward | bf16 | 3800 GB/s, 95 % |" in text
    assert "torch.compile |" not in text and "Triton |" not in text and "vs eager |" in text


def test_the_time_of_the_device_counts():
    row = kernel("forward", "cuda", 0.5)
    row["extra"] |= {"device_gb_per_s": 3600.0, "device_share_of_copy": 0.9}
    assert "3600 GB/s, 90 %" in gpu_report.markdown(RESULT | {"rows": [row]}, "test-gpu")


def test_plots_are_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    first, second = (gpu_plots.plot(RESULT, tmp_path / name, "test-gpu") for name in "ab")
    assert [path.name for path in first] == [f"test-gpu-{kind}.svg" for kind in ("kernels", "steps", "roofline")]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() and one.stat().st_size > 5000


@pytest.fixture
def readme(monkeypatch, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(report.README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "README", path)
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "cpu.json").write_bytes((report.RESULTS / "cpu.json").read_bytes())
    return path, folder


def test_results_of_a_gpu_reach_the_readme(readme, capsys):
    pytest.importorskip("matplotlib")
    path, folder = readme
    assert report.main(["--write", "--results", str(folder)]) == 0
    assert report.main(["--check", "--results", str(folder)]) == 0
    assert gpu_report.NOT_MEASURED in path.read_text("utf-8")
    (folder / "test-gpu-0123456789.json").write_text(json.dumps(RESULT))
    assert report.main(["--check", "--results", str(folder)]) == 1
    assert "stale" in capsys.readouterr().err
    assert report.main(["--write", "--results", str(folder)]) == 0
    assert report.main(["--check", "--results", str(folder)]) == 0
    text = path.read_text("utf-8")
    assert "| fractalnet20 | 100 |" in text and gpu_report.NOT_MEASURED not in text
    (folder / "test-gpu-0123456789-steps.svg").unlink()
    assert report.main(["--check", "--results", str(folder)]) == 1
    assert "test-gpu-0123456789-steps.svg" in capsys.readouterr().err


@pytest.mark.parametrize("breaks", ["commit", "rows.0.case.backend", "rows.5.contenders.ours"])
def test_a_file_that_lacks_something_is_named(breaks, readme, capsys):
    _, folder = readme
    broken = copy.deepcopy(RESULT)
    *outer, last = [int(key) if key.isdigit() else key for key in breaks.split(".")]
    inner = broken
    for key in outer:
        inner = inner[key]
    del inner[last]
    (folder / "broken.json").write_text(json.dumps(broken))
    assert report.main(["--check", "--results", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "broken.json" in said and str(last) in said


def test_rates_of_rows():
    """Of the mixture a step's work is not the full path's; a pooled output is a quarter."""
    row = {"extra": {"tflop": 0.5}, "case": {"drop_path": "mixture"}, "contenders": {"ours": {"figure": 2.0}}}
    assert gpu_report.step_rate(row) is None
    assert gpu_report.step_rate(row | {"case": {"drop_path": "off"}}) == 250.0
    assert gpu_report.intensity(kernel("forward", "cuda", 0.5)) == pytest.approx(15 / 8)
    assert gpu_report.intensity(kernel("reduce_pool", "cuda", 0.5)) == pytest.approx((3 * 8 + 0.25) / (3.25 * 2))
    rows = [kernel("forward", "cuda", 0.95), kernel("forward", "cuda", 0.5, "fp16")]
    assert "fp16" not in gpu_report.markdown(RESULT | {"rows": rows}, "name")
