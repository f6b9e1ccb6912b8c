"""The partition of a model into stages: which layers, parameters and buffers belong to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor, nn

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError, nearest
from lightning_eff.functional.partition import balance
from lightning_eff.strategies.pipelined_bp.profiling import Profile
from lightning_eff.strategies.pipelined_bp.stack import Stack

__all__ = ["Partition", "partition_stack", "partition_table"]


@dataclass(frozen=True)
class Partition:
    """Says which layers, parameters and buffers of a model belong to which stage.

    Attributes:
        starts: index of the first layer of every stage.
        ranks_start: index of the first stage on every position of the pipeline.
        owners: parameter name -> stage.
        buffer_owners: buffer name -> stage.
    """

    starts: tuple[int, ...]
    ranks_start: tuple[int, ...]
    owners: dict[str, int]
    buffer_owners: dict[str, int]

    @property
    def stages(self) -> int:
        """Number of stages, S."""
        return len(self.starts)

    def position_of(self, stage: int) -> int:
        """Return the position in the pipeline, 0 the first process, that has a stage."""
        return max(p for p, first in enumerate(self.ranks_start) if first <= stage)

    def stages_of(self, position: int) -> range:
        """Return the stages at a position."""
        ends = [*self.ranks_start[1:], self.stages]
        return range(self.ranks_start[position], ends[position])

    def layers_of(self, stage: int, layers: int) -> range:
        """Return the indices of a stage's layers."""
        ends = [*self.starts[1:], layers]
        return range(self.starts[stage], ends[stage])


def partition_stack(
    model: nn.Module, stack: Stack, profile: Profile, *, stages: str | int | Sequence[str | int], positions: int
) -> Partition:
    """Cut a stack into stages, and the model's parameters and buffers with it.

    Args:
        model: the whole model.
        stack: its layers.
        profile: what was measured of it.
        stages: how many, balanced by the measured times; ``"layers"`` for one per layer; or the names of the layers at
            which stages begin, the first left out; or their indices.
        positions: number of processes.

    Raises:
        ConfigurationError: a name is unknown, or it cannot be cut into so many.
        UnsupportedCombinationError: a parameter would be used in two stages.
    """
    ties = _ties(model, stack, profile)
    _refuse_around(ties, layers=len(stack), stages=stages)
    if isinstance(stages, str) and stages == "layers":
        starts = list(range(len(stack)))
    elif isinstance(stages, int):
        starts = balance(profile.costs_s, stages, together=list(ties.values()))
    else:
        starts = [0, *(_layer_index(stack, name) if isinstance(name, str) else name for name in stages if name != 0)]
    if starts != sorted(set(starts)):
        raise ConfigurationError(
            f"stages={stages!r} has to name layers after the first, in their order and each once, of these: "
            f"{', '.join(stack.names)}."
        )
    for name, (first, last) in ties.items():
        if any(first < start <= last for start in starts):
            raise UnsupportedCombinationError(
                f"The parameter {name!r} is used in the layers {stack.names[first]} to {stack.names[last]}, which "
                "would lie in different stages. Cut elsewhere, or untie them."
            )
    if len(starts) < positions:
        raise ConfigurationError(
            f"{len(starts)} stages cannot be spread over {positions} processes. Use fewer devices."
        )
    ends = [*starts[1:], len(stack)]
    costs_s = [sum(profile.costs_s[a:b]) for a, b in zip(starts, ends, strict=True)]
    ranks_start = balance(costs_s, positions)
    owners, buffer_owners = _owners(model, stack, profile, starts)
    return Partition(tuple(starts), tuple(ranks_start), owners, buffer_owners)


def _layer_index(stack: Stack, name: str) -> int:
    """Return the index of a layer by its name, whole or without the stack's."""
    names = list(stack.names)
    prefix = f"{stack.name}." if stack.name else ""
    for candidate in (name, prefix + name):
        if candidate in names:
            return names.index(candidate)
    raise ConfigurationError(
        f"stages names a layer {name!r} that {stack.name or 'the stack'} does not have.{nearest(name, names)} Layers: "
        f"{', '.join(names)}."
    )


def _uses(model: nn.Module, stack: Stack, profile: Profile) -> dict[str, set[int]]:
    """Return parameter name -> layers that use it; before the stack counts as its first layer, after it as its last."""
    names = {id(p): name for name, p in model.named_parameters()}
    uses: dict[str, set[int]] = {name: set() for name in names.values()}
    for i, layer in enumerate(stack.layers):
        for p in layer.parameters():
            uses[names[id(p)]].add(i)
    for name in profile.before:
        uses[name].add(0)
    for name in profile.after:
        uses[name].add(len(stack) - 1)
    return uses


def _ties(model: nn.Module, stack: Stack, profile: Profile) -> dict[str, tuple[int, int]]:
    """Return the parameters used in several layers -> the first and the last of them."""
    uses = _uses(model, stack, profile)
    return {name: (min(used), max(used)) for name, used in uses.items() if len(used) > 1}


def _refuse_around(ties: dict[str, tuple[int, int]], *, layers: int, stages: str | int | Sequence[str | int]) -> None:
    """Raise for parameters that the first and the last stage would share."""
    if stages == 1:
        return
    around = [name for name, span in ties.items() if span == (0, layers - 1)]
    if around:
        raise UnsupportedCombinationError(
            f"{', '.join(around)} is used before and after the layers of the stack (tied weights, or a connection "
            "around it), so that first and last stage would have to share it. Untie it, or make what connects them a "
            "part of the layers; strategy='ddp' has no such limit."
        )


def _owners(
    model: nn.Module, stack: Stack, profile: Profile, starts: Sequence[int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the stage of every parameter and of every buffer, by name."""

    def stage_of(layer: int) -> int:
        return sum(start <= layer for start in starts) - 1

    last = len(starts) - 1
    uses = _uses(model, stack, profile)
    # What is used nowhere has no gradient; it lives where the loss is.
    owners = {name: stage_of(min(used)) if used else last for name, used in uses.items()}
    inside = {id(m): i for i, layer in enumerate(stack.layers) for m in layer.modules()}
    buffers = {}
    for path, module in model.named_modules():
        for key, _ in module.named_buffers(recurse=False):
            if id(module) in inside:
                stage = stage_of(inside[id(module)])
            else:
                stage = 0 if path and path in profile.modules_before and not _holds(module, stack) else last
            buffers[f"{path}.{key}" if path else key] = stage
    return owners, buffers


def _holds(module: nn.Module, stack: Stack) -> bool:
    """Return whether a module contains the stack."""
    return any(child is stack.owner for child in module.modules())


def partition_table(
    stack: Stack, profile: Profile, partition: Partition, *, parameters: Mapping[str, Tensor], delays: Sequence[int]
) -> Table:
    """Return the table that shows people what each stage has got.

    Args:
        stack: the layers.
        profile: what was measured of them.
        partition: into stages.
        parameters: those that are trained, by name.
        delays: D_s of every stage, updates.
    """
    table = Table(
        title=f"pipelined_bp: {len(stack)} layers of {stack.name or 'the model'} in {partition.stages} stages"
    )
    for column in ("stage", "rank", "layers", "parameters", "measured ms", "share", "delay"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    whole = sum(profile.costs_s)
    positions = len(partition.ranks_start)
    for stage in range(partition.stages):
        layers = partition.layers_of(stage, len(stack))
        first, last = stack.names[layers[0]], stack.names[layers[-1]]
        count = sum(p.numel() for name, p in parameters.items() if partition.owners[name] == stage)
        seconds = sum(profile.costs_s[i] for i in layers)
        rank = positions - 1 - partition.position_of(stage)
        table.add_row(
            str(stage), str(rank), first if first == last else f"{first} .. {last}",
            f"{count:,}", f"{seconds * 1000:.2f}", f"{seconds / whole:.0%}", str(delays[stage]),
        )  # fmt: skip
    ends = [*partition.ranks_start[1:], partition.stages]
    starts = [*partition.starts, len(stack)]
    # Every rank waits for the slowest: T_1 / T_P <= sum_l c_l / max_p sum_(l of p) c_l, c_l the seconds of layer l.
    slowest = max(sum(profile.costs_s[starts[a] : starts[b]]) for a, b in zip(partition.ranks_start, ends, strict=True))
    if positions > 1:
        table.caption = f"At most {whole / slowest:.2f}x one process: a step lasts as long as the slowest rank's."
    return table
