"""Unbiased pruning of neural gradients to a set share of zeros.

References:
    Chmiel, Ben-Uri, Shkolnik, Hoffer, Banner, Soudry, Neural gradients are near-lognormal: improved quantized and
    sparse training, ICLR 2021, arXiv:2006.08173, section 4 (homogeneous scheme).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eff.callbacks.gradients.output_gradients import (
    PATTERNS,
    OutputGradients,
    OutputGradientsMixin,
    select_layers,
)
from lightning_eff.checks import Real, Whole, YesNo, check
from lightning_eff.errors import EffWarning, NoEffectWarning, UnsupportedCombinationError
from lightning_eff.functional.numerics.lognormal import lognormal_fit, remaining_sparsity, threshold_for
from lightning_eff.functional.random import GOLDEN64, MASK64, mix64, rank_seed
from lightning_eff.kernels.pruning import stochastic_prune
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.runtime.ranks import has_group, rank, world_size

_GAIN = 2.0
"""Feedback: octaves (natural) the threshold moves per unit of missing sparsity; dS/d ln(a) is 0.05 to 0.3."""
_REACH = 7.0
"""Feedback: largest correction of ln(threshold), so that an unreachable target does not wind it up."""


@dataclass
class _Layer:
    """Holds what is known about one layer; the plain part of the checkpoint."""

    threshold: float = math.nan
    sigma: float = math.nan
    next_fit: int = 0
    correction: float = 0.0
    calls: int = 0


class GradientPruningMixin(OutputGradientsMixin):
    """Prune the gradient at the output of every linear and convolution layer to a share ``sparsity`` of zeros.

    Elements below a threshold become zero or the threshold, at random so that their mean is kept: the weight gradients
    stay unbiased and get noisier. The threshold follows in closed form from the mean and deviation of ln|g|, measured
    on one backward every ``refit_every_n_steps`` optimizer steps. Zeros that are there already (after ReLU) count.

    It makes no step faster: no CPU or GPU multiplies unstructured zeros faster, and the pruning itself costs several
    passes over each gradient. Use it to study how sparse gradients may be, as a regulariser, or to estimate what
    hardware with sparse products would save.

    Args:
        sparsity: wanted share of zeros, 0 and more, below 1. 0 changes nothing. The paper reaches 0.85 on ImageNet.
        layers: shell patterns of the names of the layers to prune.
        exclude: patterns of layers to leave alone, for example the last one.
        warmup_steps: optimizer steps before pruning begins (the paper: half an epoch).
        refit_every_n_steps: optimizer steps between two fits; each fit costs one synchronisation per layer.
        feedback: correct each threshold by what was achieved. Real gradients are only nearly lognormal and miss the
            target by a few percent without.

    Raises:
        ConfigurationError: an argument out of range; at the start of training, a pattern that matches no layer.
        UnsupportedCombinationError: at the start of fit, a precision with a loss scaler or an untested strategy; in
            backward, gradients of gradients.

    State: ``seed``, and ``ranks``: for each rank the threshold, deviation, next fit, correction and call count of each
    layer, all of one run. Randomness: seeds follow from ``torch.initial_seed()`` and the call count; nothing is drawn
    from torch.
    """

    info: ClassVar[MethodInfo] = METHODS["gradient_pruning"]

    def __init__(
        self,
        sparsity: float = 0.85,
        *,
        layers: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        warmup_steps: int = 100,
        refit_every_n_steps: int = 100,
        feedback: bool = False,
    ) -> None:
        super().__init__(first=True)
        self.sparsity: float = check("sparsity", sparsity, Real(0, 1, below=True))
        self.layers: tuple[str, ...] = check("layers", layers, PATTERNS)
        self.exclude: tuple[str, ...] = check("exclude", exclude, PATTERNS)
        self.warmup_steps: int = check("warmup_steps", warmup_steps, Whole())
        self.refit_every_n_steps: int = check("refit_every_n_steps", refit_every_n_steps, Whole(1))
        self.feedback: bool = check("feedback", feedback, YesNo())
        self._forget_run()

    def _forget_run(self) -> None:
        """Begin without what another run has left behind."""
        self._seed: int | None = None
        self._layers: dict[str, _Layer] = {}
        self._corrections: dict[str, Tensor] = {}
        self._keys: dict[str, int] = {}
        self._step = 0
        self._seen = -1
        self._measure = False
        self._pruned = 0
        self._zeros: list[Tensor] = []
        self._elements = 0

    # ------------------------------------------------------------------------------------------ Lightning's hooks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the layers and watch their gradients."""
        if self.sparsity == 0:
            return
        chosen = select_layers(pl_module, self.layers, self.exclude)
        self._seed = torch.initial_seed() & MASK64 if self._seed is None else self._seed
        self._layers = {name: self._layers.get(name, _Layer()) for name in chosen}
        self._keys = {}
        self._hooks = OutputGradients(first=True)
        self._seen = -1
        self._corrections = {}
        self._pruned = 0
        self._zeros = []
        self._elements = 0
        self._watch(chosen)

    def _watch(self, chosen: dict[str, nn.Module]) -> None:
        """Watch the layers there are now; for one that has taken the place of another, fit anew."""
        for name in chosen:
            self._keys.setdefault(name, len(self._keys))
            self._layers.setdefault(name, _Layer())
        for name in self._hooks.attach(chosen, self._on_gradient):
            self._layers[name].next_fit = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the step, and whether what it achieves will be logged; watch the layers there are now."""
        if self.sparsity == 0:
            return
        fitted = max((layer.next_fit - self.refit_every_n_steps for layer in self._layers.values()), default=0)
        step, every = self._steps(at_least=fitted), trainer.log_every_n_steps
        if step != self._step or self._seen < 0:  # otherwise a further micro-batch of the same step
            self._measure = every > 0 and self._is_due(every, step, step - 1 if self._seen < 0 else self._step)
        self._step = self._seen = step
        self._watch(select_layers(pl_module, self.layers, self.exclude, strict=False))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what was achieved in a measured step."""
        self._hooks.detach()
        if self._steps() == self._step or not self._elements:
            return
        layers = [layer for name, layer in self._layers.items() if name in self._hooks.names]
        sigmas = [layer.sigma / math.log(2) for layer in layers if math.isfinite(layer.sigma)]
        zeros = torch.stack([count.cpu() for count in self._zeros]).sum()
        self._log(pl_module, {"sparsity": zeros / self._elements, "sigma_log2": sum(sigmas) / max(len(sigmas), 1)})
        self._zeros = []
        self._elements = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks off; say so if nothing was pruned."""
        self._hooks.detach()
        self._note_corrections()
        if self.sparsity > 0 and not self._pruned:
            warnings.warn(
                f"GradientPruning(sparsity={self.sparsity}) pruned nothing in this run: it ended at step "
                f"{self._steps()} with warmup_steps={self.warmup_steps}, or its layers saw no gradient, or the "
                f"gradients had that many zeros already.",
                NoEffectWarning,
                stacklevel=2,
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off, and note how far the feedback has come."""
        self._hooks.detach()
        self._note_corrections()
        super().on_exception(trainer, pl_module, exception)

    # ------------------------------------------------------------------------------------------ one gradient

    def _on_gradient(self, name: str, grad: Tensor) -> Tensor | None:
        if self._step < self.warmup_steps:
            return None
        if grad.requires_grad:
            raise UnsupportedCombinationError(
                f"GradientPruning cannot prune a gradient that is differentiated again (layer {name!r}); exclude it."
            )
        layer = self._layers[name]
        if self._step >= layer.next_fit:
            self._fit(layer, grad)
        layer.calls += 1
        if layer.threshold > 0:
            tau, seed = self._threshold(name, layer, grad), self._next_seed(name, layer)
            pruned, zeros = stochastic_prune(grad, tau, seed)
            self._pruned += 1
            self._correct(name, layer, zeros / grad.numel())
        else:
            pruned, zeros = grad, (grad == 0).sum()
        if self._measure:
            self._zeros.append(zeros)
            self._elements += grad.numel()
        return pruned

    def _fit(self, layer: _Layer, grad: Tensor) -> None:
        layer.next_fit = self._step + self.refit_every_n_steps
        fit = lognormal_fit(grad)
        if math.isfinite(fit.mu):  # otherwise all zero, or damaged: the last threshold stays
            target = remaining_sparsity(self.sparsity, fit.zero_share)
            layer.threshold, layer.sigma = math.exp(fit.mu) * threshold_for(target, fit.sigma), fit.sigma

    def _threshold(self, name: str, layer: _Layer, grad: Tensor) -> float | Tensor:
        if not self.feedback:
            return layer.threshold
        return layer.threshold * self._correction(name, layer, grad).exp()

    def _correction(self, name: str, layer: _Layer, grad: Tensor) -> Tensor:
        if name not in self._corrections:
            self._corrections[name] = torch.tensor(layer.correction, dtype=torch.float32, device=grad.device)
        return self._corrections[name]

    def _correct(self, name: str, layer: _Layer, achieved: Tensor) -> None:
        if self.feedback:
            correction = self._correction(name, layer, achieved) + _GAIN * (self.sparsity - achieved)
            self._corrections[name] = correction.clamp(-_REACH, _REACH)

    def _next_seed(self, name: str, layer: _Layer) -> int:
        """Return a seed from run, layer and call count (splitmix64), different on every rank."""
        place = (self._keys[name] + 1) * GOLDEN64 + layer.calls * 0xD1B54A32D192ED03
        return rank_seed(mix64((self._seed or 0) + place))

    # ------------------------------------------------------------------------------------------ state

    def _note_corrections(self) -> None:
        for name, correction in self._corrections.items():
            self._layers[name].correction = float(correction)

    def state_dict(self) -> dict[str, Any]:
        """Return thresholds and call counts of every rank; all ranks must ask together, as Lightning does."""
        self._note_corrections()
        own = {name: asdict(layer) for name, layer in self._layers.items()}
        ranks = [own]
        if has_group():
            ranks = [own] * world_size()
            dist.all_gather_object(ranks, own)
        return {"seed": self._seed, "ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with this rank's thresholds; with more ranks than before, the new ones take those of rank 0.

        Raises:
            CheckpointError: the state is damaged; nothing is changed.
        """
        found = self.info.read_state(state_dict)
        ranks = found["ranks"]
        own_rank, world = rank(), world_size()
        if len(ranks) != world and own_rank == 0:
            warnings.warn(
                f"GradientPruning: the checkpoint is of {len(ranks)} ranks, this run has {world}. Ranks that were not "
                "there before prune with the thresholds of rank 0: the resume is not exact.",
                EffWarning,
                stacklevel=2,
            )
        self._seed = found["seed"]
        own = ranks[own_rank] if own_rank < len(ranks) else ranks[0]
        self._layers = {name: _Layer(**values) for name, values in own.items()}
        self._corrections = {}
