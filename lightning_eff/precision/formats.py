"""What a low-precision format is to the layers: how the three roles of a product are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_eff.functional.formats import Codes

if TYPE_CHECKING:
    from lightning_eff.precision.state import LayerState


class SavedInput(NamedTuple):
    """A layer's input as kept for backward: its codes, packed, and their scale (with what else the format needs)."""

    packed: Tensor
    scale: Tensor


class Format(Protocol):
    """How a method encodes the three roles of a product; see ``precision/luq_format.py`` for one.

    Codes lie in shared buffers: they are good until the next tensor of the same role is encoded.
    """

    nibbles: int
    """Half bytes kept for backward per element of an input."""
    code_dtype: torch.dtype
    """Dtype of the codes of a weight."""

    def native(self, device: torch.device) -> bool:
        """Whether products of these codes run on units made for them on ``device``."""

    def encode_weight(self, weight: Tensor) -> Codes:
        """Codes of a weight; a tensor of their own, because they are kept until the weight changes."""

    def encode_input(self, x: Tensor, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """Codes of a layer's input, and what backward needs of it if ``save``."""

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """The codes of :meth:`encode_input` again."""

    def encode_grad(self, grad: Tensor, state: LayerState) -> list[Codes]:
        """Codes of an output gradient, one or more independent samples."""

    def grad_figures(self, grad: Tensor, codes: Codes) -> dict[str, Tensor]:
        """Figures of a sampled step, by metric name."""
