"""FractalNet: the network, its drop-path and its training, on ``fractal_kernels``."""

from fractal_kernels import __version__ as __version__

from .drop_path import Path, tied_loss
from .graphed import GraphedStep
from .model import FractalNet
from .plain import PlainNet
from .zoo import create, list_models, load

__all__ = ["FractalNet", "GraphedStep", "Path", "PlainNet", "create", "list_models", "load", "tied_loss"]
