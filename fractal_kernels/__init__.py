"""Fused kernels for multi-branch convolutional networks: masked joins, drop-path, conv-BN-ReLU."""

from .backends import BackendUnavailable, available_backends, use_backend
from .block import BlockOutput, fractal_block
from .fuse import FuseReport, fuse, unfuse
from .modules import BatchNormReLU2d, BNReLUJoin, ConvBNReLU, DropPathJoin, MeanJoin, sync_batch_norm
from .ops.bn_relu import bn_relu
from .ops.conv import conv_bn_relu
from .ops.drop_path import drop_path_mask
from .ops.join import bn_relu_join, masked_mean_join
from .ops.recompute import recomputed

__version__ = "0.1.0"

__all__ = [
    "BNReLUJoin",
    "BackendUnavailable",
    "BatchNormReLU2d",
    "BlockOutput",
    "ConvBNReLU",
    "DropPathJoin",
    "FuseReport",
    "MeanJoin",
    "available_backends",
    "bn_relu",
    "bn_relu_join",
    "conv_bn_relu",
    "drop_path_mask",
    "fractal_block",
    "fuse",
    "masked_mean_join",
    "recomputed",
    "sync_batch_norm",
    "unfuse",
    "use_backend",
]
