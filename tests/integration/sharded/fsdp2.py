"""Runs of FSDP2 on gloo ranks, and the DDP runs they are compared with.

``fully_shard`` works on the CPU as it is: Lightning's ``ModelParallelStrategy`` needs no change.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_eff.precision.formats.luq import LUQOptions
from lightning_eff.precision.layers.convert import convert
from tests.integration.sharded.models import DATA, TARGET, Net, Task, asked_for, digest, kinds, run


def whole(parameter: Any) -> Tensor:
    """All of a parameter."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def shard_net(net: Any, mesh: Any, **options: Any) -> None:
    """Shard a block of layers, a layer by itself, a block, and the rest."""
    for part in (net.block, net.alone, net.mixer, net):
        fully_shard(part, mesh=mesh, **options)


def _shard(task: Any) -> None:
    shard_net(task.net, task.device_mesh["data_parallel"])


def fit(
    rank: int,
    world_size: int,
    kind: str,
    *,
    poison: tuple[int, ...] = (),
    narrow: bool = False,
    options: dict[str, Any] | None = None,
    distributed_checkpoint: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """A run with ``kind`` ``"ddp"`` or ``"fsdp2"``; method ``options`` are given by callback."""
    more |= asked_for(more["precision"], options)
    if kind == "ddp":
        strategy: Any = DDPStrategy(process_group_backend="gloo")
        return run(Task(poison=poison, narrow=narrow), strategy, rank, world_size, **more)
    strategy = ModelParallelStrategy(world_size, 1, save_distributed_checkpoint=distributed_checkpoint)
    return run(Task(_shard, poison=poison, narrow=narrow), strategy, rank, world_size, whole=whole, **more)


def both(rank: int, world_size: int, precision: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same run with DDP and with FSDP2."""
    ddp = fit(rank, world_size, "ddp", precision=precision, **more)
    return ddp, fit(rank, world_size, "fsdp2", precision=precision, **more)


def cut_and_resume(rank: int, world_size: int, path: str, at: int, **more: Any) -> tuple[dict[str, Any], ...]:
    """A run, and the same one continued from the checkpoint it wrote after ``at`` steps."""
    first = fit(rank, world_size, "fsdp2", save=path, at=at, **more)
    return first, fit(rank, world_size, "fsdp2", resume=path, **more)


def tensor_parallel(rank: int, world_size: int) -> dict[str, str]:
    """Layer name -> why it is left alone, of a model of which one layer is split by tensor parallelism."""
    mesh = init_device_mesh("cpu", (world_size,))
    net = parallelize_module(Net(), mesh, {"alone": ColwiseParallel()})
    return {row.name: row.reason for row in convert(net, LUQOptions()).rows}


def fabric(rank: int, world_size: int, kind: str, method: str, poison_rank: int = -1) -> dict[str, Any]:
    """Four steps of Fabric, which shards a model after it has been converted."""
    if kind == "ddp":
        strategy: Any = L.fabric.strategies.DDPStrategy(process_group_backend="gloo")
    else:
        strategy = L.fabric.strategies.ModelParallelStrategy(
            lambda net, mesh: (shard_net(net, mesh["data_parallel"]), net)[1], world_size, 1
        )
    runner = L.Fabric(accelerator="cpu", devices=world_size, strategy=strategy, precision=method)
    runner.launch()
    torch.manual_seed(0)
    net = Net()
    module = runner.setup_module(net)
    optimizer = runner.setup_optimizers(torch.optim.SGD(module.parameters(), lr=0.0625))
    torch.manual_seed(3)
    losses, error = [], ""
    for step in range(4):
        part = slice(rank * 32 + step * 8, rank * 32 + step * 8 + 8)
        loss = nn.functional.cross_entropy(module(DATA[part]), TARGET[part])
        losses.append(loss.item())
        runner.backward(loss * torch.nan if rank == poison_rank and step == 2 else loss)
        try:
            optimizer.step()
        except Exception as stopped:  # noqa: BLE001 - reported
            error = f"{type(stopped).__name__}: {stopped}"
            break
        optimizer.zero_grad()
    seen = kinds(net)
    parameters = {name: whole(p).detach() for name, p in net.named_parameters()}
    runner._precision.teardown()
    return {"losses": losses, "digest": digest(parameters), "seen": seen, "after": kinds(net), "error": error}
