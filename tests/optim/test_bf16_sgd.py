"""SGD in one pass over memory: the same bits as on float32 shadows, and shadows wherever one pass will not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eff.kernels import build
from lightning_eff.optim import UPDATES, bf16_updates
from lightning_eff.optim.bf16 import sgd, wrapper

SHAPES = ((70, 50), (9,), (1, 1), (3000, 11))

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "maximize": {"momentum": 0.5, "dampening": 0.2, "maximize": True},
    "foreach": {"momentum": 0.9, "foreach": True},
}

every_update = pytest.mark.parametrize("update", UPDATES)


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if build.library() is None:
        pytest.skip("no compiled kernels here")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether one pass did it, for each parameter and step that it was offered."""
    done: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> bool:
        done.append(original(*args, **kwargs))
        return done[-1]

    original = sgd.sgd_step
    monkeypatch.setattr(sgd, "sgd_step", watched)
    return done


def run(update: Any, options: dict[str, Any], *, steps: int = 4, at_once: bool = True) -> tuple[list[Tensor], Any]:
    """Weights after a few steps, and the optimizer's state as a list."""
    generator = torch.Generator().manual_seed(5)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(torch.bfloat16)) for shape in SHAPES]
    optimizer = bf16_updates(torch.optim.SGD(params, lr=0.01, **options), update=update, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        if not at_once:
            patch.setattr(wrapper, "update_at_once", lambda *_: set())
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(torch.bfloat16)
            optimizer.step()
    return [p.detach() for p in params], optimizer.state_dict()["state"]


@every_update
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_pass_has_the_bits_of_shadows(update: Any, options: dict[str, Any], passes: list[bool]) -> None:
    ours, state = run(update, options)
    assert passes == [True] * 4 * len(SHAPES)
    shadowed, expected = run(update, options, at_once=False)
    assert len(passes) == 4 * len(SHAPES), "the second run was offered none"
    assert all(torch.equal(a, b) for a, b in zip(ours, shadowed, strict=True))
    assert state.keys() == expected.keys()
    for place, values in expected.items():
        assert state[place].keys() == values.keys()
        assert all(torch.equal(state[place][key], value) for key, value in values.items() if value is not None)


@every_update
def test_the_same_bits_without_compiled_kernels(update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = run(update, OPTIONS["nesterov"])
    monkeypatch.setattr("lightning_eff.kernels.operands.library", lambda: None)
    plain, _ = run(update, OPTIONS["nesterov"])
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@every_update
def test_what_one_pass_will_not_do_is_left_to_torch(update: Any, passes: list[bool]) -> None:
    """Strided weights, float32 weights, sparse and missing gradients, a learning rate that is a tensor: together."""
    half = torch.bfloat16
    weight, table, idle = (nn.Parameter(torch.ones(4, 6, dtype=half)) for _ in range(3))
    strided, full = nn.Parameter(torch.ones(6, 4, dtype=half).t()), nn.Parameter(torch.ones(3))
    slow = nn.Parameter(torch.ones(5, dtype=half))
    groups = [{"params": [weight, strided, table, full, idle]}, {"params": [slow], "lr": torch.tensor(0.5)}]
    optimizer = bf16_updates(torch.optim.SGD(groups, lr=0.5, momentum=0.9), update=update)
    for _ in range(2):
        for p in (weight, strided, full, slow):
            p.grad = torch.ones_like(p)
        table.grad = torch.ones(4, 6, dtype=half).to_sparse()
        optimizer.step()
    assert passes == [True, False] * 2, "offered: the two dense bfloat16 ones"
    for p in (weight, strided, full, slow):
        assert torch.allclose(p.float(), torch.full(p.shape, 1 - 0.5 - 0.95), atol=2**-7)
    assert torch.allclose(table.float(), weight.float(), atol=2**-7)
    assert torch.equal(idle, torch.ones_like(idle))
    assert idle not in optimizer.state


@every_update
def test_torchs_fused_kernel_is_used_when_it_is_asked_for(update: Any, passes: list[bool]) -> None:
    run(update, {"momentum": 0.9, "fused": True}, steps=1)
    assert passes == []
