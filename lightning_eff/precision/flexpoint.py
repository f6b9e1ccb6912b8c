"""``precision="flexpoint16"``: int16 tensors with one exponent each, predicted by Autoflex.

References:
    Koester et al., Flexpoint: An Adaptive Numerical Format for Efficient Training of Deep Neural Networks, NIPS 2017,
    arXiv:1711.02213, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_eff.functional.numerics.flexpoint import round_to_scale
from lightning_eff.kernels.quantize import largest_magnitude
from lightning_eff.kernels.shared_exponent import integer_encode, round_to_scale_
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats.config import FlexpointConfig, MasterWeights, OnNonFinite, Products, options_from
from lightning_eff.precision.formats.history import Memory
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.runtime.ranks import seed_of_rank_0

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"})
"""Optimizer state that steps are divided by: in 16 bits its small elements become zero and the steps explode."""


class FlexpointMixin(QuantizedPrecisionMixin):
    """flex16+5: int16 tensors with one exponent each, known before a tensor is written because Autoflex predicts it.

    Inputs, weights and output gradients of Linear, Conv1d/2d/3d, MultiheadAttention and transformers' Conv1D are int16;
    products add in int32, in chains so short that they cannot overflow, or are exact. Their results (outputs, input and
    weight gradients) are stored with a predicted exponent too. Inputs are kept for backward as int16, half of
    float32. Biases, normalisation, softmax and loss are float32. A prediction too small saturates and is corrected in
    the next step; such overflows are counted.

    Args:
        alpha: headroom of the prediction, a factor; the published code has 1 (one bit less, more overflows).
        beta: weight of the standard deviation of the last maxima.
        gamma: added to the prediction, in units of the last place.
        length: optimizer steps looked back on, 1 to 1,024.
        store_results: store results of products as int16 values too; False keeps them in float32, two passes less.
        weights: ``"float32"`` keeps master weights and optimizer state in float32. ``"flex16"``: as in the paper there
            are none; weights and optimizer state are written in 16 bits after every step (emulated: their memory stays
            float32). Second moments stay float32: steps are divided by them.
        weight_rounding: with ``weights="flex16"``, ``"nearest"`` as published, or ``"stochastic"``, which keeps updates
            below half a unit in the mean.
        products: ``"auto"`` (int16 units where measured faster on this machine; last bits depend on it),
            ``"native"`` int16 or ``"emulated"``: exact products, sums rounded to float32.
        exempt: name patterns (``"*.head"``) of layers to leave in high precision.
        exempt_first_last: leave the first and the last layer in high precision; the paper does not.
        pack_relu: let ``nn.ReLU`` modules keep one bit per element for backward; their numbers do not change.
        measure_every_n_steps: log the ``eff/flexpoint16/*`` figures every n optimizer steps, at the cost of a few
            passes over the tensors in those steps; 0 never.
        on_nonfinite: ``"raise"`` before a NaN or Inf gradient reaches a parameter, or ``"warn"``.

    Raises:
        ConfigurationError: an option is outside its range.

    State: ``phase``, ``memory`` (each Autoflex), ``weights`` (those of weights and optimizer state, and the scales they
    were written with), ``seed`` and ``calls`` (of stochastic weight rounding), under the class name in the checkpoint.
    Randomness: with ``weight_rounding="stochastic"`` a hash of (``torch.initial_seed()``, a counter), equal on all
    ranks; torch's generators are not touched.
    """

    info: MethodInfo = METHODS["flexpoint16"]
    formats: str = "INT16 x INT16, INT16 (Autoflex)"
    products: ClassVar[tuple[str, str]] = ("native int16", "emulated exactly")

    config: FlexpointConfig

    def __init__(
        self,
        *,
        alpha: float = 2.0,
        beta: float = 3.0,
        gamma: float = 100.0,
        length: int = 16,
        store_results: bool = True,
        weights: MasterWeights = "float32",
        weight_rounding: Literal["nearest", "stochastic"] = "nearest",
        products: Products = "auto",
        exempt: Sequence[str] = (),
        exempt_first_last: bool = False,
        pack_relu: bool = True,
        measure_every_n_steps: int = 1000,
        on_nonfinite: OnNonFinite = "raise",
    ) -> None:
        options = options_from(locals())
        super().__init__()
        self._eff_init(**options)

    def _eff_init(self, **options: Any) -> None:
        """Set up after construction, or after a graft onto a plugin Lightning made."""
        self._weights: dict[str, Memory] = {}
        self._scales: dict[str, float] = {}
        self._begin(FlexpointConfig(**options))

    def _forget_run(self) -> None:
        """See the base class; what was written belongs to the model it was written for."""
        super()._forget_run()
        self._weights, self._scales = {}, {}

    # ------------------------------------------------------------------------------------------ weights in 16 bits

    def _after_step(self, optimizer: Any) -> None:
        """Without float32 masters: write weights and optimizer state with their predicted exponents."""
        if self.config.weights == "float32":
            return
        if self.config.weight_rounding == "stochastic" and self.seeds.seed is None:
            self.seeds.seed = seed_of_rank_0()
        names = {id(p): name for name, p in self._parameters()}
        with torch.no_grad():
            for name, tensor in _tensors(optimizer, names):
                self._write(name, tensor)
        self._tell_layers()

    def _write(self, name: str, tensor: Tensor) -> None:
        memory = self._weights.setdefault(name, Memory(self.config.autoflex()))
        flex = memory.estimate
        if not flex.initialised:
            flex.initialise(float(largest_magnitude(tensor)))
        scale, observed = (
            torch.tensor(flex.scale, dtype=torch.float32, device=tensor.device),
            torch.empty((), dtype=torch.float32, device=tensor.device),
        )
        if self.config.weight_rounding == "nearest":
            round_to_scale_(tensor, scale, observed=observed)
        else:
            seed = self.seeds.next(same_on_ranks=True)
            codes = integer_encode(tensor, scale, rounding="stochastic", seed=seed, observed=observed)
            tensor.copy_(codes.dequantize(tensor.dtype))
        memory.observe(observed)
        self._scales[name] = flex.scale

    def _tell_layers(self) -> None:
        """A written weight lies on a grid already, which the layers read it with."""
        written = {p.data_ptr(): self._scales[name] for name, p in self._parameters() if name in self._scales}
        for state in self.states().values():
            state.written = written

    def _forget_other_weights(self) -> None:
        """A second fit may bring weights of its own, which were never written."""
        for name, p in self._parameters():
            scale = self._scales.get(name)
            if scale is not None and not torch.equal(round_to_scale(p.detach(), scale), p):
                del self._scales[name]

    def _memories(self) -> list[Memory]:
        return [*super()._memories(), *self._weights.values()]

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """See the class."""
        memory = {name: memory.estimate.state_dict() for name, memory in self._weights.items()}
        return {**super().state_dict(), "weights": {"memory": memory, "scales": dict(self._scales)}}

    def _take(self, own: dict[str, Any]) -> None:
        self._scales, self._weights = own["weights"]["scales"], {}
        for name, values in own["weights"]["memory"].items():
            self._weights[name] = Memory(self.config.autoflex())
            self._weights[name].estimate.load_state_dict(values)
        super()._take(own)

    def _apply_state(self) -> None:
        super()._apply_state()
        self._forget_other_weights()
        self._tell_layers()


def _tensors(optimizer: Any, names: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter that was updated and its elementwise optimizer state, with names that survive a restart."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(parameters):
        if p.grad is None or not p.is_floating_point():
            continue
        name = names.get(id(p), f"parameter {index}")
        yield name, p
        for key, value in optimizer.state[p].items():
            elementwise = isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point()
            if elementwise and key not in SECOND_MOMENTS:
                yield f"{name}:{key}", value
