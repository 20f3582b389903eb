"""Where the choices of ``config`` come from: the user's cache, the committed table, or the rule; and tuning them.

A choice is looked up by the class of a call in the user's cache, then in ``tuned.json``; else the rule applies. With
``FRACTAL_TUNE=1`` a class that the cache lacks is tuned at its first call, unless a CUDA graph is being captured, and
kept in ``$FRACTAL_CACHE_DIR`` (by default ``~/.cache/fractal_kernels``): a folder for each device and versions, in it a
file for each class, so that processes that tune side by side take nothing from each other.

``python -m fractal_kernels.triton.tuning --show`` prints what is there; ``--write-table`` brings it into the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .. import __version__
from . import config
from .config import Case, Choice

TABLE = Path(__file__).with_name("tuned.json")
GAIN = 0.98  # of the rule's time: less of a gain is noise, and not worth another binary
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


# --- looking up ----------------------------------------------------------------------------------


def find(case: Case) -> Choice | None:
    """What :func:`config.look_up` has not found before; None where it is to be tuned now."""
    options, found = case.candidates(), None
    if len(options) > 1 and case.device is not None and case.bits:
        name, arch = machine(case.device)
        key = case.key()
        found = _cached(cache_folder() / name / f"{key}.json", key, options)
        wanted = found is None and os.environ.get("FRACTAL_TUNE") == "1"  # in the table or not: it is made of this
        if wanted and not torch.cuda.is_current_stream_capturing():
            return None
        found = found or _among(options, _table().get(arch, {}).get("entries", {}).get(key))
        if wanted:
            return found or options[0]  # in the captured graph alone
    return config.chosen.setdefault(case, found or options[0])


def _among(options: tuple[Choice, ...], given: Any) -> Choice | None:
    """A choice of another version's candidates is none."""
    return next((o for o in options if list(o) == given), None)


@cache
def machine(device: int) -> tuple[str, str]:
    """The name of what a measurement holds for (device, capability, versions), and of the table's entries for it."""
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"gfx{major}{minor}" if torch.version.hip else f"sm_{major}{minor}"
    versions = f"torch{torch.__version__}-triton{triton.__version__}-fractal{__version__}"
    return re.sub(r"[^\w.+-]+", "_", f"{torch.cuda.get_device_name(device)}-{arch}-{versions}"), arch


def cache_folder() -> Path:
    if folder := os.environ.get("FRACTAL_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fractal_kernels"


@cache
def _warn(message: str) -> None:
    warnings.warn(f"fractal_kernels: {message}", RuntimeWarning, stacklevel=3)


def _load(path: Path) -> dict[str, Any]:
    """A JSON object from a file; nothing, and a warning, where the file holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"expected an object, got {type(data).__name__}")
        return data
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _warn(f"ignored {path}: {error}")
        return {}


def _cached(path: Path, key: str, options: tuple[Choice, ...]) -> Choice | None:
    if not (data := _load(path)):
        return None
    for what, expected in (("machine", path.parent.name), ("key", key)):
        if data.get(what) != expected:
            _warn(f"ignored {path}: expected {what} {expected!r}, got {data.get(what)!r}")
            return None
    found = _among(options, data.get("choice"))
    if found is None:
        _warn(f"ignored {path}: expected choice to be one of this version's candidates, got {data.get('choice')!r}")
    return found


@cache
def _table() -> dict[str, Any]:
    return _load(TABLE)


# --- tuning --------------------------------------------------------------------------------------


def _milliseconds(launch: Callable[[], object]) -> float:
    """Median of CUDA events around a launch with a cold cache, as behind a convolution. Clearing the cache takes the
    device longer than a launch takes the host, so that launching is not measured."""
    return float(triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median"))


def tune(case: Case, launch: Callable[[Choice], object], outputs: list[Tensor]) -> Choice:
    """The fastest candidate for a call, from now on and for later processes.

    Args:
        launch: runs the call with a choice. It may run any number of times, since it reads nothing that it writes.
        outputs: what it writes. Candidates are held to the bits of the rule's outputs; what fails to compile, to launch
            or to agree is not chosen.
    Example:
        >>> tune(case, launch, [out])  # doctest: +SKIP
        Choice(sites=8, channels=64, warps=4, programs_per_processor=16)
    """
    (name, arch), key, rule = machine(case.device or 0), case.key(), case.candidates()[0]
    expected: list[Tensor] = []
    times: dict[Choice, float] = {}
    for choice in case.candidates():
        try:
            for out in outputs:
                out.fill_(float("nan"))  # what a candidate leaves out must not pass for the rule's
            launch(choice)
            if choice == rule:
                expected = [out.clone() for out in outputs]
            if all(map(_same_bits, outputs, expected)):
                times[choice] = _milliseconds(lambda choice=choice: launch(choice))  # type: ignore[misc]
            else:
                _warn(f"{key}: the outputs of {choice} differ from the rule's; it is not used")
        except Exception as error:  # out of registers or shared memory, a compiler that fails
            if choice == rule:  # no memory, or a call that the launch itself will say more about
                _warn(f"{key} is not tuned: {error}")
                config.chosen[case] = rule
                return rule
    best = min(times, key=lambda choice: times[choice])
    best = best if times[best] < GAIN * times[rule] else rule
    config.chosen[case] = best
    milliseconds = {"x".join(map(str, choice)): round(time, 6) for choice, time in times.items()}
    record = {"machine": name, "arch": arch, "key": key, "choice": best, "milliseconds": milliseconds}
    _keep(cache_folder() / name / f"{key}.json", json.dumps(record) + "\n")
    return best


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(BITS[a.element_size()]), b.view(BITS[b.element_size()]))


def _keep(path: Path, text: str) -> None:
    """Replaces a file by one that is complete, or warns once for its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            with open(Path(folder, path.name), "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, path)
    except OSError as error:
        _warn(f"what is tuned is not kept, {path.parent} cannot be written: {error.strerror}")


# --- the table -----------------------------------------------------------------------------------


def _records() -> list[dict[str, Any]]:
    """Of this machine's GPUs; on a machine without one, of all that the cache was given."""
    names = {machine(i)[0] for i in range(torch.cuda.device_count())} or {"*"}
    found = [_load(path) for name in sorted(names) for path in sorted(cache_folder().glob(f"{name}/*.json"))]
    return [record for record in found if record.keys() >= {"machine", "arch", "key", "choice", "milliseconds"}]


def write_table() -> None:
    table = _load(TABLE)
    for record in _records():
        part = table.setdefault(record["arch"], {"measured": "", "entries": {}})
        old, new = part["entries"].get(record["key"]), record["choice"]
        if old != new:
            print(f"{record['arch']} {record['key']}: {old} -> {new}")
        part["entries"][record["key"]], part["measured"] = new, record["machine"]
    text = json.dumps(table, indent=1, sort_keys=True)
    _keep(TABLE, re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tuned tiles of the Triton kernels.")
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--show", action="store_true", help="print the cache's folder and entries")
    todo.add_argument("--write-table", action="store_true", help="take this machine's cache into the committed table")
    if parser.parse_args().write_table:
        return write_table()
    print(cache_folder())
    for record in _records():
        print(record["machine"], record["key"], record["choice"], json.dumps(record["milliseconds"]))


if __name__ == "__main__":
    main()
