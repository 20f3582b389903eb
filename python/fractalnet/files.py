"""Errors and signals of the person at the command line, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path


class UserError(Exception):
    """What the person who runs a command can mend; shown as one line."""


class Stopped(Exception):
    """A signal stopped the command, and what it was at is saved; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def stopped(came: list[int], checkpoint: Path) -> Stopped:
    """SIGTERM, a machine that is taken back, ends with status 0: what can be done is done. Ctrl-C ends with 130."""
    status = 130 if came and came[0] == signal.SIGINT else 0
    return Stopped(f"stopped; {checkpoint} is written, --resume goes on from there", status)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The numbers of SIGTERM and SIGINT as they come; a second SIGINT interrupts at once."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        came.append(number)

    main = threading.current_thread() is threading.main_thread()  # another may not ask for signals
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require(*modules: str) -> None:
    """Raises UserError unless these modules of the extra packages of training can be imported."""
    packages = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"}
    missing = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{packages.get(name, name)} ({error})")
    if missing:
        raise UserError(f"missing: {', '.join(missing)}; pip install fractal-kernels[train]")


@contextlib.contextmanager
def folder_for(path: Path) -> Iterator[Path]:
    """Makes a folder that can be written to; folders that it made vanish again if nothing was put there."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise UserError(f"cannot write to the folder {path}: {error.strerror or error}") from error
        yield path
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty, or never made
                folder.rmdir()


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files so that each is its old or its new self at any moment, and never half of it.

    All of them are first written under temporary names in the same folder and flushed to the disk, then renamed.
    Whatever interrupts that, no temporary file stays.
    """
    pending = {folder / f".{name}.{os.getpid()}.tmp": folder / name for name in files}
    try:
        for temporary, target in pending.items():
            with open(temporary, "wb") as file:
                file.write(files[target.name])
                file.flush()
                os.fsync(file.fileno())
        for temporary, target in pending.items():
            os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
    finally:
        for temporary in pending:
            temporary.unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flushes names of a folder to the disk; some file systems cannot, and nothing is lost there but time."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
