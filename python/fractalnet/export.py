"""A trained network elsewhere: batch norms folded, plain modules, ONNX and torch.export files, columns as files."""

from __future__ import annotations

import copy
import importlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import files
from .layers import plain_stem
from .plain import PlainNet

if TYPE_CHECKING:
    from .fused import Block
    from .model import FractalNet

FORMAT = "fractalnet column 1"

# What a column's file may be built of: per layer, the attributes that are its constructor's arguments.
_LAYERS: dict[str, tuple[str, ...]] = {
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "bias"),
    "BatchNorm2d": ("num_features", "eps", "momentum", "affine"),
    "Dropout": ("p",),
    "ReLU": (),
    "LeakyReLU": ("negative_slope",),
    "SiLU": (),
    "Mish": (),
    "MaxPool2d": ("kernel_size", "stride", "padding"),
    "AvgPool2d": ("kernel_size", "stride", "padding"),
    "AdaptiveAvgPool2d": ("output_size",),
    "Flatten": (),
    "Linear": ("in_features", "out_features", "bias"),
}


def _require(op: str, *packages: str) -> None:
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"{op}: missing {name} ({error}); pip install fractal-kernels[export]") from error


def _texts(op: str, metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """What a file says beside the network: a JSON text for each name."""
    try:
        return {str(name): json.dumps(value) for name, value in (metadata or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{op}: expected metadata None or a mapping of values that JSON knows ({error})") from error


# --- plain modules -----------------------------------------------------------------------------------


def fold(sequential: nn.Sequential) -> nn.Sequential:
    r"""A copy for evaluation, with every batch norm folded into the convolution before it and no dropout.

    .. math:: w' = w \gamma / \sqrt{var + eps}, \qquad b' = (b - mean) \gamma / \sqrt{var + eps} + \beta

    The result is in evaluation mode. Training it is possible, and trains a network without batch norm.

    Args:
        sequential: of ``torch.nn`` modules. A convolution and its batch norm are neighbours, or have only dropout
            between them; other batch norms stay.
    Source:
        Jacob et al. 2018 (arXiv:1712.05877), section 3.2.
    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> [type(layer).__name__ for layer in fold(net)]
        ['Conv2d', 'ReLU']
    """
    layers: list[nn.Module] = []
    for layer in copy.deepcopy(sequential).eval():
        if isinstance(layer, nn.Dropout):
            continue  # the identity in evaluation
        has_statistics = isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None
        if has_statistics and layers and isinstance(layers[-1], nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval()


def _sequential(layers: Sequence[nn.Module], folded: bool) -> nn.Sequential:
    return fold(nn.Sequential(*layers)) if folded else nn.Sequential(*layers)


class PlainBlock(nn.Module):
    """A fractal block in evaluation, row by row, of torch.nn modules."""

    def __init__(self, block: Block, folded: bool) -> None:
        super().__init__()
        self.schedule = block.schedule
        units = block.schedule.units
        self.units = nn.ModuleList(_sequential(block.unit_layers(u.column, u.step), folded) for u in units)
        self.pool = block.pool_layer()
        self.before = block.pool == "before"

    def joins(self, x: Tensor) -> Iterator[Tensor]:
        """Every join, row by row; the last one is pooled: the block's output."""
        outs: dict[int, Tensor] = {}
        for row in range(self.schedule.rows):
            outs |= {unit.column: self.units[unit.id](x) for unit in self.schedule.starts[row]}
            branches = [outs[unit.column] for unit in self.schedule.ends[row]]
            last = row == self.schedule.rows - 1
            if self.before and last:
                branches = [self.pool(branch) for branch in branches]
            x = torch.stack(branches).mean(0)
            if not self.before and last:
                x = self.pool(x)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        for joined in self.joins(x):
            x = joined  # one at a time: a list would hold them all
        return x


@torch.no_grad()
def plain(model: FractalNet | PlainNet, *, fold: bool = False) -> nn.Sequential:
    """The full network in evaluation, of ``torch.nn`` modules and a mean per join: what every exporter understands.

    Args:
        model: whose weights, and statistics of the full network, are copied. Nothing is dropped.
        fold: whether batch norms are folded into the convolutions (see :func:`fold`).
    Returns:
        A network in evaluation mode, [N, in_channels, S, S] to logits [N, num_classes], on the model's device.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), equation 1.
    Example:
        >>> from fractalnet import FractalNet
        >>> net, x = FractalNet(10, 3, (8,), image_size=8).eval(), torch.randn(2, 3, 8, 8)
        >>> torch.allclose(plain(net)(x), net(x), atol=1e-5)
        True
    """
    stem = [] if isinstance(model.stem, nn.Identity) else plain_stem(model.stem)
    blocks: list[nn.Module]
    if isinstance(model, PlainNet):
        blocks = [_sequential(model.block_layers(b), fold) for b in range(len(model.blocks))]
    else:
        blocks = [PlainBlock(block, fold) for block in model.blocks]
    return nn.Sequential(
        *_sequential(stem, fold), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), copy.deepcopy(model.head)
    ).eval()


# --- programs ----------------------------------------------------------------------------------------


def _prepare(model: FractalNet | PlainNet, column: int | None, fold: bool) -> tuple[nn.Sequential, dict[str, Any]]:
    """The plain network, and the arguments that both exporters take: images of a batch of any size."""
    if column is None:
        net = plain(model, fold=fold)
    elif isinstance(model, PlainNet):
        raise ValueError(f"export: expected column None, as a plain network has no columns, got {column!r}")
    else:
        net = model.extract_column(column, fold=fold).eval()
    first = next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d))
    shape = (2, first.in_channels, model.image_size, model.image_size)  # 0 and 1 would be constants
    images = first.weight.new_zeros(shape)
    return net, {"args": (images,), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}


def to_exported_program(
    model: FractalNet | PlainNet, column: int | None = None, *, fold: bool = True
) -> torch.export.ExportedProgram:
    """The full network, or one column, in evaluation as a ``torch.export`` program for batches of any size.

    Args:
        model: the network; it stays as it is.
        column: this column alone instead of the full network.
        fold: whether batch norms are folded into the convolutions.
    Raises:
        ValueError: there is no such column.
    Example:
        >>> from fractalnet import FractalNet
        >>> program = to_exported_program(FractalNet(10, 2, (8,), image_size=8), column=1)
        >>> program.module()(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 10])
    """
    net, arguments = _prepare(model, column, fold)
    return torch.export.export(net, **arguments)


def to_pt2(
    model: FractalNet | PlainNet,
    path: str | Path,
    column: int | None = None,
    *,
    fold: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes :func:`to_exported_program` to a file that ``torch.export.load`` reads without this package.

    Args:
        metadata: of :func:`to_onnx`; the file's ``extra_files`` of the same names.
    """
    texts, buffer = _texts("to_pt2", metadata), io.BytesIO()
    torch.export.save(to_exported_program(model, column, fold=fold), buffer, extra_files=texts)
    _write(path, buffer.getvalue())


def to_onnx(
    model: FractalNet | PlainNet,
    path: str | Path,
    column: int | None = None,
    *,
    fold: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes the full network, or one column, in evaluation as ONNX: ``images`` [batch, ...] to ``logits``.

    Args:
        model: the network; it stays as it is.
        path: of the file; it is written whole or not at all.
        column: this column alone instead of the full network.
        fold: whether batch norms are folded into the convolutions.
        metadata: what users of the file have to know, such as the classes' names: values that JSON knows, by name. They
            become JSON texts in its ``metadata_props``.
    Raises:
        ImportError: naming the missing package. ValueError: there is no such column. files.UserError: the file cannot
        be written.
    Example:
        >>> from fractalnet import FractalNet
        >>> to_onnx(FractalNet(10, 3, (8,), image_size=8), "net.onnx")  # doctest: +SKIP
    """
    _require("to_onnx", "onnx", "onnxscript")
    texts = _texts("to_onnx", metadata)
    net, arguments = _prepare(model, column, fold)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(net, **arguments, **names, dynamo=True, verbose=False)
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # stack traces, with the paths of this machine
    for name, text in texts.items():
        proto.metadata_props.add(key=name, value=text)
    _write(path, proto.SerializeToString())


def _write(path: str | Path, content: bytes) -> None:
    path = Path(path)
    if path.is_dir():
        raise files.UserError(f"cannot write to {path}: it is a folder")
    with files.folder_for(path.parent) as folder:
        files.write(folder, {path.name: content})


# --- columns as files --------------------------------------------------------------------------------


def _describe(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    kind = type(layer).__name__
    if type(layer) is not getattr(nn, kind, None) or kind not in _LAYERS:
        raise ValueError(f"save_column: expected layers of {', '.join(_LAYERS)}, got {kind}")
    values = {name: getattr(layer, name) for name in _LAYERS[kind]}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    with torch.device("meta"):
        again = vars(_build(kind, values))
    for name, value in again.items():
        if not name.startswith("_") and name not in ("training", "inplace") and getattr(layer, name) != value:
            got = f"{name} {getattr(layer, name)!r}, of which a column's file says nothing"
            raise ValueError(f"save_column: expected {kind} of {name} {value!r}, got {got}")
    return kind, values


def _build(kind: str, values: dict[str, Any]) -> nn.Module:
    if kind not in _LAYERS or set(values) != set(_LAYERS[kind]):
        raise ValueError(f"unknown layer {kind!r} with {', '.join(values) or 'no arguments'}")
    return getattr(nn, kind)(**values)


def save_column(
    model: FractalNet,
    c: int,
    path: str | Path,
    *,
    fold: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes column c (see ``model.extract_column``) as a safetensors file, its layers as JSON in the header.

    Args:
        metadata: of :func:`to_onnx`; in the header too, beside "format" and "layers", which are this file's own.
    Raises:
        ImportError: safetensors is missing. ValueError: there is no such column. files.UserError: the file cannot be
        written.
    """
    _require("save_column", "safetensors")
    from safetensors.torch import save

    column = model.extract_column(c, fold=fold)
    header, own = _texts("save_column", metadata), {"format": FORMAT, "layers": json.dumps([*map(_describe, column)])}
    if taken := own.keys() & header.keys():
        raise ValueError(f"save_column: expected metadata of other names than format and layers, got {sorted(taken)}")
    _write(path, save({name: t.contiguous() for name, t in column.state_dict().items()}, header | own))


def load_column(path: str | Path) -> nn.Sequential:
    """The plain network of a file of :func:`save_column`, in evaluation mode, on the CPU.

    Only layers of a fixed list are built; nothing in the file is executed.

    Raises:
        ImportError: safetensors is missing. FileNotFoundError: there is no such file. ValueError: it is damaged, or
        was not written by :func:`save_column`.
    """
    _require("load_column", "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT!r}, got {header.get('format')!r}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        layers: Sequence[Any] = json.loads(header["layers"])
        with torch.device("meta"):  # the file's numbers allocate nothing
            column = nn.Sequential(*(_build(kind, values) for kind, values in layers))
        column.load_state_dict(state, assign=True)
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"load_column: {path} is damaged or not a column's file ({reason})") from error
    return column.eval()
