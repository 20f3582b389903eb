"""FractalNet: the network, its drop-path and its training, on ``fractal_kernels``."""

from .drop_path import Path
from .model import FractalNet
from .plain import PlainNet
from .zoo import create, list_models

__all__ = ["FractalNet", "Path", "PlainNet", "create", "list_models"]
