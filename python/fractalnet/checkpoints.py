"""Checkpoints of a training: written whole or not at all, proven before they are used.

A file is a PyTorch archive; its entries carry checksums. It is written beside its place, flushed to the disk and
renamed, so that whatever happens the files under their own names are whole.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .files import UserError, sync_folder

if TYPE_CHECKING:
    from lightning.fabric import Fabric

NAME = f"step-{'[0-9]' * 9}.ckpt"


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the oldest first."""
    return sorted(folder.glob(NAME))


def step_of(path: Path) -> int:
    """The step in the name of one of :func:`saved`."""
    return int(path.stem.removeprefix("step-"))


def save(fabric: Fabric, folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes step-N.ckpt. Every rank calls it."""
    path = folder / f"step-{step:09d}.ckpt"
    temporary = folder / f".{path.name}.tmp"
    failed = None
    try:
        try:
            fabric.save(temporary, state)
        except (OSError, RuntimeError):  # RuntimeError: how PyTorch's own writer tells that the disk is full
            if fabric.world_size > 1:
                fabric.barrier()  # that of fabric.save, in which the other ranks wait
            raise
        if fabric.is_global_zero:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(folder)
    except (OSError, RuntimeError) as error:
        failed = getattr(error, "strerror", None) or " ".join(str(error).split())
    finally:
        if fabric.is_global_zero:
            temporary.unlink(missing_ok=True)
    failed = fabric.broadcast(failed)  # no rank goes on, or ends, before the first one is done
    if failed:
        raise UserError(f"cannot write checkpoint {path}: {failed}; {last_good(folder)}")
    return path


def last_good(folder: Path) -> str:
    whole = saved(folder)
    return f"the last good checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"


def prune(folder: Path, keep: int, best: str | None) -> None:
    """Removes all but the newest `keep` checkpoints and the best one."""
    for path in saved(folder)[:-keep]:
        if path.name != best:
            path.unlink(missing_ok=True)


def prove(path: Path) -> None:
    """Raises UserError unless every checksum of the file holds."""
    if path.is_dir():
        raise UserError(f"checkpoint {path}: expected a file, got a folder")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        reason = f"{broken} does not match its checksum" if broken else None
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path}: there is no such file") from error
    except Exception as error:  # of damage zipfile raises whatever its parts do
        reason = getattr(error, "strerror", None) or str(error)
    if reason is None:
        return
    earlier = [other for other in saved(path.parent) if other.name < path.name]
    offer = f"; the one before it: --resume {earlier[-1]}" if earlier else "; there is none before it"
    raise UserError(f"checkpoint {path}: damaged ({reason}){offer if path.name.startswith('step-') else ''}")


def load(fabric: Fabric, path: Path, state: dict[str, Any], fits: Callable[[dict[str, Any]], None]) -> None:
    """Reads a checkpoint into modules, optimizers and values of `state`, in place. Nothing in it is executed.

    `fits` sees what the checkpoint says of its run, and refuses it by a UserError, before a tensor is read: else
    another network's fails with a list of shapes.
    """
    prove(path)
    try:
        fits(torch.load(path, map_location="meta", mmap=True, weights_only=True)["run"])
        fabric.load(path, state, weights_only=True)
    except UserError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, EOFError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise UserError(f"checkpoint {path}: its content does not fit ({reason})") from error
    except Exception as error:  # what the unpickler raises for what it does not accept is not public
        raise UserError(f"checkpoint {path}: not a checkpoint of a training ({type(error).__name__})") from error
