"""The profile of a model, taken with the first batch, of which nothing is kept."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.profiling import measure_curvature, profile_stack
from lightning_eff.strategies.pipelined_bp.stack import find_stack
from tests.strategies.pipelined_bp.stacks import W, linears
from tests.strategies.pipelined_bp.tied import CPU, Tied, profiled


def test_a_look_sees_what_runs_where() -> None:
    stack, profile = profiled(Tied())
    assert profile.before == {"pre.weight", "pre.bias"}
    assert profile.after == {"post.weight", "post.bias"}
    assert "pre" in profile.modules_before
    assert not profile.modules_before & {"post", "net.0", "idle"}
    assert len(profile.costs_s) == len(stack) == 4
    assert min(profile.costs_s) > 0
    assert profile.sizes == [[(torch.Size([3, W]), torch.float32, True)]] * 5
    assert [form.template[0] for form in profile.forms] == [profile.forms[0].template[0]] * 5


class Traces(Tied):
    """Whatever can remember a training step does."""

    def __init__(self) -> None:
        from torchmetrics import CatMetric, MeanMetric

        super().__init__()
        self.norm, self.mean, self.seen = nn.BatchNorm1d(W), MeanMetric(), CatMetric()
        self.net = nn.Sequential(nn.Linear(W, W), nn.Dropout(0.5), nn.BatchNorm1d(W), nn.ReLU(inplace=True))
        self.register_buffer("average", torch.zeros(W))
        self.logged: list[str] = []
        self.mean.update(3.0)

    def log(self, name: str, *_: Any) -> None:
        self.logged.append(name)

    log_dict = log

    def step(self) -> Tensor:
        noise = np.random.rand() + random.random() + torch.rand(())  # noqa: NPY002 - what augmentation draws from
        out = self.post(self.net(self.norm(self.pre(self.batch))))
        self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)  # another tensor under the same name
        self.mean.update(5.0)
        self.seen.update(7.0)
        self.log("loss", noise)
        self.log_dict({"noise": noise})
        return out.square().mean()


def state(traces: Traces) -> dict[str, Any]:
    numpy: Any = np.random.get_state()  # noqa: NPY002
    metrics = {
        "mean": float(traces.mean.compute()),
        "updates": traces.seen._update_count,
        "seen": list(traces.seen.value),
    }
    values = {k: v.tolist() for k, v in traces.state_dict().items()} | {"batch": traces.batch.tolist()}
    grads = [p.grad for p in traces.parameters()]
    return {
        **values, **metrics, "torch": torch.get_rng_state().tolist(), "python": random.getstate(),
        "numpy": numpy[1].tolist(), "at": numpy[2], "logged": list(traces.logged), "grads": grads,
    }  # fmt: skip


@pytest.mark.parametrize("ends", ["well", "badly"])
@pytest.mark.parametrize("of", ["look", "curvature"])
def test_a_look_leaves_nothing_behind(ends: str, of: str) -> None:
    traces = Traces()
    average, before = traces.average, state(traces)
    calls: list[int] = []

    def step() -> Tensor:
        calls.append(1)
        loss = traces.step()
        if ends == "badly":
            raise ArithmeticError
        return loss

    stack = find_stack(traces, "net")
    try:
        profile_stack(traces, stack, step, CPU) if of == "look" else measure_curvature(traces, step, CPU)
    except ArithmeticError:
        assert ends == "badly"
    assert calls, "the step has run"
    assert state(traces) == before
    assert traces.average is average
    assert "log" not in traces.__dict__
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in traces.modules())
    traces.step()
    assert traces.logged[0] == "loss", "logging works again"
    assert state(traces) != before, "what is compared does change in a step"


def test_a_stack_whose_layers_work_in_place_can_be_looked_at() -> None:
    """A pass over a layer's input that is a leaf would end in autograd's error, and three would triple what it adds."""

    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    tied = Tied()
    tied.net = nn.Sequential(Adds(), nn.ReLU(inplace=True), nn.Linear(W, W), nn.ReLU(inplace=True))
    tied.pre = nn.Identity()  # the first layer is given the batch itself
    before = tied.batch.clone()
    _, profile = profiled(tied)
    assert profile.after == {"post.weight", "post.bias"}
    assert torch.equal(tied.batch, before)


class Hidden(Tied):
    """As a compiled module that holds the layers: they run, but not through their own modules' ``forward``."""

    def step(self) -> Tensor:
        h = self.pre(self.batch)
        for layer in self.net:
            h = layer(h)
        return h.sum()


@pytest.mark.parametrize(
    ("tied", "step", "error", "told"),
    [
        (Hidden(), None, ConfigurationError, r"does not run 'net' \(a compiled module .*compile the layers instead"),
        (Tied(), lambda: None, ConfigurationError, "does not run 'net'"),
        (Tied(), "none", UnsupportedCombinationError, "returned no loss"),
        (Tied(), "number", UnsupportedCombinationError, "returned no loss"),
        (Tied(), "detached", UnsupportedCombinationError, "returned no loss that depends on the model"),
    ],
    ids=["hidden", "elsewhere", "none", "number", "detached"],
)
def test_a_step_that_shows_nothing_is_refused(tied: Tied, step: Any, error: type[Exception], told: str) -> None:
    def run_and(result: str) -> Any:
        loss = tied.step()["loss"]
        return {"none": None, "number": {"loss": None}, "detached": loss.detach()}[result]

    given = tied.step if step is None else (lambda: run_and(step)) if isinstance(step, str) else step
    with pytest.raises(error, match=told):
        profile_stack(tied, find_stack(tied, "net"), given, CPU)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_are_not_compiled_once_for_each() -> None:
    """Hooks hung on them, each another, would use up what a compiler allows; the profile is the first to run them."""
    graphs: list[int] = []

    def compiler(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    tied = Tied()
    tied.net = nn.Sequential(*(torch.compile(layer, backend=compiler) for layer in linears(10)))  # type: ignore[arg-type]
    profile = profiled(tied)[1]
    tied.step()["loss"].backward()
    assert len(profile.costs_s) == 10
    assert 0 < len(graphs) <= 3, "one for a leaf, one for the output of a layer"
