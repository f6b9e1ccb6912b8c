"""Plain SGD of bfloat16 parameters in one pass over memory, with the bits that float32 shadows give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.kernels.bf16 import SGDRule, sgd_step
from lightning_eff.optim.bf16.kept import put_kept, take_kept


def update_at_once(optimizer: Optimizer, update: Any, seeds: Mapping[Tensor, int]) -> set[Tensor]:
    """Update those parameters of a ``torch.optim.SGD`` that can be; return them."""
    done: set[Tensor] = set()
    for group in optimizer.param_groups:
        numbers = {name: group[name] for name in SGDRule.__dataclass_fields__}
        plain = all(isinstance(number, int | float) for number in numbers.values())  # no tensors
        if plain and not group["fused"] and not group["differentiable"]:
            rule = SGDRule(**numbers)
            done.update(p for p in group["params"] if _update(optimizer, update, p, rule, seeds[p]))
    return done


def _update(optimizer: Optimizer, update: Any, p: Tensor, rule: SGDRule, seed: int) -> bool:
    """Update ``p``, or return False and change nothing."""
    if type(p) is not nn.Parameter or type(p.grad) is not Tensor or p.grad.layout is not torch.strided:
        return False
    if not p.dtype is p.grad.dtype is torch.bfloat16:
        return False
    states = optimizer.state
    kept, buffer = take_kept(states, p, update), None
    if rule.momentum:
        buffer = states[p].get("momentum_buffer")
    first = buffer is None
    if rule.momentum and buffer is None:
        buffer = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    done = sgd_step(rule, p, kept, p.grad, buffer, update=update, first=first, seed=seed)
    put_kept(states, p, update, kept)
    if done and buffer is not None:
        states[p]["momentum_buffer"] = buffer
    return done
