"""How wide neural gradients are, and which float format suits each layer.

References:
    Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry, Neural gradients are near-lognormal: improved quantized and
    sparse training, ICLR 2021, arXiv:2006.08173, section 5 (optimal float formats).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from rich.table import Table
from torch import Tensor

from lightning_eff.callbacks.gradients.output_gradients import (
    PATTERNS,
    OutputGradientsMixin,
    select_layers,
)
from lightning_eff.checks import Whole, check
from lightning_eff.errors import NoEffectWarning
from lightning_eff.functional.numerics.lognormal import BITS, best_format, lognormal_fit, relative_error
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.runtime.figures import console


@dataclass
class _Layer:
    """Holds sums over the fits of one layer; the plain content of the checkpoint."""

    fits: int = 0
    sigma_log2: float = 0.0
    zeros: float = 0.0


class GradientStatisticsMixin(OutputGradientsMixin):
    """Measure the spread of every layer's output gradient and recommend a split of ``bits`` into exponent and mantissa.

    Every ``every_n_steps`` optimizer steps a lognormal distribution is fitted to the non-zero gradients of each layer
    (a few passes over each gradient, one synchronisation per layer); means over layers are logged. At the end of fit a
    table tells each layer's mean deviation in octaves, its share of zeros, the best split for these (section 5 of the
    paper) and the relative error to expect of it. It changes no number of the run. Next to ``GradientPruning`` it sees
    the pruned gradients.

    Args:
        every_n_steps: optimizer steps between measurements, 1 or more.
        bits: size of the format the recommendation is for, 2 to 8, with the sign.
        layers: shell patterns of the names of the layers to measure.

    Raises:
        ConfigurationError: an argument out of range; at the start of training, a pattern that matches no layer.

    State: ``layers``: for each layer the number of fits, the sums of deviations and of shares of zeros (of rank 0).
    """

    info: ClassVar[MethodInfo] = METHODS["gradient_statistics"]

    def __init__(self, every_n_steps: int = 100, bits: int = 8, *, layers: Sequence[str] = ("*",)) -> None:
        super().__init__()
        self.every_n_steps: int = check("every_n_steps", every_n_steps, Whole(1))
        self.bits: int = check("bits", bits, BITS)
        self.layers: tuple[str, ...] = check("layers", layers, PATTERNS)
        self._forget_run()

    def _forget_run(self) -> None:
        """Begin without what another run has left behind."""
        self._layers: dict[str, _Layer] = {}
        self._latest: dict[str, tuple[float, float]] = {}
        self._step = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers."""
        self._step = -1
        self._latest = {}
        self._layers = {
            name: self._layers.get(name, _Layer()) for name in select_layers(pl_module, self.layers, exclude=())
        }

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Watch the gradients of a step that is measured; the others run without hooks."""
        step = self._steps()
        if step == self._step and self._latest:  # further micro-batches of a measured step
            return
        before = self._step if self._step >= 0 else step - 1
        self._step = step
        self._latest = {}
        if self._is_due(self.every_n_steps, step, before):
            self._hooks.attach(select_layers(pl_module, self.layers, exclude=(), strict=False), self._on_gradient)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log a measured step."""
        self._hooks.detach()
        if self._latest and not trainer.barebones:
            sigmas, zeros = zip(*self._latest.values(), strict=True)
            exponents = [best_format(self.bits, sigma).exponent_bits for sigma in sigmas]
            values = {"sigma_log2": _mean(sigmas), "zeros": _mean(zeros), "exponent_bits": _mean(exponents)}
            self._log(pl_module, values)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Print the recommendations."""
        if not any(layer.fits for layer in self._layers.values()):
            warnings.warn(
                f"GradientStatistics measured nothing: every_n_steps={self.every_n_steps} and training ended at step "
                f"{self._steps()}, or no layer had a finite gradient that is not zero.",
                NoEffectWarning,
                stacklevel=2,
            )
        elif trainer.is_global_zero:
            console().print(self.table())

    def table(self) -> Table:
        """Return the recommendation for every layer measured so far."""
        table = Table(title=f"Neural gradients, and the best format of {self.bits} bits", title_justify="left")
        for column in ("layer", "fits", "sigma (octaves)", "zeros", "sign-exponent-mantissa", "relative error"):
            table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
        for name, layer in self._layers.items():
            if not layer.fits:
                table.add_row(name or "(model)", "0", *["-"] * 4)
                continue
            sigma = layer.sigma_log2 / layer.fits
            fmt = best_format(self.bits, sigma)
            error = relative_error(fmt.exponent_bits, fmt.mantissa_bits, sigma) if sigma > 0 else 0.0
            split, share = f"1-{fmt.exponent_bits}-{fmt.mantissa_bits}", f"{layer.zeros / layer.fits:.1%}"
            table.add_row(name or "(model)", str(layer.fits), f"{sigma:.2f}", share, split, f"{error:.3f}")
        return table

    def _on_gradient(self, name: str, grad: Tensor) -> None:
        if name in self._latest:  # a layer that is used twice, or a further micro-batch
            return
        fit = lognormal_fit(grad)
        if math.isfinite(fit.mu):
            self._latest[name] = fit.sigma_log2, fit.zero_share
            layer = self._layers.setdefault(name, _Layer())  # it may have been added during the run
            layer.fits += 1
            layer.sigma_log2 += fit.sigma_log2
            layer.zeros += fit.zero_share

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, plain numbers."""
        return {"layers": {name: asdict(layer) for name, layer in self._layers.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the sums.

        Raises:
            CheckpointError: the state is damaged; nothing is changed.
        """
        found = self.info.read_state(state_dict)
        self._layers = {name: _Layer(**values) for name, values in found["layers"].items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
