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
from torch.optim import Optimizer

from lightning_eff.functional.numerics.flexpoint import Autoflex, round_to_scale
from lightning_eff.kernels.quantize import largest_magnitude
from lightning_eff.kernels.shared_exponent import integer_encode, round_to_scale_
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats.base import LayerOptions, Products
from lightning_eff.precision.formats.history import History
from lightning_eff.precision.formats.shared_exponent import FlexpointOptions, MasterWeights
from lightning_eff.precision.method import options_from
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from lightning_eff.runtime.finite import OnNonFinite
from lightning_eff.runtime.ranks import seed_of_rank_0

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf"})
"""Optimizer state that steps are divided by: in 16 bits its small elements become zero and the steps explode."""


class FlexpointMixin(QuantizedPrecisionMixin):
    """Trains in flex16+5: int16 tensors with an exponent that Autoflex predicts before they are written.

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
    options_class: ClassVar[type[LayerOptions]] = FlexpointOptions
    options: FlexpointOptions

    def __init__(
        self,
        *,
        alpha: float = FlexpointOptions.alpha,
        beta: float = FlexpointOptions.beta,
        gamma: float = FlexpointOptions.gamma,
        length: int = FlexpointOptions.length,
        store_results: bool = FlexpointOptions.store_results,
        weights: MasterWeights = FlexpointOptions.weights,
        weight_rounding: Literal["nearest", "stochastic"] = FlexpointOptions.weight_rounding,
        products: Products = FlexpointOptions.products,
        exempt: Sequence[str] = FlexpointOptions.exempt,
        exempt_first_last: bool = FlexpointOptions.exempt_first_last,
        pack_relu: bool = FlexpointOptions.pack_relu,
        measure_every_n_steps: int = FlexpointOptions.measure_every_n_steps,
        on_nonfinite: OnNonFinite = FlexpointOptions.on_nonfinite,
    ) -> None:
        options = options_from(locals())
        super().__init__()
        self.configure_method(**options)

    def _begin(self, **options: Any) -> None:
        """See the base class."""
        self._weights: dict[str, History] = {}
        self._scales: dict[str, float] = {}
        super()._begin(**options)

    def _forget_run(self) -> None:
        """Forget what was written too: it belongs to the model it was written for."""
        super()._forget_run()
        self._weights = {}
        self._scales = {}

    # ------------------------------------------------------------------------------------------ weights in 16 bits

    def _after_step(self, optimizer: Optimizer) -> None:
        """Write weights and optimizer state with their predicted exponents, where there are no float32 masters."""
        if self.options.weights == "float32":
            return
        if self.options.weight_rounding == "stochastic" and self.seeds.seed is None:
            self.seeds.seed = seed_of_rank_0()
        names = {id(p): name for name, p in self._models.parameters()}
        with torch.no_grad():
            for name, tensor in _tensors(optimizer, names):
                self._write(name, tensor)
        self._tell_layers()

    def _write(self, name: str, tensor: Tensor) -> None:
        history = self._weights.setdefault(name, History(self.options.autoflex()))
        flex = history.estimate_as(Autoflex)
        if not flex.initialised:
            flex.initialise(float(largest_magnitude(tensor)))
        scale = torch.tensor(flex.scale, dtype=torch.float32, device=tensor.device)
        observed = torch.empty((), dtype=torch.float32, device=tensor.device)
        if self.options.weight_rounding == "nearest":
            round_to_scale_(tensor, scale, observed=observed)
        else:
            seed = self.seeds.next(same_on_ranks=True)
            codes = integer_encode(tensor, scale, rounding="stochastic", seed=seed, observed=observed)
            tensor.copy_(codes.dequantize(tensor.dtype))
        history.observe(observed)
        self._scales[name] = flex.scale

    def _tell_layers(self) -> None:
        """Tell the layers on which grid a written weight lies, to read it with."""
        written = {p.data_ptr(): self._scales[name] for name, p in self._models.parameters() if name in self._scales}
        for state in self.states().values():
            state.written = written

    def _forget_other_weights(self) -> None:
        """Forget the grids of weights that were never written: a second fit may bring its own."""
        for name, p in self._models.parameters():
            scale = self._scales.get(name)
            if scale is not None and not torch.equal(round_to_scale(p.detach(), scale), p):
                del self._scales[name]

    def histories(self) -> list[History]:
        """Return those of layers, and of written weights and optimizer state."""
        return [*super().histories(), *self._weights.values()]

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the base class's, and what is known of weights and optimizer state."""
        estimates = {name: history.estimate.state_dict() for name, history in self._weights.items()}
        return {**super().state_dict(), "weights": {"memory": estimates, "scales": dict(self._scales)}}

    def _take(self, own: dict[str, Any]) -> None:
        self._scales = own["weights"]["scales"]
        self._weights = {}
        for name, values in own["weights"]["memory"].items():
            self._weights[name] = History(self.options.autoflex())
            self._weights[name].estimate.load_state_dict(values)
        super()._take(own)

    def _apply_state(self) -> None:
        super()._apply_state()
        self._forget_other_weights()
        self._tell_layers()


def _tensors(optimizer: Optimizer, names: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter that was updated and its elementwise optimizer state, with names that survive a restart."""
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
