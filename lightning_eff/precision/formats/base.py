"""What a low-precision format is to the layers: its options, and how the three roles of a product are encoded.

A format's options and the format itself lie in one file (``luq.py``: ``LUQOptions`` and ``LUQFormat``). Of the layers a
format knows no more than :class:`LayerView`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from lightning_eff.checks import ON_NONFINITE, Choice, Names, Rule, Whole, YesNo, checked
from lightning_eff.functional.codes import Codes
from lightning_eff.precision.formats.history import History
from lightning_eff.runtime.finite import OnNonFinite
from lightning_eff.runtime.seeds import SeedStream

Products = Literal["auto", "native", "emulated"]


class SavedInput(NamedTuple):
    """Holds a layer's input as kept for backward: codes as bytes, and their scales with what else there is."""

    packed: Tensor
    scale: Tensor


class WeightCodes(NamedTuple):
    """Holds the codes of a weight (O, I): for the product over I (output) and over O (input gradient)."""

    forward: Codes
    backward: Codes


class GradCodes(NamedTuple):
    """Holds the codes of a gradient: for the input gradient, and samples whose mean the weight gradient takes."""

    to_input: Codes
    to_weight: list[Codes]


class LayerView(Protocol):
    """Shows a format what it may know of the layer whose tensors it encodes."""

    @property
    def histories(self) -> Mapping[str, History]:
        """The layer's histories by role, as :meth:`Format.histories` made them."""

    @property
    def seeds(self) -> SeedStream:
        """The stream of rounding seeds."""

    @property
    def step(self) -> int:
        """The optimizer step under way."""

    @property
    def written(self) -> Mapping[int, float]:
        """Address of a weight -> scale of the grid it was written on; empty where weights are float32."""


class Format(ABC):
    """Encodes the three roles of a product in the way of one method.

    Codes lie in shared buffers: they are good until the next tensor of the same role is encoded. A linear layer's
    tensors come as matrices, a convolution's as (N, D, H, W, C) and its weight as torch stores it.
    """

    units: ClassVar[tuple[str, str]] = ("native", "emulated")
    """What native and other products run on, for people."""
    nibbles: int = 2
    """Half bytes kept for backward per element of an input."""
    one_code_for_all: bool = True
    """Whether the codes kept of an input are those of the output: then layers that read one input share them."""

    @property
    def operands(self) -> str:
        """The formats of input, weight and gradient, for people."""
        return type(self).__name__

    @abstractmethod
    def native(self, device: torch.device) -> bool:
        """Return whether products of these codes run on units made for them on ``device``."""

    def histories(self) -> dict[str, History]:
        """Return a new layer's histories by role; none for formats that look at each tensor alone."""
        return {}

    def saved_scales(self, columns: int | None) -> int:
        """Return the count of numbers in ``SavedInput.scale``.

        Args:
            columns: of the input matrix; None for a convolution's input.
        """
        return 1

    @abstractmethod
    def encode_weight(self, weight: Tensor, layer: LayerView) -> WeightCodes:
        """Encode a weight into tensors of their own, because they are kept until the weight changes."""

    @abstractmethod
    def encode_input(self, x: Tensor, layer: LayerView, *, save: bool) -> tuple[Codes, SavedInput | None]:
        """Encode a layer's input; return its codes, and what backward needs of it if ``save``."""

    @abstractmethod
    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Return the codes the weight gradient needs, from what was kept."""

    @abstractmethod
    def encode_grad(self, grad: Tensor, layer: LayerView) -> GradCodes:
        """Encode an output gradient."""

    def store(self, result: Tensor, role: str, layer: LayerView) -> Tensor:
        """Return what is kept of a product's ``result``.

        Args:
            result: of the product, with bias.
            role: ``"output"``, ``"input_grad"`` or ``"weight_grad"``.
            layer: whose product it is.
        """
        return result

    @abstractmethod
    def grad_figures(self, grad: Tensor, codes: Codes, layer: LayerView) -> dict[str, Tensor]:
        """Return the gradient's figures of a sampled step, by metric name."""


@dataclass(frozen=True, kw_only=True)
class LayerOptions(ABC):
    """Holds the options every method with converted layers has, checked.

    Raises:
        ConfigurationError: an option is outside its range.
    """

    exempt: Sequence[str] = ()
    exempt_first_last: bool = True
    pack_relu: bool = True
    products: Products = "auto"
    measure_every_n_steps: int = 1000
    on_nonfinite: OnNonFinite = "raise"

    RULES: ClassVar[Mapping[str, Rule]] = {
        "exempt": Names(),
        "exempt_first_last": YesNo(),
        "pack_relu": YesNo(),
        "products": Choice(*get_args(Products)),
        "measure_every_n_steps": Whole(),
        "on_nonfinite": ON_NONFINITE,
    }
    """What each option may be."""

    def __post_init__(self) -> None:
        for name, value in checked(self.RULES, self.__dict__).items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def format(self) -> Format:
        """Return the format these options ask for."""

    def too_slow(self, shape: Sequence[int], device: torch.device) -> str:
        """Return why a layer with a weight of this shape is left alone on ``device``, for people; mostly empty."""
        return ""
