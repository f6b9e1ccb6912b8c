"""The partition of a model into stages, made by its profile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.strategies.pipelined_bp.partition import partition_stack
from tests.strategies.pipelined_bp.stacks import W
from tests.strategies.pipelined_bp.tied import Tied, profiled


def cut_at(tied: Tied, stages: Any, positions: int = 1, costs: list[float] | None = None) -> Any:
    stack, profile = profiled(tied)
    profile.costs_s = costs or [1.0] * len(stack)
    return partition_stack(tied, stack, profile, stages=stages, positions=positions)


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
