"""What a low-precision format is to the layers: how the three roles of a product are encoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_eff.functional.codes import Codes
from lightning_eff.precision.formats.history import Memory

if TYPE_CHECKING:
    from lightning_eff.precision.layers.state import LayerState


class SavedInput(NamedTuple):
    """A layer's input as kept for backward: its codes as bytes, and their scales (with what else the format needs)."""

    packed: Tensor
    scale: Tensor


class WeightCodes(NamedTuple):
    """Codes of a weight (O, I): for the product over I (output) and the one over O (input gradient), often one."""

    forward: Codes
    backward: Codes


class GradCodes(NamedTuple):
    """Codes of an output gradient: for the input gradient, and samples whose mean the weight gradient takes."""

    to_input: Codes
    to_weight: list[Codes]


class Format(ABC):
    """How a method encodes the three roles of a product; see ``precision/luq_format.py`` for one.

    Codes lie in shared buffers: they are good until the next tensor of the same role is encoded. A linear layer's
    tensors come as matrices, a convolution's as (N, D, H, W, C) and its weight as torch stores it.
    """

    nibbles: int = 2
    """Half bytes kept for backward per element of an input."""
    one_code_for_all: bool = True
    """Whether the codes kept of an input are those of the output: then layers that read one input share them."""

    @abstractmethod
    def native(self, device: torch.device) -> bool:
        """Whether products of these codes run on units made for them on ``device``."""

    def memories(self) -> dict[str, Memory]:
        """A new layer's memories by role; empty for formats that look at each tensor alone."""
        return {}

    def saved_scales(self, columns: int | None) -> int:
        """Numbers in ``SavedInput.scale`` for a matrix of so many columns, or for a convolution's input (None)."""
        return 1

    @abstractmethod
    def encode_weight(self, weight: Tensor, state: LayerState) -> WeightCodes:
        """Codes of a weight; tensors of their own, because they are kept until the weight changes."""

    @abstractmethod
    def encode_input(self, x: Tensor, state: LayerState, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """Codes of a layer's input, and what backward needs of it if ``save``."""

    @abstractmethod
    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """The codes the weight gradient needs, from what was kept."""

    @abstractmethod
    def encode_grad(self, grad: Tensor, state: LayerState) -> GradCodes:
        """Codes of an output gradient."""

    def store(self, result: Tensor, role: str, state: LayerState) -> Tensor:
        """What is kept of a product's ``result``; roles are ``"output"``, ``"input_grad"`` and ``"weight_grad"``."""
        return result

    @abstractmethod
    def grad_figures(self, grad: Tensor, codes: Codes, state: LayerState) -> dict[str, Tensor]:
        """Figures of a sampled step, by metric name."""
