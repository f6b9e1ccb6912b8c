"""The pipeline assembled with the first batch: cut on rank 0, then built by every rank from the blueprint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from lightning_eff.errors import EffWarning
from lightning_eff.functional.staleness.schedule import stage_delay
from lightning_eff.runtime.figures import console
from lightning_eff.runtime.rng import Randomness
from lightning_eff.runtime.roll_call import RollCall
from lightning_eff.strategies.pipelined_bp import compatibility
from lightning_eff.strategies.pipelined_bp.engine import Engine
from lightning_eff.strategies.pipelined_bp.mitigation import Mitigation
from lightning_eff.strategies.pipelined_bp.neighbours import Neighbours
from lightning_eff.strategies.pipelined_bp.partition import Partition, partition_stack, partition_table
from lightning_eff.strategies.pipelined_bp.profiling import Profile, measure_curvature, profile_stack
from lightning_eff.strategies.pipelined_bp.resume import restore_weights, saved_starts
from lightning_eff.strategies.pipelined_bp.stack import Stack, find_stack
from lightning_eff.strategies.pipelined_bp.weights import Stage, Weights

__all__ = ["Assembly", "Blueprint"]


@dataclass(frozen=True)
class Blueprint:
    """Holds what rank 0 has found, from which every rank builds its part of the pipeline.

    Attributes:
        stack_name: name of the module that holds the layers.
        profile: what was measured of the layers.
        partition: of the model into stages.
        seed: of the run's random numbers.
        curvatures: largest curvature of the loss in the directions of every stage's weights, where it is known.
    """

    stack_name: str
    profile: Profile
    partition: Partition
    seed: int
    curvatures: list[float | None]


@dataclass(frozen=True)
class Assembly:
    """Makes the parts of one rank's pipeline.

    Attributes:
        model: the LightningModule.
        device: where it is trained.
        module: the strategy's option: name of the module that holds the layers.
        stages: how many, "layers" or names.
        positions: P, number of processes.
        position: p, of this rank in the pipeline.
        in_flight: the strategy's option.
        curvature: the strategy's option.
        saved: the state of the checkpoint that the run goes on from.
    """

    model: Any
    device: torch.device
    module: str | None
    stages: int | str | Sequence[str]
    positions: int
    position: int
    in_flight: int
    curvature: float | Literal["measure"] | None
    saved: Mapping[str, Any] | None

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def draw_up(self, step: Callable[[], Any], *, seed: int) -> Blueprint:
        """Profile the model with the first batch and cut it (rank 0).

        Args:
            step: runs the user's ``training_step`` on the first batch.
            seed: of the run's random numbers, unless a checkpoint says which.
        """
        least = self.stages if isinstance(self.stages, int) else 2
        stack = find_stack(self.model, self.module, stages=least)
        profile_stack(self.model, stack, step, self.device)  # the first time is slow, and times are used
        profile = profile_stack(self.model, stack, step, self.device)
        kept = None if self.saved is None else saved_starts(self.saved, stack.names, self.stages)
        stages = self.stages if kept is None else kept
        partition = partition_stack(self.model, stack, profile, stages=stages, positions=self.positions)
        curvatures = [self._curvature(step, partition, stage) for stage in range(partition.stages)]
        seed = seed if self.saved is None else self.saved["seed"]
        return Blueprint(stack.name, profile, partition, seed, curvatures)

    def _curvature(self, step: Callable[[], Any], partition: Partition, stage: int) -> float | None:
        if self.curvature != "measure":
            return self.curvature
        return measure_curvature(self.model, step, self.device, self._parameters_of(partition, stage))

    def _parameters_of(self, partition: Partition, stage: int) -> list[nn.Parameter]:
        return [p for name, p in self.trained().items() if partition.owners[name] == stage]

    def find_stack(self, blueprint: Blueprint) -> Stack:
        """Return the layers of this rank's model that the blueprint is of."""
        name = blueprint.stack_name if self.module is None and blueprint.stack_name else self.module
        return find_stack(self.model, name, stages=blueprint.partition.stages)

    def make_weights(
        self, blueprint: Blueprint, stack: Stack, *, optimizer: torch.optim.Optimizer, mitigation: Mitigation
    ) -> Weights:
        """Return the weights of this rank's stages, as a checkpoint left them if the run goes on from one.

        Raises:
            CheckpointError: the checkpoint lacks weights of these stages.
        """
        partition = blueprint.partition
        stages = [
            Stage(s, partition.stages, self.in_flight, self._parameters_of(partition, s))
            for s in partition.stages_of(self.position)
        ]
        weights = Weights(stages, mitigation, optimizer)
        if self.saved is not None:
            starts = [stack.names[i] for i in partition.starts]
            restore_weights(weights, self.saved, starts=starts, in_flight=self.in_flight)
        return weights

    def connect_engine(
        self, blueprint: Blueprint, stack: Stack, weights: Weights, *, roll_call: RollCall, timeout: timedelta
    ) -> Engine:
        """Connect this rank to its neighbours, and return what runs it; all ranks together.

        Args:
            blueprint: of the pipeline.
            stack: its layers.
            weights: of this rank's stages.
            roll_call: where ranks note how far they have come.
            timeout: after which a message that does not come is an error.
        """
        profile, partition = blueprint.profile, blueprint.partition
        neighbours = Neighbours(position=self.position, positions=self.positions, roll_call=roll_call)
        neighbours.connect(profile, partition, device=self.device, in_flight=self.in_flight, timeout=timeout)
        return Engine(stack, profile, partition, weights, Randomness(blueprint.seed, self.device), neighbours)

    def announce(
        self,
        blueprint: Blueprint,
        stack: Stack,
        *,
        optimizer: torch.optim.Optimizer,
        mitigation: Mitigation,
        left_out: str,
    ) -> None:
        """Print which stage has got what, and warn of what will go wrong, on the last position.

        Args:
            blueprint: of the pipeline.
            stack: its layers.
            optimizer: the user's.
            mitigation: what is done about the delay.
            left_out: a sentence on what the optimizer does not allow of what was asked for, or "".
        """
        if self.position != self.positions - 1:
            return
        partition = blueprint.partition
        # D_s = k (S - 1 - s) updates, k = in_flight.
        delays = [stage_delay(s, partition.stages, in_flight=self.in_flight) for s in range(partition.stages)]
        table = partition_table(stack, blueprint.profile, partition, parameters=self.trained(), delays=delays)
        console(140).print(table)
        compatibility.warn_if_unstable(optimizer, mitigation, delays=delays, curvatures=blueprint.curvatures)
        if left_out:
            warnings.warn(f"pipelined_bp: {left_out}", EffWarning, stacklevel=2)
