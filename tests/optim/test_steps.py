"""Steps are told once, whoever takes them; what raised, or is inside another step, is not one."""

from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_eff.optim.steps import STEPS

pytestmark = pytest.mark.usefixtures("no_hook_is_left")


class Listener:
    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.error: Exception | None = None

    def before_step(self, optimizer: Any, closure: Any) -> Any:
        self.told.append(("before", optimizer))
        if self.error is not None:
            raise self.error
        return closure if closure is None else lambda: (self.told.append(("closure", optimizer)), closure())[1]

    def after_step(self, optimizer: Any) -> None:
        self.told.append(("after", optimizer))


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    STEPS.add(found)
    yield found
    STEPS.remove(found)


def optimizer(kind: Any = torch.optim.SGD) -> Any:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return kind([weight], lr=0.1)


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer inside its own step."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_a_step_is_told_once_before_and_after(listener: Listener, kind: Any) -> None:
    found = optimizer(kind)
    STEPS.add(listener)
    for give in (lambda: found.step(lambda: torch.zeros(())), lambda: found.step(closure=lambda: torch.zeros(()))):
        listener.told.clear()
        assert float(give()) == 0.0
        names = [name for name, _ in listener.told]
        assert (names[0], names[-1]) == ("before", "after")
        assert names.count("before") == names.count("after") == 1
        assert set(names[1:-1]) == {"closure"}


def test_a_step_without_a_closure(listener: Listener) -> None:
    found = optimizer()
    assert found.step() is None
    assert [name for name, _ in listener.told] == ["before", "after"]


def test_a_step_inside_another_is_part_of_it(listener: Listener) -> None:
    outer = Lookahead(optimizer())
    outer.step()
    assert listener.told == [("before", outer), ("after", outer)]


def test_a_step_in_a_closure_is_a_step_of_its_own(listener: Listener) -> None:
    outer, inner = optimizer(), optimizer()
    outer.step(lambda: (inner.step(), torch.zeros(()))[1])
    assert [found for name, found in listener.told if name == "after"] == [inner, outer]
    listener.told.clear()
    with pytest.raises(ZeroDivisionError):
        outer.step(lambda: (inner.step(), 1 / 0)[1])
    outer.step()
    assert [found for name, found in listener.told if name == "after"] == [inner, outer]


def test_a_step_that_raised_is_over(listener: Listener) -> None:
    def fails() -> Any:
        raise RuntimeError("out of memory")

    one, two = optimizer(), optimizer()
    with pytest.raises(RuntimeError, match="out of memory"):
        one.step(fails)
    one.step()
    two.step()
    assert [entry for entry in listener.told if entry[0] == "after"] == [("after", one), ("after", two)]
    with pytest.raises(RuntimeError, match="out of memory"):
        one.step(fails)
    STEPS.add(listener)  # the next run
    two.step()
    assert listener.told[-1] == ("after", two)
    with pytest.raises(RuntimeError, match="out of memory"):
        one.step(fails)
    del one
    listener.told.clear()
    gc.collect()
    two.step()
    assert listener.told[-1] == ("after", two)


def test_what_a_listener_raises_stops_the_step(listener: Listener) -> None:
    found = optimizer()
    listener.error = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        found.step()
    assert torch.equal(found.param_groups[0]["params"][0], torch.ones(2))
    listener.error = None
    found.step()
    assert [name for name, _ in listener.told] == ["before", "before", "after"]


def test_several_listeners_come_and_go(listener: Listener) -> None:
    second, lost = Listener(), Listener()
    STEPS.add(second)
    STEPS.add(lost)
    del lost
    found = optimizer()
    found.step()
    STEPS.remove(second)
    STEPS.remove(second)
    found.step()
    assert (len(listener.told), len(second.told)) == (4, 2)


def test_steps_of_other_threads_are_their_own(listener: Listener) -> None:
    """A step in another thread while one is under way here is not inside it."""
    mine, theirs = optimizer(), optimizer()

    def closure() -> Any:
        thread = threading.Thread(target=theirs.step)
        thread.start()
        thread.join()
        return torch.zeros(())

    mine.step(closure)
    assert [found for name, found in listener.told if name == "after"] == [theirs, mine]


def test_copies_of_an_optimizer_hold_no_hooks(listener: Listener) -> None:
    copied = pickle.loads(pickle.dumps(optimizer()))
    assert not copied._optimizer_step_pre_hooks
    assert not copied._optimizer_step_post_hooks
