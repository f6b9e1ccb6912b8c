"""The three networks every cost is measured on, each with one fixed micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tasks.models import GPT, ResNet18, mlp
from benchmarks.tasks.saved import quantisable

__all__ = ["MODELS", "Workload", "workload"]


@dataclass(frozen=True)
class Workload:
    """A model, what goes in, and what should come out.

    Attributes:
        name: ``mlp``, ``gpt`` or ``resnet``.
        model: freshly initialised from the given seed.
        x: the input micro-batch.
        targets: one class per row of the flattened output.
        exempt_first_last: whether the first and the last quantisable layer stay in high precision.
        inner: steps per timing, chosen so that one timing lasts a good part of a second on one CPU thread.
    """

    name: str
    model: nn.Module
    x: Tensor
    targets: Tensor
    exempt_first_last: bool
    inner: int

    def loss(self) -> Tensor:
        """Run the model on the micro-batch and return the cross-entropy, computed in fp32."""
        return F.cross_entropy(self.model(self.x).float().flatten(0, -2), self.targets)

    def in_bf16(self) -> Workload:
        """Convert the model in place to bfloat16, as ``bf16-true`` does, and return the workload with such inputs."""
        self.model.to(torch.bfloat16)
        return replace(self, x=self.x.to(torch.bfloat16) if self.x.is_floating_point() else self.x)

    def in_channels_last(self) -> Workload:
        """Give model and images the memory format channels-last, in place, and return the workload; others stay."""
        if self.x.dim() != 4:
            return self
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return replace(self, x=self.x.contiguous(memory_format=torch.channels_last))

    def converted_names(self) -> list[str]:
        """Return the names of the layers that are quantised: linear layers and convolutions but the exempt ones.

        Found without asking the library, so that its choice can be checked against this one.
        """
        return quantisable(self.model, exempt_first_last=self.exempt_first_last)


def _mlp(tiny: bool) -> Workload:
    """Three 1024x1024 layers, batch 128; all three converted."""
    width, batch = (64, 32) if tiny else (1024, 128)
    targets = torch.randint(width, (batch,))
    return Workload("mlp", mlp(width), torch.randn(batch, width), targets, False, 1 if tiny else 10)


def _gpt(tiny: bool) -> Workload:
    """Four blocks of width 256, 16 sequences of 128 tokens; the head stays in high precision."""
    width, layers, context, batch = (32, 1, 16, 2) if tiny else (256, 4, 128, 16)
    model = GPT(256, width, layers, heads=4, context=context)
    targets = torch.randint(256, (batch * context,))
    return Workload("gpt", model, torch.randint(256, (batch, context)), targets, True, 1)


def _resnet(tiny: bool) -> Workload:
    """ResNet-18 for 32x32 images, batch 64; stem and head stay in high precision."""
    width, size, batch = (8, 16, 4) if tiny else (64, 32, 64)
    targets = torch.randint(10, (batch,))
    return Workload("resnet", ResNet18(width), torch.randn(batch, 3, size, size), targets, True, 1)


MODELS: dict[str, Callable[[bool], Workload]] = {"mlp": _mlp, "gpt": _gpt, "resnet": _resnet}


def workload(name: str, *, device: str = "cpu", tiny: bool = False, seed: int = 0) -> Workload:
    """Return the named workload on ``device``.

    Args:
        name: a key of :data:`MODELS`.
        device: ``cpu`` or ``cuda``.
        tiny: a size for tests of the benchmark itself; its timings mean nothing.
        seed: decides weights and data.
    """
    torch.manual_seed(seed)
    made = MODELS[name](tiny)
    made.model.to(device)
    return replace(made, x=made.x.to(device), targets=made.targets.to(device))
