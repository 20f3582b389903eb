"""Runs the benchmarks, condenses their output into results/, and writes the README's table from it.

python -m benchmarks.report --run     runs everything and writes benchmarks/results/cpu.json
python -m benchmarks.report --write   regenerates the tables between the markers in README.md, and the plots of a GPU
python -m benchmarks.report --check   exits 1 when those tables are not what --write would write, or a plot is missing
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_report
from benchmarks.gpu_report import ReportError, number

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SETTINGS = ("FRACTAL_CPU_ISA", "LD_PRELOAD", "MALLOC_", "ONEDNN_")  # of the environment what figures depend on
HEADER = ("what", "ours", "vs eager", "vs torch.compile", "also")
GROUPS = ("join", "step", "evaluation", "residual", "memory", "depth", "conv")


OTHERS = ("separate", "library", "dense")  # contenders without a column of their own


# --- tables ------------------------------------------------------------------------------------


def notes(row: dict[str, Any]) -> str:
    extra = row["extra"]
    texts = [f"{number(r['figures'])}× {name}" for name, r in row["ratios"].items() if name in OTHERS]
    if "share_of_copy" in extra:
        texts.append(f"{100 * extra['share_of_copy']:.0f} % of a copy's bandwidth ({number(extra['gb_per_s'])} GB/s)")
    if "vs_fp32" in extra:
        texts.append(f"{number(extra['vs_fp32'])}× the speed of fp32")
    if "vs_eager_nchw" in extra:
        texts.append(f"{number(extra['vs_eager_nchw'])}× eager on NCHW tensors")
    if "vs_eager_nhwc" in extra:
        texts.append(f"{number(extra['vs_eager_nhwc'])}× eager in channels_last")
    if "times_of_shallower" in extra:
        texts.append(
            f"{number(extra['times_of_shallower'])} times C = 5, {number(extra['saved_of_shallower'])} times its saved "
            f"bytes; paths and live sets: {100 * extra['host_share']:.2f} % of the step"
        )
    if "share_of_eager" in extra:
        texts.append(
            f"{number(extra['share_of_eager'])} of eager's; "
            f"allocated and still held: {number(extra['held_share_of_eager'])}"
        )
    return "; ".join(texts)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratios = row["ratios"]

    def ratio(name: str) -> str:
        return f"{number(ratios[name]['figures'])}×" if name in ratios else "–"

    ours = f"{number(row['contenders']['ours']['figure'])} {row['unit']}"
    return row["what"], ours, ratio("eager"), ratio("compiled"), notes(row)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    return "\n".join(gpu_report.aligned([HEADER, *map(cells, rows)]))


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """What stands between the markers: a table and a line of provenance per machine."""
    parts = []
    for result in results:
        machine = result["machine"]
        lines = ["| " + " | ".join(HEADER) + " |", "|---|---:|---:|---:|---|"]
        lines += [
            "| " + " | ".join(cells(row)) + " |" for row in result["rows"] if row["group"] != "conv"
        ]  # a choice's data, not a claim
        commit = result["commit"] or "no commit"
        source = f"{machine['device']}, {machine['cores']} cores, {machine['simd']}, PyTorch {machine['torch']}"
        lines += ["", f"{source}; {result['date'][:10]}, {commit[:10]}, `{result['command']}`."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


# --- measuring ---------------------------------------------------------------------------------


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": cpu_name(),
        "cores": cores,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The commit measured, with "-dirty" when something other than the results and the README differs from it; where
    the files came without their git, FRACTAL_COMMIT says whose they are."""
    if given := os.environ.get("FRACTAL_COMMIT"):
        return given
    sha = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return f"{sha}-dirty" if sha and changed else sha


def rounded(value: Any) -> Any:
    """Floats to five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def condense(output: dict[str, Any], command: str) -> dict[str, Any]:
    """pytest-benchmark's JSON → the rows, and where and how they were measured."""
    rows = []
    for entry in output["benchmarks"]:
        if "what" not in entry["extra_info"]:
            raise ReportError(f"{entry['name']}: expected a row of figures in extra_info, got none")
        rows.append(rounded(entry["extra_info"]))
    if not rows:
        raise ReportError("the run produced no figures")
    rows.sort(key=lambda row: GROUPS.index(row["group"]))
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"machine": machine(), "date": date, "commit": commit(), "command": command, "rows": rows}


def write_text(path: Path, text: str) -> None:
    """All or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def collected(pytest_arguments: Sequence[str]) -> list[str]:
    """The benchmarks that these arguments select."""
    command = [*PYTEST, "benchmarks", *pytest_arguments, "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ReportError(f"{done.stdout}pytest exited with {done.returncode}: no benchmarks found")
    return [line for line in done.stdout.splitlines() if "::" in line]


def run(output: Path | None, pytest_arguments: Sequence[str]) -> None:
    """Runs the benchmarks; figures of a partial run (any further argument) are kept where ``output`` says only.

    Each has a process of its own, so that what the others left of the heap is not measured with it.
    """
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        for name in collected(pytest_arguments):
            raw.unlink(missing_ok=True)
            done = subprocess.run([*PYTEST, name, f"--benchmark-json={raw}"], cwd=ROOT, check=False)
            if done.returncode:
                raise ReportError(f"pytest exited with {done.returncode}: no figures kept")
            entries += json.loads(raw.read_text())["benchmarks"] if raw.exists() else []
    settings = [f"{key}={os.environ[key]}" for key in sorted(os.environ) if key.startswith(SETTINGS)]
    command = [*settings, "python", "-m", "benchmarks.report", "--run", *pytest_arguments]
    result = condense({"benchmarks": entries}, shlex.join(command))
    print(table(result["rows"]))
    if output is None and pytest_arguments:
        print("partial run: nothing kept; --output names a file for it")
        return
    output = output or RESULTS / "cpu.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {output}")


# --- the README --------------------------------------------------------------------------------


def load_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """By file name, without the ending."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ReportError(f"no results in {folder}: run `python -m benchmarks.report --run` first")
    results = {}
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            gpu_report.checked(result) if gpu_report.is_gpu(result) else markdown([result])
        except (ValueError, KeyError, TypeError, ReportError) as error:
            raise ReportError(
                f"{file}: not a file that --run or make gpu writes ({type(error).__name__}: {error})"
            ) from error
        results[file.stem] = result
    return results


def with_tables(text: str, results: dict[str, dict[str, Any]]) -> str:
    """`text` with the tables between their markers."""
    gpus = {name: result for name, result in results.items() if gpu_report.is_gpu(result)}
    cpus = [result for name, result in results.items() if name not in gpus]
    measured = "\n\n".join(gpu_report.markdown(result, name) for name, result in gpus.items())
    text = with_table(text, "benchmarks", markdown(cpus))
    return with_table(text, "gpu", measured or gpu_report.NOT_MEASURED)


def with_table(text: str, name: str, content: str) -> str:
    """`text` with `content` between two markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"{README.name}: expected one line {begin} and, after it, one line {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def plots(results: dict[str, dict[str, Any]], folder: Path, write: bool) -> list[Path]:
    """The plots of all GPUs' results that are not there; with `write` they are drawn."""
    missing = []
    for name, result in results.items():
        if not gpu_report.is_gpu(result):
            continue
        paths = [folder / f"{name}-{kind}.svg" for kind in gpu_report.plots_of(result)]
        missing += [path for path in paths if not path.exists()]
        if write:
            from benchmarks import gpu_plots

            gpu_plots.plot(result, folder, name)
    return missing


def read_readme() -> str:
    try:
        return README.read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot read {README}: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument(
        "--run", action="store_true", help="run; further arguments select, as pytest's do, and then only --output keeps"
    )
    action.add_argument("--write", action="store_true", help="write the README's tables, and plots")
    action.add_argument("--check", action="store_true", help="exit 1 when the README's tables are stale")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that --write and --check read")
    parser.add_argument("--output", type=Path, help="where --run keeps its figures; results/cpu.json")
    options, further = parser.parse_known_args(argv)
    if further and not options.run:
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    try:
        if options.run:
            run(options.output, further)
            return 0
        text, results = read_readme(), load_results(options.results)
        fresh = with_tables(text, results)
        missing = plots(results, options.results, options.write)
        if options.check and fresh != text:
            raise ReportError(f"{README.name}: the benchmark table is stale: run `python -m benchmarks.report --write`")
        if options.check and missing:
            names = ", ".join(path.name for path in missing)
            raise ReportError(f"plots are missing: {names}: run `python -m benchmarks.report --write`")
        if options.write and fresh != text:
            write_text(README, fresh)
    except ReportError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
