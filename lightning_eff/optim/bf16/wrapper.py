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

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.checks import Choice, check
from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.functional.random import MASK64
from lightning_eff.kernels.bf16 import SGDRule, join_fp32, sgd_step, write_kahan, write_split, write_stochastic
from lightning_eff.optim.bf16.checkpoint import KEPT, SCALARS, read_updates
from lightning_eff.optim.bf16.noise import Streams, noise_seed
from lightning_eff.optim.bf16.shadows import Room, empty_shadow, widened
from lightning_eff.optim.bf16.states import widen_states

Update = Literal["sr", "kahan", "split"]
UPDATES: tuple[str, ...] = get_args(Update)
_PART = 1 << 20
"""Elements that one call of a torch optimizer updates, unless a single parameter is larger."""

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
    optimizer._bf16 = {  # type: ignore[attr-defined]
        "update": update,
        "seed": (torch.initial_seed() if seed is None else seed) & MASK64,
        "steps": 0,
    }
    optimizer._streams = Streams()  # type: ignore[attr-defined]
    optimizer.identify(names or {})  # type: ignore[attr-defined]
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
    for part in self._parts(seeds, self._update_at_once(seeds)):
        given = () if closure is None else (_Evaluated(self, loss),)
        with self._on_shadows(part):
            result = self._original_step(*given, *args, **kwargs)
    self._bf16["steps"] += 1
    return result


_SCHEDULER_MARKS = ("_wrapped_by_lr_sched", "_with_counter")
"""How a scheduler knows that ``step`` tells it of its calls: torch from 2.5 on, and before."""

_hooked_step: Any = Optimizer.profile_hook_step(_step)  # hooks run around the whole step and see the user's parameters
for _mark in ("hooked", *_SCHEDULER_MARKS):
    setattr(_hooked_step, _mark, True)


class ShadowedOptimizer(Optimizer):
    """What :func:`bf16_updates` puts before the class of an optimizer. Never constructed by itself."""

    _bf16: dict[str, Any]
    _streams: Streams
    _original: type[Optimizer]
    _opt_called: bool
    _step_count: int

    step = _hooked_step

    @property
    def update(self) -> str:
        """``"sr"``, ``"kahan"`` or ``"split"``."""
        return str(self._bf16["update"])

    def _original_step(self, *args: Any, **kwargs: Any) -> Any:
        step: Any = self._original.step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step  # the hooks have been called
        return step(self, *args, **kwargs)

    # ------------------------------------------------------------------------------------------ one step

    @property
    def _by_itself(self) -> bool:
        """Whether the step treats each parameter by itself and keeps no reference to it, as torch's own do."""
        return self._original.__module__.startswith("torch.optim.")

    def identify(self, names: Mapping[Tensor, str]) -> None:
        """Name the parameters that have taken no step yet and have no name: those of groups that were added."""
        self._streams.name(self.param_groups, names)

    def unidentified(self) -> list[Tensor]:
        """The parameters that have neither name nor place yet."""
        return [p for p in self._every() if p not in self._streams]

    def _seeds(self) -> dict[Tensor, int]:
        """Every parameter, and the seed of its stochastic rounding in this step."""
        every = self._every()
        if self.update != "sr":
            return dict.fromkeys(every, 0)
        seed, step, streams = self._bf16["seed"], self._bf16["steps"], self._streams.of(every)
        return {p: noise_seed(seed, step, stream) for p, stream in zip(every, streams, strict=True)}

    def _every(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _update_at_once(self, seeds: Mapping[Tensor, int]) -> set[Tensor]:
        """Update in one pass over memory what can be: plain SGD, with the bits that shadows give. Return what was."""
        done: set[Tensor] = set()
        if self._original is not torch.optim.SGD:
            return done
        for group in self.param_groups:
            numbers = {name: group[name] for name in SGDRule.__dataclass_fields__}
            plain = all(isinstance(number, int | float) for number in numbers.values())  # no tensors
            if plain and not group["fused"] and not group["differentiable"]:
                rule = SGDRule(**numbers)
                done.update(p for p in group["params"] if self._sgd_at_once(p, rule, seeds[p]))
        return done

    def _sgd_at_once(self, p: Tensor, rule: SGDRule, seed: int) -> bool:
        """Update ``p``, or return False and change nothing."""
        if type(p) is not nn.Parameter or type(p.grad) is not Tensor or p.grad.layout is not torch.strided:
            return False
        if not p.dtype is p.grad.dtype is torch.bfloat16:
            return False
        kept, buffer, update = self._take_kept(p), None, self._bf16["update"]
        if rule.momentum:
            buffer = self.state[p].get("momentum_buffer")
        first = buffer is None
        if rule.momentum and buffer is None:
            buffer = torch.empty(p.shape, dtype=torch.float32, device=p.device)
        done = sgd_step(rule, p, kept, p.grad, buffer, update=update, first=first, seed=seed)
        if update in KEPT:
            self.state[p][KEPT[update][0]] = kept
        if done and buffer is not None:
            self.state[p]["momentum_buffer"] = buffer
        return done

    def _parts(self, seeds: Mapping[Tensor, int], done: Container[Tensor] = ()) -> list[dict[Tensor, int]]:
        """Which parameters (and their seeds) are updated together: as few as are worth a call, or all.

        torch's own optimizers treat each parameter by itself, so their step may run over a few at a time. Of others
        that is not known: they see all at once. Those that are ``done`` are left out.
        """
        every = {p: seed for p, seed in seeds.items() if p not in done}
        if not self._by_itself:
            return [every]
        parts: list[dict[Tensor, int]] = [{}]
        size = 0
        for p, seed in every.items():
            if p.grad is not None:
                numel = p.numel() if p.dtype is torch.bfloat16 else 0
                if size and size + numel > _PART:
                    parts.append({})
                    size = 0
                parts[-1][p] = seed
                size += numel
        return parts

    @contextlib.contextmanager
    def _on_shadows(self, part: dict[Tensor, int]) -> Iterator[None]:
        """Put shadows in the places of the bfloat16 parameters that have a gradient; write back what they became."""
        shadows: dict[Tensor, nn.Parameter] = {}
        kept: dict[Tensor, Tensor] = {}
        halves = [p for p in part if p.dtype is torch.bfloat16 and p.grad is not None]
        room = Room(halves if self._by_itself else [])
        with torch.no_grad():
            for p in halves:
                kept[p] = self._take_kept(p)
                # torch's CPU addition of a sparse tensor writes past a tensor that does not start its storage.
                dense = p.grad is not None and p.grad.layout is torch.strided
                shadows[p] = nn.Parameter(self._widen(p, kept[p], room.take(p) if dense else empty_shadow(p)))
                shadows[p].grad = widened(p.grad, room)
        done = False
        try:
            with self._exchanged({p: shadows.get(p, p) for p in part}):
                yield
            done = True
        finally:
            with torch.no_grad():
                for p in list(shadows):
                    shadow = shadows.pop(p)
                    if done:
                        self._write(p, shadow, kept[p], part[p])
                    if self.update in KEPT:
                        self.state[p][KEPT[self.update][0]] = kept[p]

    @contextlib.contextmanager
    def _exchanged(self, places: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Let ``places[p]`` stand for ``p`` in the parameter groups and in the state; hide what is not in it."""
        lists = [(group["params"], list(group["params"])) for group in self.param_groups]
        for params, originals in lists:
            params[:] = [places[p] for p in originals if p in places]
        self._rename(places)
        try:
            yield
        finally:
            for params, originals in lists:
                params[:] = originals
            self._rename({stand_in: p for p, stand_in in places.items()})

    def _rename(self, names: Mapping[Any, Any]) -> None:
        for old, new in names.items():
            if old in self.state and (state := self.state.pop(old)):
                self.state[new] = state

    def _take_kept(self, p: Tensor) -> Tensor:
        """What the update keeps for ``p``, taken out of the optimizer's state: optimizers start where that is empty."""
        if self.update not in KEPT:
            return p
        key, dtype = KEPT[self.update]
        kept = self.state[p].pop(key, None) if p in self.state else None
        if kept is None:
            return torch.zeros(p.shape, dtype=dtype, device=p.device)
        return kept.to(p.device)  # type: ignore[no-any-return]

    def _widen(self, p: Tensor, kept: Tensor, out: Tensor) -> Tensor:
        return join_fp32(p, kept, out=out) if self.update == "split" else out.copy_(p.detach())

    def _write(self, p: Tensor, shadow: Tensor, kept: Tensor, seed: int) -> None:
        """Bring the float32 result into the bfloat16 parameter."""
        if self.update == "sr":
            write_stochastic(p, shadow, seed)
        elif self.update == "kahan":
            write_kahan(p, kept, shadow, is_sum=True)
        else:
            write_split(p, kept, shadow)

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, with what is kept for each parameter, the update, the seed, the steps and streams."""
        streams = {"streams": self._streams.of(self._every())} if self.update == "sr" else {}
        return {**super().state_dict(), SCALARS: self._bf16 | streams}

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
        with self._exchanged({p: stand_ins.get(p, p) for p in every}):
            super().load_state_dict(state_dict)
        for p in halves:
            for update, (key, dtype) in KEPT.items():
                if p in self.state and key in self.state[p]:
                    kept = self.state[p].pop(key)
                    if update == self.update:
                        self.state[p][key] = kept.to(dtype)  # through float32, which holds either dtype exactly
        if numbers is not None:
            self._bf16.update(seed=numbers["seed"], steps=numbers["steps"])
            if self.update == numbers["update"] == "sr":
                self._streams.load(every, numbers["streams"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_bf16": dict(self._bf16), "_streams": self._streams}

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
