"""The profile of a model from its first batch: what runs where, what passes, how long it takes.

One ``training_step`` is run on rank 0 with nothing kept of it: no log, no random number, no running statistic, no
update of a metric. Every layer's forward and backward pass is run and timed by itself, so no more than one layer's
activations are kept at a time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.functional.staleness.curvature import top_curvature
from lightning_eff.runtime.rng import USER, Randomness
from lightning_eff.strategies.pipelined_bp.carry import Carry, Form
from lightning_eff.strategies.pipelined_bp.entry import Entry
from lightning_eff.strategies.pipelined_bp.stack import Stack

__all__ = ["Profile", "measure_curvature", "profile_stack"]

REPEATS, ENOUGH_S = (5, 20), 0.2
"""A layer is timed at least and at most so often, and within these limits for so long; the fastest counts."""


@dataclass
class Profile:
    """Holds what one training step showed of a stack of layers.

    Attributes:
        costs_s: forward and backward seconds of every layer; what runs before and after the stack is in the first and
            the last.
        forms: of what enters each layer, and last of what leaves the stack.
        sizes: of the tensors of each form, (shape, dtype, whether it needs a gradient).
        before: names of the parameters used before the stack.
        after: names of the parameters used after it.
        modules_before: names of the modules that ran before the stack.
    """

    costs_s: list[float] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    sizes: list[list[tuple[torch.Size, torch.dtype, bool]]] = field(default_factory=list)
    before: set[str] = field(default_factory=set)
    after: set[str] = field(default_factory=set)
    modules_before: set[str] = field(default_factory=set)

    def note_carry(self, carry: Carry) -> None:
        """Note the form and the sizes of what passes between two layers."""
        form = Form.of(carry)
        self.forms.append(form)
        self.sizes.append([(t.shape, t.dtype, t.requires_grad) for t in form.tensors(carry)])


def profile_stack(model: nn.Module, stack: Stack, step: Callable[[], Any], device: torch.device) -> Profile:
    """Run ``step`` once, and measure the layers one by one.

    Args:
        model: the LightningModule.
        stack: its layers.
        step: runs the user's ``training_step`` on the first batch, in the context the precision wants.
        device: where.

    Raises:
        UnsupportedCombinationError: the layers are not run once, one after the other; or ``training_step`` returns
            nothing.
        ConfigurationError: ``training_step`` does not come by the stack.
    """
    profile, watch = Profile(), _Watch(device)
    leaving: list[Tensor] = []

    def inside(carry: Carry) -> Any:
        profile.costs_s.append(watch.lap())
        profile.before = _used(model, [t for t in pytree.tree_leaves(tuple(carry)) if isinstance(t, Tensor)])
        profile.costs_s[0] += watch.lap()
        profile.modules_before = ran()
        for layer in stack.layers:
            carry = _detach(carry)
            profile.note_carry(carry)
            seconds, out = _time_layer(layer, carry, watch)
            profile.costs_s.append(seconds)
            carry = carry._replace(x=out)
        carry = _detach(carry)
        profile.note_carry(carry)
        leaving.extend(t for t in pytree.tree_leaves(carry.x) if isinstance(t, Tensor))
        watch.lap()
        return carry.x

    with _unchanged(model, device), _modules_that_ran(model, stack) as ran, torch.enable_grad():
        with Entry(stack, inside) as entry:
            watch.lap()
            out = step()
        if not entry.entered:
            raise ConfigurationError(
                f"training_step does not run {stack.name or 'the stack'!r} (a compiled module around it hides it: "
                "compile the layers instead). Name the module that holds the layers: PipelinedBPStrategy(module=...)."
            )
        loss = out if isinstance(out, Tensor) else (out or {}).get("loss")
        if loss is None or not loss.requires_grad:
            raise UnsupportedCombinationError(
                "The first training_step returned no loss that depends on the model; pipelined_bp looks at it to see "
                "what runs where. Return a loss for the first batch."
            )
        forward_s = watch.lap()
        profile.after = _used(model, [loss])
        last = forward_s + watch.lap()
    first = profile.costs_s.pop(0)
    profile.costs_s[0] += first
    profile.costs_s[-1] += last
    return profile


def measure_curvature(
    model: nn.Module, step: Callable[[], Any], device: torch.device, weights: Sequence[nn.Parameter] | None = None
) -> float:
    """Return the largest eigenvalue of the Hessian of the first batch's loss; about 40 passes.

    Args:
        model: the LightningModule; as it was, afterwards.
        step: runs the user's ``training_step`` on the first batch.
        device: where.
        weights: in which directions; None for all that are trained.
    """
    weights = [p for p in model.parameters() if p.requires_grad] if weights is None else weights
    if not weights:
        return 0.0
    before = [p.detach().clone() for p in weights]

    def gradient(flat: Tensor) -> Tensor:
        with torch.no_grad():
            for p, part in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
                p.data.copy_(part.view_as(p))
        with Randomness(0, device).of(0, USER), torch.enable_grad():  # the same draws in every pass
            out = step()
            loss = out if isinstance(out, Tensor) else out["loss"]
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
        zeroed = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, grads, strict=True)]
        return torch.cat([g.reshape(-1) for g in zeroed])

    try:
        with _unchanged(model, device):
            return top_curvature(gradient, torch.cat([p.reshape(-1) for p in before]))
    finally:
        for p, value in zip(weights, before, strict=True):
            p.data.copy_(value)


class _Watch:
    """Tells the seconds since its last lap, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, 0.0

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        took, self._last = now - self._last, now
        return took


def _detach(carry: Carry) -> Carry:
    """Return the same values without the graph behind them."""

    def leaf(t: Any) -> Any:
        return t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    return Carry(*pytree.tree_map(leaf, tuple(carry)))


def _time_layer(layer: nn.Module, carry: Carry, watch: _Watch) -> tuple[float, Any]:
    """Return the seconds of a layer's forward and backward, the fastest of several, and what it returned."""
    seconds: list[float] = []
    inputs = [t for t in pytree.tree_leaves(tuple(carry)) if isinstance(t, Tensor) and t.requires_grad]
    inputs += [p for p in layer.parameters() if p.requires_grad]
    while len(seconds) < REPEATS[0] or (len(seconds) < REPEATS[1] and sum(seconds) < ENOUGH_S):
        # A layer may work in place: not several times on the same tensor, and not on a leaf.
        x, args, kwargs = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tuple(carry))
        watch.lap()
        out = layer(x, *args, **kwargs)
        roots = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        if roots and inputs:
            torch.autograd.grad(roots, inputs, [torch.ones_like(t) for t in roots], allow_unused=True)
        seconds.append(watch.lap())
    return min(seconds), out


def _used(model: nn.Module, roots: list[Tensor]) -> set[str]:
    """Return the names of the parameters on which ``roots`` depend."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    roots = [t for t in roots if t.requires_grad]
    if not roots or not named:
        return set()
    ones = [torch.ones_like(t) for t in roots]
    grads = torch.autograd.grad(roots, [p for _, p in named], ones, allow_unused=True, retain_graph=True)
    return {name for (name, _), grad in zip(named, grads, strict=True) if grad is not None}


@contextlib.contextmanager
def _modules_that_ran(model: nn.Module, stack: Stack) -> Iterator[Callable[[], set[str]]]:
    """Note which modules outside the layers run: a hook in a layer makes a compiled one compile again."""
    seen: set[str] = set()
    inside = {module for layer in stack.layers for module in layer.modules()}
    outside = [(name, module) for name, module in model.named_modules() if module not in inside]
    hooks = [module.register_forward_pre_hook(lambda *_, name=name: seen.add(name)) for name, module in outside]
    try:
        yield lambda: set(seen)
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep nothing of what happens inside: random numbers, buffers, metrics, logs."""
    # A buffer may be written to, or replaced by another tensor.
    named = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    buffers = [(m, name, b, b.detach().clone()) for m, name, b in named]
    metrics = [(m, _state_of(m)) for m in model.modules() if hasattr(m, "_update_count") and hasattr(m, "_defaults")]
    muted = ("log", "log_dict")
    own = {name: model.__dict__[name] for name in muted if name in model.__dict__}
    for name in muted:
        model.__dict__[name] = lambda *_, **__: None
    try:
        with Randomness(0, device).of(0, USER):
            yield
    finally:
        for name in muted:
            del model.__dict__[name]
        model.__dict__.update(own)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)
        for metric, state in metrics:
            metric.__dict__.update(state)


def _state_of(metric: Any) -> dict[str, Any]:
    """Return what a torchmetrics.Metric has accumulated."""
    names = [*metric._defaults, "_update_count", "_computed"]
    values = {name: getattr(metric, name) for name in names}
    return {
        name: v.detach().clone() if isinstance(v, Tensor) else list(v) if isinstance(v, list) else v
        for name, v in values.items()
    }
