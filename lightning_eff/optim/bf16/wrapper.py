"""Any ``torch.optim`` optimizer, made to update bfloat16 parameters without losing small updates.

The optimizer object stays the one the user made: its class becomes a subclass that runs the original ``step`` on
float32 shadows. While it runs the shadows take the parameters' places in ``param_groups`` and ``state``;
afterwards the new values are written into the parameters. The parameters themselves are never exchanged, nor is their
``data``: hooks, DDP's gradient buckets and ties stay as they are. No float32 copy of the weights is kept.

    update   how a weight is written back                             kept per parameter, besides the optimizer's state
    sr       stochastically rounded, right in the mean                nothing
    kahan    rounded; a compensation takes up what was lost           2 bytes, bfloat16
    split    the upper half is the weight, the lower half is kept     2 bytes, int16; float32 exactly

Optimizer states (momenta) of bfloat16 parameters are float32. A shadow and a widened gradient take 8 bytes per element
while they are needed: for about a million elements at a time (or the largest parameter) with torch's own optimizers,
for all parameters at once with others. On the CPU this buffer is kept for the next step. ``torch.optim.SGD`` needs none
on the CPU: its float32 arithmetic runs inside the pass that reads and writes the weights. Adam and AdamW are several
times faster there with ``fused=True``.

References:
    See :mod:`lightning_eff.functional.numerics.bf16`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.checks import Choice, check
from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.functional.random import MASK64
from lightning_eff.optim.bf16.checkpoint import SCALARS, read_updates
from lightning_eff.optim.bf16.exchange import exchanged
from lightning_eff.optim.bf16.kept import KEPT
from lightning_eff.optim.bf16.noise import Streams, noise_seed
from lightning_eff.optim.bf16.sgd import update_at_once
from lightning_eff.optim.bf16.shadows import on_shadows, parts_of
from lightning_eff.optim.bf16.states import widen_states

Update = Literal["sr", "kahan", "split"]
UPDATES: tuple[str, ...] = get_args(Update)
OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


def bf16_updates(
    optimizer: OptimizerT,
    *,
    update: Update = "split",
    seed: int | None = None,
    names: Mapping[Tensor, str] | None = None,
) -> OptimizerT:
    """Make ``optimizer`` update its bfloat16 parameters in float32, in place, and return it.

    Parameters of other dtypes are updated as they always were. Parameter groups, closures, hooks, schedulers made
    before or after, and ``add_param_group`` work as before; ``state_dict`` holds what an exact continuation needs, and
    a plain optimizer loads it. Doing it again with the same ``update`` changes nothing, but names parameters that have
    no name yet.

    The noise of stochastic rounding is a hash of the seed, the step and the parameter. What identifies a parameter is
    its name, from ``names`` or from the optimizer (``torch.optim.SGD(model.named_parameters())``): parameters of
    another name, in this optimizer or in another, round independently, and groups added later change nobody's noise.
    A parameter without a name is identified by its place in the optimizer when it takes its first step. Optimizers
    whose names or places are alike share their noise unless their seeds differ. ``state_dict`` holds the identities.

    Args:
        optimizer: any optimizer that evaluates its closure at most once in a step.
        update: ``"split"`` (float32 exactly), ``"kahan"`` or ``"sr"``.
        seed: of the stochastic rounding; the same on every rank that holds the same parameters. Default:
            ``torch.initial_seed()``.
        names: parameter -> name, the same on every rank and after a restart. Default: those the optimizer knows.

    Raises:
        ConfigurationError: ``update`` is not known, or the optimizer already has another one.
        UnsupportedCombinationError: the optimizer evaluates its closure several times (LBFGS), or its ``step`` has
            been replaced by something that is not a scheduler's.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = bf16_updates(torch.optim.SGD([weight], lr=1e-3), update="split")
        >>> for _ in range(500):
        ...     weight.grad = -torch.ones_like(weight)
        ...     optimizer.step()
        >>> weight.item()
        1.5
    """
    update = check("update", update, Choice(*UPDATES))
    if isinstance(optimizer, ShadowedOptimizer):
        if optimizer.update != update:
            raise ConfigurationError(f"The optimizer already has update={optimizer.update!r}; {update!r} was given.")
        optimizer.identify(names or {})
        return optimizer
    if isinstance(optimizer, torch.optim.LBFGS):
        raise _several_closures(optimizer)
    patched = optimizer.__dict__.get("step")
    if patched is not None:
        if not any(hasattr(patched, mark) for mark in _SCHEDULER_MARKS):
            raise UnsupportedCombinationError(
                f"The method `step` of this {type(optimizer).__name__} has been replaced by {patched!r}, which would "
                "go past the bfloat16 updates. Replace it after bf16_updates(optimizer)."
            )
        del optimizer.__dict__["step"]  # a scheduler's counter around the old step; ours counts for schedulers itself
    original = type(optimizer)
    optimizer.__class__ = _shadowed(original)
    made = cast("ShadowedOptimizer", optimizer)
    made.bf16_numbers = {
        "update": update,
        "seed": (torch.initial_seed() if seed is None else seed) & MASK64,
        "steps": 0,
    }
    made.bf16_streams = Streams()
    made.identify(names or {})
    widen_states(optimizer, original)
    return optimizer


def _several_closures(optimizer: Optimizer) -> UnsupportedCombinationError:
    return UnsupportedCombinationError(
        f"{type(optimizer).__name__} evaluates its closure several times in one step, each time at other weights; "
        "bfloat16 updates write the weights once per step. Use an optimizer that evaluates it once, or float32 weights."
    )


class _Evaluated:
    """A closure that has already run: gives its loss, once."""

    def __init__(self, optimizer: Optimizer, loss: Any) -> None:
        self.optimizer, self.loss, self.asked = optimizer, loss, False

    def __call__(self) -> Any:
        if self.asked:
            raise _several_closures(self.optimizer)
        self.asked = True
        return self.loss


def _step(self: ShadowedOptimizer, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Evaluate ``closure`` at the bfloat16 weights, then run the original step on float32 shadows."""
    self._opt_called = True  # what a scheduler's wrapper around `step` would do, in this torch ...
    if hasattr(self, "_step_count"):
        self._step_count += 1  # ... and in older ones
    loss = result = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    seeds = self._seeds()
    done = update_at_once(self, self.update, seeds) if self._original is torch.optim.SGD else ()
    for part in parts_of(seeds, self._original, done):
        given = () if closure is None else (_Evaluated(self, loss),)
        with on_shadows(self, self._original, self.update, part):
            result = self._original_step(*given, *args, **kwargs)
    self.bf16_numbers["steps"] += 1
    return result


_SCHEDULER_MARKS = ("_wrapped_by_lr_sched", "_with_counter")
"""How a scheduler knows that ``step`` tells it of its calls: torch from 2.5 on, and before."""

_hooked_step: Any = Optimizer.profile_hook_step(_step)  # hooks run around the whole step and see the user's parameters
for _mark in ("hooked", *_SCHEDULER_MARKS):
    setattr(_hooked_step, _mark, True)


class ShadowedOptimizer(Optimizer):
    """What :func:`bf16_updates` puts before the class of an optimizer. Never constructed by itself.

    Attributes:
        bf16_numbers: the update, the seed of the noise, and how many steps have been taken.
        bf16_streams: which random stream each parameter has.
    """

    bf16_numbers: dict[str, Any]
    bf16_streams: Streams
    _original: type[Optimizer]
    _opt_called: bool
    _step_count: int

    step = _hooked_step

    @property
    def update(self) -> str:
        """``"sr"``, ``"kahan"`` or ``"split"``."""
        return str(self.bf16_numbers["update"])

    def _original_step(self, *args: Any, **kwargs: Any) -> Any:
        step: Any = self._original.step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step  # the hooks have been called
        return step(self, *args, **kwargs)

    # ------------------------------------------------------------------------------------------ one step

    def identify(self, names: Mapping[Tensor, str]) -> None:
        """Name the parameters that have taken no step yet and have no name: those of groups that were added."""
        self.bf16_streams.name(self.param_groups, names)

    def unidentified(self) -> list[Tensor]:
        """Return the parameters that have neither name nor place yet."""
        return [p for p in self._every() if p not in self.bf16_streams]

    def _seeds(self) -> dict[Tensor, int]:
        """Every parameter, and the seed of its stochastic rounding in this step."""
        every = self._every()
        if self.update != "sr":
            return dict.fromkeys(every, 0)
        seed, step, streams = self.bf16_numbers["seed"], self.bf16_numbers["steps"], self.bf16_streams.of(every)
        return {p: noise_seed(seed, step, stream) for p, stream in zip(every, streams, strict=True)}

    def _every(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, with what is kept for each parameter, update, seed, steps and streams."""
        streams = {"streams": self.bf16_streams.of(self._every())} if self.update == "sr" else {}
        return {**super().state_dict(), SCALARS: self.bf16_numbers | streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly; a state of a plain optimizer, or of another update, is taken as far as it goes.

        torch casts states to the dtype of their parameter: for bfloat16 ones, to that of the shadow.

        Raises:
            CheckpointError: what this module has added to the state is damaged; nothing is changed.
        """
        every = self._every()
        numbers = read_updates(state_dict, every, self.update)
        halves = [p for p in every if p.dtype is torch.bfloat16]
        stand_ins = {p: nn.Parameter(torch.empty(0, device=p.device, dtype=torch.float32)) for p in halves}
        with exchanged(self, {p: stand_ins.get(p, p) for p in every}):
            super().load_state_dict(state_dict)
        for p in halves:
            for update, (key, dtype) in KEPT.items():
                if p in self.state and key in self.state[p]:
                    kept = self.state[p].pop(key)
                    if update == self.update:
                        self.state[p][key] = kept.to(dtype)  # through float32, which holds either dtype exactly
        if numbers is not None:
            self.bf16_numbers.update(seed=numbers["seed"], steps=numbers["steps"])
            if self.update == numbers["update"] == "sr":
                self.bf16_streams.load(every, numbers["streams"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "bf16_numbers": dict(self.bf16_numbers), "bf16_streams": self.bf16_streams}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._original,), self.__getstate__()


_MADE: dict[type[Any], type[Any]] = {}


def _shadowed(original: type[Any]) -> type[Any]:
    """The class (ours, ``original``); the same for equal arguments."""
    if original not in _MADE:
        body = {"__module__": __name__, "__doc__": original.__doc__, "_original": original}
        _MADE[original] = type(f"BF16{original.__name__}", (ShadowedOptimizer, original), body)
    return _MADE[original]


def _rebuild(original: type[Any]) -> Any:
    """An empty instance of the class made from ``original`` (copying and unpickling)."""
    made: Any = _shadowed(original)
    return made.__new__(made)
