"""What an update keeps for a parameter besides its bfloat16 weight, and both of them as float32 and back.

update   float32 weight          write-back of the float32 result x
sr       w                       w' = bf16(x), stochastically rounded
kahan    w                       d = (x - w) + c,  w' = bf16(w + d),  c' = d - (w' - w)
split    hi 2^16 + lo (bits)     hi', lo' = the halves of x
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_eff.kernels.bf16 import join_fp32, write_kahan, write_split, write_stochastic

KEPT: dict[str, tuple[str, torch.dtype]] = {"kahan": ("compensation", torch.bfloat16), "split": ("lo", torch.int16)}
"""update -> key in the optimizer's state of a parameter, and the dtype of what is kept there."""
States = Any
"""``optimizer.state``: parameter -> what is kept for it."""


def take_kept(states: States, p: Tensor, update: str) -> Tensor:
    """Return what the update keeps for ``p``, taken out of the state: optimizers start where that is empty."""
    if update not in KEPT:
        return p
    key, dtype = KEPT[update]
    kept: Tensor | None = states[p].pop(key, None) if p in states else None
    return torch.zeros(p.shape, dtype=dtype, device=p.device) if kept is None else kept.to(p.device)


def put_kept(states: States, p: Tensor, update: str, kept: Tensor) -> None:
    """Put back what :func:`take_kept` took."""
    if update in KEPT:
        states[p][KEPT[update][0]] = kept


def as_float32(p: Tensor, kept: Tensor, out: Tensor, update: str) -> Tensor:
    """Write the weight to ``out`` as float32 and return it: with the lower half that is kept, if one is."""
    return join_fp32(p, kept, out=out) if update == "split" else out.copy_(p.detach())


def write_back(p: Tensor, value: Tensor, kept: Tensor, update: str, seed: int) -> None:
    """Bring the float32 result into the bfloat16 parameter and into what is kept."""
    if update == "sr":
        write_stochastic(p, value, seed)
    elif update == "kahan":
        write_kahan(p, kept, value, is_sum=True)
    else:
        write_split(p, kept, value)
