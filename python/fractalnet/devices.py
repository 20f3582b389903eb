"""The devices of a training, by Lightning Fabric: accelerator, ranks, precision, and how weights are spread."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .config import Config
from .files import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch.optim.swa_utils import AveragedModel

PRECISION = {"fp64": "64-true", "fp32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
TIMEOUT = timedelta(minutes=10)  # of a collective: a rank that is gone must not hold the others for ever


def fabric_for(config: Config) -> Fabric:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    def shard(model: nn.Module, _: object) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)  # over all ranks: Fabric's own mesh splits data over nodes alone

    if config.strategy == "fsdp":
        strategy: Any = ModelParallelStrategy(shard, save_distributed_checkpoint=False, timeout=TIMEOUT)
    elif config.strategy == "ddp" or config.devices != "1" or config.nodes > 1:
        strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, timeout=TIMEOUT)
    else:
        strategy = "auto"
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=strategy,
            precision=PRECISION[config.precision],
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"train: {' '.join(str(error).split())}") from error
    except Exception as error:  # lightning's own MisconfigurationException
        raise UserError(f"train: {type(error).__name__}: {' '.join(str(error).split())}") from error
    here = fabric.strategy.num_processes if is_parallel(fabric) else 1
    if TorchElasticEnvironment.detect() and (started := int(os.environ["WORLD_SIZE"])) != here * config.nodes:
        # Else Lightning raises an error of its own, or every process is a training by itself, in the same folder.
        got = f"{here} times {config.nodes}"
        raise UserError(f"train: expected --devices times --nodes to be {started}, torchrun's processes, got {got}")
    if config.nodes > 1 and not {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
        if isinstance(fabric.strategy.cluster_environment, LightningEnvironment):  # it waits for the others, in silence
            raise UserError(f"train: --nodes {config.nodes}: expected torchrun to start every machine's part, got none")
    if config.precision == "fp64":  # the loss too: Fabric makes float32 of what a network returns
        fabric.strategy.precision.convert_output = lambda data: data
    if fabric.strategy.precision.precision != PRECISION[config.precision]:  # Fabric puts bf16 in its place
        raise UserError(f"train: --precision: expected one that {fabric.device.type} has, got {config.precision}")
    return fabric


def is_parallel(fabric: Fabric) -> bool:
    """Whether steps take part in what several processes do together, be it one process so far."""
    from lightning.fabric.strategies import ParallelStrategy

    return isinstance(fabric.strategy, ParallelStrategy)


def unfuse(optimizer: torch.optim.Optimizer) -> None:
    """PyTorch has no fused SGD of sharded weights."""
    for group in optimizer.param_groups:
        group["fused"] = False


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state in the layout of its parameters: fused steps read both in their order in memory, and a
    checkpoint may have another one."""
    for p, held in optimizer.state.items():
        for key, t in held.items():
            if isinstance(t, torch.Tensor) and t.shape == p.shape and t.stride() != p.stride():
                held[key] = torch.empty_like(p, dtype=t.dtype).copy_(t)


@torch.no_grad()
def follow(average: AveragedModel, net: nn.Module) -> None:
    """``average.update_parameters(net)``, which copies its counter to the device, and the host waits for it."""
    both = ((*m.parameters(), *m.buffers()) for m in (average.module, net))
    groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for mean, t in zip(*both, strict=True):
        means, values = groups.setdefault(mean.dtype, ([], []))
        means.append(mean)
        values.append(t)
    for means, values in groups.values():
        if average.n_averaged:
            average.multi_avg_fn(means, values, average.n_averaged)
        else:
            torch._foreach_copy_(means, values)
    average.n_averaged += 1


def zero_momenta(optimizer: torch.optim.Optimizer) -> None:
    """The momenta of a fused SGD that a scaler steps, before its first step.

    When the first gradients overflow the kernel does nothing, and the momenta that it was to write would be whatever
    was in memory. From zeros the first step is the same, but for ``dampening``.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            for p in group["params"]:
                optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
