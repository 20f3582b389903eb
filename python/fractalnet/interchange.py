"""Weights in the naming of other implementations of FractalNet, and Hugging Face's folders.

Both implementations compute the paper's block with one batch norm and ReLU per convolution, a mean of all columns that
meet, and the 2x2 max-pool after the last join: ``pool_order="after_join"`` here. docs/interchange.md has the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fractal_kernels.schedule import Unit

from .fused import FractalBlock

if TYPE_CHECKING:
    from .model import FractalNet

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    PyTorchModelHubMixin, _WHY = None, str(error)

EPS = 1e-5  # of their batch norms; their files do not hold it
SHOWN = 5  # mismatches that an error lists


def _pt_fractalnet(b: int, unit: Unit, columns: int) -> str:
    """A list per column, shallow first, with an entry per row, None where no conv ends; pools between the blocks."""
    return f"net.{2 * b}.columns.{unit.column}.{unit.end}"


def _pytorchcv(b: int, unit: Unit, columns: int) -> str:
    """A module per row with the convs that end there, the deepest column first; everything counts from 1."""
    return f"features.unit{b + 1}.block.blocks.block{unit.end + 1}.subblock{columns - unit.column}"


# Per naming: the prefix of a unit of block b, and the classifier's name.
# The implementations: github.com/khanrc/pt.fractalnet; pytorchcv of github.com/osmr/imgclsmob.
NAMINGS: dict[str, tuple[Callable[[int, Unit, int], str], str]] = {
    "pt.fractalnet": (_pt_fractalnet, "fc"),
    "pytorchcv": (_pytorchcv, "output"),
}


def _views(model: FractalNet, naming: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Every key of a naming with the views of the model that it stands for: one, or one per set of statistics, first
    that of which evaluation of the full network takes the unit's."""
    prefix, head = NAMINGS[naming]
    for b, block in enumerate(model.blocks):
        for unit in block.schedule.units:
            first = block.set_of(unit.column, unit.step, 0)
            order = sorted(range(len(block.running_mean)), key=lambda set: set != first)
            sets = [block.unit(unit.column, unit.step, set) for set in order]
            own, name = sets[0], prefix(b, unit, model.columns)
            for key, view in (
                ("conv.weight", own.weight),
                ("conv.bias", own.conv_bias),
                ("bn.weight", own.gamma),
                ("bn.bias", own.beta),
            ):
                if view is not None:
                    yield f"{name}.{key}", [view]
            yield f"{name}.bn.running_mean", [each.running_mean for each in sets]
            yield f"{name}.bn.running_var", [each.running_var for each in sets]
            yield f"{name}.bn.num_batches_tracked", [block.num_batches_tracked[set, unit.id] for set in order]
    yield f"{head}.weight", [model.head.weight]
    yield f"{head}.bias", [model.head.bias]


def _check(op: str, model: FractalNet, naming: str) -> None:
    """The same weights are the same function only if what the files do not hold is the same too."""
    if naming not in NAMINGS:
        raise ValueError(f"{op}: expected naming one of {', '.join(NAMINGS)}, got {naming!r}")
    if not hasattr(model, "columns"):
        raise TypeError(f"{op}: expected model a FractalNet, got {type(model).__name__}")
    if not isinstance(model.stem, nn.Identity):
        raise ValueError(f"{op}: expected model without a stem, as {naming} has none")
    for b, block in enumerate(model.blocks):
        if not isinstance(block, FractalBlock):
            raise ValueError(
                f"{op}: expected model of fused blocks, as {naming} has, got {model.info().splitlines()[b]}"
            )
        if block.pool != "after":
            got = {"before": "pool_order='before_join'", "average": "pool='avg'", None: "last_pool=False"}[block.pool]
            raise ValueError(f"{op}: expected model with max-pools and pool_order='after_join', as {naming}, got {got}")
        if block.eps != EPS:
            raise ValueError(f"{op}: expected model with eps={EPS}, as {naming} has, got {block.eps}")


def _recognise(state_dict: Mapping[str, Tensor]) -> str:
    for naming, start in (("pt.fractalnet", "net.0.columns."), ("pytorchcv", "features.unit1.block.")):
        if any(key.startswith(start) for key in state_dict):
            return naming
    raise ValueError(
        "load: expected keys of pt.fractalnet (net.0.columns...) or pytorchcv (features.unit1.block...), "
        f"got {', '.join(list(state_dict)[:SHOWN]) or 'none'}"
    )


@torch.no_grad()
def load(model: FractalNet, state_dict: Mapping[str, Tensor], naming: str | None = None) -> None:
    """Copies the weights and statistics of another implementation into a model, all of them or none.

    Their one set of running statistics fills every set of the model. ``num_batches_tracked`` may be missing (files
    written before PyTorch 0.4.1), and counts as 0 then.

    Args:
        model: with the columns, channels and classes of the file, ``pool_order="after_join"``; conv_bias and bn_affine
            as in the file.
        state_dict: of the other implementation, any floating-point dtype.
        naming: "pt.fractalnet" or "pytorchcv"; None: recognised from the keys.
    Raises:
        ValueError: the model would compute something else than the file's network, or a key is missing, unknown or of
        another shape; the first ones are listed.
    Example:
        >>> from fractalnet import FractalNet
        >>> a, b = (FractalNet(10, 3, (8,), image_size=8, pool_order="after_join").eval() for _ in range(2))
        >>> load(b, save(a, "pytorchcv"))
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(a(x), b(x))
        True
    """
    naming = _recognise(state_dict) if naming is None else naming
    _check("load", model, naming)
    views = dict(_views(model, naming))
    wrong = [f"unknown {key}" for key in state_dict if key not in views]
    for key, (view, *_) in views.items():
        if key in state_dict and not isinstance(state_dict[key], Tensor):
            wrong.append(f"{key}: expected a tensor, got {type(state_dict[key]).__name__}")
        elif key not in state_dict:
            wrong += [f"missing {key}"] if not key.endswith("num_batches_tracked") else []
        elif state_dict[key].shape != view.shape:
            wrong.append(f"{key}: expected shape {list(view.shape)}, got {list(state_dict[key].shape)}")
    if wrong:
        rest = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"load: the state_dict does not fit ({naming}): {'; '.join(wrong[:SHOWN])}{rest}")
    for key, targets in views.items():
        for target in targets:
            target.copy_(state_dict[key] if key in state_dict else torch.tensor(0))


@torch.no_grad()
def save(model: FractalNet, naming: str) -> dict[str, Tensor]:
    """The model's state in the naming of another implementation: copies, with the full network's statistics.

    Args:
        model: with ``pool_order="after_join"`` and eps 1e-5.
        naming: "pt.fractalnet" or "pytorchcv".
    Raises:
        ValueError: their network would compute something else, or the naming is unknown.
    Example:
        >>> from fractalnet import FractalNet
        >>> list(save(FractalNet(10, 1, (8,), image_size=8, pool_order="after_join"), "pt.fractalnet"))[:2]
        ['net.0.columns.0.0.conv.weight', 'net.0.columns.0.0.bn.weight']
    """
    _check("save", model, naming)
    state = {key: views[0].clone(memory_format=torch.contiguous_format) for key, views in _views(model, naming)}
    return {key: t.long() if key.endswith("num_batches_tracked") else t for key, t in state.items()}


# --- Hugging Face ------------------------------------------------------------------------------------

if PyTorchModelHubMixin is not None:

    class Hub(
        PyTorchModelHubMixin,
        library_name="fractalnet",
        paper_url="https://arxiv.org/abs/1605.07648",
        pipeline_tag="image-classification",
    ):
        """``save_pretrained(folder)``, ``from_pretrained(folder)``: model.safetensors, and config.json with the
        constructor's arguments."""

        @classmethod
        def _from_pretrained(cls, *, strict: bool = True, **arguments: Any) -> Any:
            return super()._from_pretrained(strict=strict, **arguments)  # the mixin's default ignores missing weights

else:

    class Hub:  # type: ignore[no-redef]
        """What stands for Hugging Face's mixin where it is not installed."""

        def save_pretrained(self, *_: Any, **__: Any) -> None:
            raise ImportError(f"save_pretrained: missing huggingface_hub ({_WHY}); pip install fractal-kernels[export]")

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            raise ImportError(f"from_pretrained: missing huggingface_hub ({_WHY}); pip install fractal-kernels[export]")
