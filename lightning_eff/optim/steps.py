"""Every step of every ``torch.optim`` optimizer, told to whoever listens, by whichever way it is taken.

Lightning tells its plugins of the steps that go through it; not of those of a raw optimizer in manual optimization, of
one that was made later, or of one it never heard of. torch calls hooks around the ``step`` of all of them. These hooks
are the process's: a listener asks of each optimizer whether it is its own. They are there while somebody listens.

A step that an optimizer takes inside the step of another (Lookahead, ZeRO) is part of that one and is not told; one
that is taken in its closure is a step of its own.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Closure = Callable[[], Any]


class StepListener(Protocol):
    """What is told of steps; it is held weakly."""

    def before_step(self, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """See a step that begins, and return the closure to use: a closure makes the gradients during the step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """See a step that has ended without an error."""


class _Thread(threading.local):
    """The steps that are under way in one thread, outermost first."""

    def __init__(self) -> None:
        self.running: list[weakref.ref[Optimizer]] = []


class StepHooks:
    """torch's two global hooks, and who listens."""

    def __init__(self) -> None:
        self._listeners: tuple[weakref.ref[StepListener], ...] = ()  # replaced, never changed: threads read it
        self._handles: list[Any] = []
        self._lock = threading.Lock()
        self._thread = _Thread()

    def add(self, listener: StepListener) -> None:
        """Tell ``listener`` of steps from now on; harmless when it listens already."""
        with self._lock:
            if all(other is not listener for other in self._live()):
                self._listeners = (*self._alive(), weakref.ref(listener))
            if not self._handles:
                before = register_optimizer_step_pre_hook(self._before)
                self._handles = [before, register_optimizer_step_post_hook(self._after)]
        self._thread.running = []  # a step of an earlier run that raised never ended

    def remove(self, listener: StepListener) -> None:
        """Tell it no more; the hooks go with the last listener."""
        with self._lock:
            self._listeners = tuple(ref for ref in self._alive() if ref() is not listener)
            if not self._listeners:
                for handle in self._handles:
                    handle.remove()
                self._handles = []

    def _alive(self) -> Iterator[weakref.ref[StepListener]]:
        return (ref for ref in self._listeners if ref() is not None)

    def _live(self) -> Iterator[StepListener]:
        return (listener for ref in self._listeners if (listener := ref()) is not None)

    def _place(self, optimizer: Optimizer) -> int | None:
        """Where a step of ``optimizer`` is among those under way."""
        running = self._thread.running
        return next((place for place, ref in enumerate(running) if ref() is optimizer), None)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        running = self._thread.running
        if (place := self._place(optimizer)) is not None:
            del running[place:]  # that step raised, and the caller went on
        changed = None
        if not any(ref() is not None for ref in running):
            changed = self._tell_of_beginning(optimizer, args, kwargs)
        running.append(weakref.ref(optimizer))
        return changed

    def _tell_of_beginning(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        for listener in self._live():
            closure = listener.before_step(optimizer, closure)
        if closure is None:
            return None
        closure = functools.partial(self._evaluate, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _evaluate(self, closure: Closure) -> Any:
        """Run ``closure``; steps in it are not inside the step that asked for it."""
        around, self._thread.running = self._thread.running, []
        try:
            return closure()
        finally:
            self._thread.running = around

    def _after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        running = self._thread.running
        if (place := self._place(optimizer)) is None:
            return  # it began before anybody listened
        del running[place:]
        if not any(ref() is not None for ref in running):
            for listener in self._live():
                listener.after_step(optimizer)


STEPS = StepHooks()
"""The process's only one."""
