"""A look at a model with the first batch, of which nothing is kept, and the cut that is made by it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.partition import partition_stack
from lightning_eff.strategies.pipelined_bp.profiling import Profile, measure_curvature, profile_stack
from lightning_eff.strategies.pipelined_bp.stack import Stack, find_stack
from tests.strategies.pipelined_bp.test_stack import W, linears

CPU = torch.device("cpu")


class Tied(nn.Module):
    """``pre``, a stack, ``post``; with what leaves traces, and ``tie`` between two of its parts."""

    def __init__(self, tie: str = "", layers: int = 4) -> None:
        super().__init__()
        self.tie, self.pre, self.post = tie, nn.Linear(W, W), nn.Linear(W, W)
        self.net = nn.Sequential(*linears(layers))
        self.idle, self.frozen = nn.Linear(W, W), nn.Linear(W, W).requires_grad_(False)
        if tie == "around":
            self.post.weight = self.pre.weight
        if tie == "inside":
            self.net[2].weight = self.net[1].weight
        if tie == "pre":
            self.net[1].weight = self.pre.weight
        self.batch = torch.randn(3, W)

    def step(self) -> Any:
        h = self.pre(self.batch)
        out = self.post(self.net(h)) + (h if self.tie == "skip" else 0)
        return {"loss": out.square().mean()}


def looked(tied: Tied) -> tuple[Stack, Profile]:
    stack = find_stack(tied, "net")
    return stack, profile_stack(tied, stack, tied.step, CPU)


def test_a_look_sees_what_runs_where() -> None:
    stack, look = looked(Tied())
    assert look.before == {"pre.weight", "pre.bias"}
    assert look.after == {"post.weight", "post.bias"}
    assert "pre" in look.modules_before
    assert not look.modules_before & {"post", "net.0", "idle"}
    assert len(look.costs_s) == len(stack) == 4
    assert min(look.costs_s) > 0
    assert look.sizes == [[(torch.Size([3, W]), torch.float32, True)]] * 5
    assert [form.template[0] for form in look.forms] == [look.forms[0].template[0]] * 5


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
    _, look = looked(tied)
    assert look.after == {"post.weight", "post.bias"}
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
    """Hooks hung on them, each another, would use up what a compiler allows; the look is the first to run them."""
    graphs: list[int] = []

    def compiler(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    tied = Tied()
    tied.net = nn.Sequential(*(torch.compile(layer, backend=compiler) for layer in linears(10)))  # type: ignore[arg-type]
    look = looked(tied)[1]
    tied.step()["loss"].backward()
    assert len(look.costs_s) == 10
    assert 0 < len(graphs) <= 3, "one for a leaf, one for the output of a layer"


# ---------------------------------------------------------------------------------------------------- the cut


def cut_at(tied: Tied, stages: Any, positions: int = 1, costs: list[float] | None = None) -> Any:
    stack, look = looked(tied)
    look.costs_s = costs or [1.0] * len(stack)
    return partition_stack(tied, stack, look, stages=stages, positions=positions)


@pytest.mark.parametrize(
    ("stages", "starts"),
    [
        (1, (0,)),
        (2, (0, 2)),
        (4, (0, 1, 2, 3)),
        ("layers", (0, 1, 2, 3)),
        (["net.1", "net.3"], (0, 1, 3)),
        (["1", "net.3"], (0, 1, 3)),
        ([0, 2], (0, 2)),
    ],
)
def test_a_stack_is_cut_as_asked(stages: Any, starts: tuple[int, ...]) -> None:
    assert cut_at(Tied(), stages).starts == starts


def test_by_itself_it_is_cut_where_times_are_balanced() -> None:
    assert cut_at(Tied(), 2, costs=[5.0, 1.0, 1.0, 1.0]).starts == (0, 1)
    assert cut_at(Tied(), "layers", positions=2, costs=[5.0, 1.0, 1.0, 1.0]).ranks_start == (0, 1)


@pytest.mark.parametrize(
    ("stages", "positions", "told"),
    [
        (["net.5"], 1, r"a layer 'net\.5' that net does not have.* Did you mean 'net\.\d'\? Layers: net\.0, "),
        (["head"], 1, "a layer 'head' that net does not have"),
        (["net.3", "net.1"], 1, "in their order and each once"),
        (["net.1", "1"], 1, "in their order and each once"),
        (["net.0", "net.3"], 1, "has to name layers after the first"),
        (["net.2"], 3, "2 stages cannot be spread over 3 processes"),
        (5, 1, "parts=5 is not allowed for 4 items"),
    ],
)
def test_what_cannot_be_cut_so_is_refused(stages: Any, positions: int, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        cut_at(Tied(), stages, positions)


def test_tied_layers_stay_together_unless_asked_otherwise() -> None:
    assert cut_at(Tied("inside"), 2, costs=[1.0, 1.0, 1.0, 1.0]).starts in {(0, 1), (0, 3)}
    with pytest.raises(UnsupportedCombinationError, match=r"'net\.1\.weight' is used in the layers net\.1 to net\.2"):
        cut_at(Tied("inside"), ["net.2"])
    assert cut_at(Tied("inside"), ["net.3"]).owners["net.1.weight"] == 0
    # What the user's code uses before the stack runs with its first layer.
    with pytest.raises(UnsupportedCombinationError, match=r"'pre\.weight' is used in the layers net\.0 to net\.1"):
        cut_at(Tied("pre"), ["net.1"])
    assert cut_at(Tied("pre"), 2).starts == (0, 2)


@pytest.mark.parametrize(("tie", "named"), [("around", r"pre\.weight is used"), ("skip", r"pre\.(weight|bias), pre\.")])
@pytest.mark.parametrize("stages", [2, ["net.1"], "layers"])
def test_what_connects_both_ends_is_refused_by_name(tie: str, named: str, stages: Any) -> None:
    with pytest.raises(UnsupportedCombinationError, match=named):
        cut_at(Tied(tie), stages)
    assert cut_at(Tied(tie), 1).stages == 1


def test_every_parameter_and_buffer_has_an_owner() -> None:
    tied = Tied()
    tied.net = nn.Sequential(nn.Linear(W, W), nn.BatchNorm1d(W), nn.Linear(W, W), nn.BatchNorm1d(W))
    tied.pre, tied.post = nn.Sequential(nn.Linear(W, W), nn.BatchNorm1d(W)), nn.BatchNorm1d(W)
    tied.register_buffer("own", torch.zeros(1))
    found = cut_at(tied, ["net.2"], positions=2)
    assert found.owners == {
        **{f"pre.{n}": 0 for n in ("0.weight", "0.bias", "1.weight", "1.bias")},
        **{f"net.{i}.{n}": i // 2 for i in range(4) for n in ("weight", "bias")},
        **{f"{module}.{n}": 1 for module in ("post", "idle", "frozen") for n in ("weight", "bias")},
    }
    stage = {"pre.1": 0, "net.1": 0, "net.3": 1, "post": 1}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert found.buffer_owners == {"own": 1, **{f"{m}.{b}": s for m, s in stage.items() for b in buffers}}
    assert [list(found.stages_of(p)) for p in range(2)] == [[0], [1]]
    assert [list(found.layers_of(s, 4)) for s in range(2)] == [[0, 1], [2, 3]]
    assert [found.position_of(s) for s in range(2)] == [0, 1]
