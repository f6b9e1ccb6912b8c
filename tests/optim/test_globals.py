"""A step of an optimizer on bfloat16 parameters follows no global setting: same bits, in Lightning's contexts too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_eff.optim import UPDATES, bf16_updates
from tests.kernels.worlds import AUTOCAST, DEVICE, DTYPES, GRADIENTS, MEMORY, PRODUCTS, THREADS, same_everywhere

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


def steps_of(make: Callable[[Any], torch.optim.Optimizer], update: Any) -> Callable[[], Any]:
    """Three steps, of which the second goes through a saved state."""
    starts, grads = torch.randn(2, 300, 130), torch.randn(3, 2, 300, 130)

    def compute() -> Any:
        params = [nn.Parameter(start.to(torch.bfloat16)) for start in starts]
        optimizer = bf16_updates(make(params), update=update, seed=5)
        for step, pair in enumerate(grads):
            for p, grad in zip(params, pair, strict=True):
                p.grad = grad.to(torch.bfloat16)
            if step == 1:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
        kept = [
            {key: value for key, value in optimizer.state[p].items() if key in ("lo", "compensation", "sum", "exp_avg")}
            for p in params
        ]
        return [p.detach() for p in params], kept

    return compute


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_follows_no_global(name: str, update: str) -> None:
    worlds = (DTYPES, PRODUCTS, AUTOCAST, MEMORY, THREADS, {key: GRADIENTS[key] for key in ("no grad", "grad")})
    if name in ("sgd", "momentum", "foreach"):  # the others count their steps in a tensor on the default device
        worlds += (DEVICE,)
    assert same_everywhere(steps_of(OPTIMIZERS[name], update), *worlds) == []
