"""A small character model: where bfloat16 weights lose small updates, and what the three cures give back.

``python -m pytest tests/optim/test_bf16_quality.py -m long -s`` prints the losses of the method cards.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_eff.optim import UPDATES, bf16_updates

CONTEXT, STEPS, TAIL = 16, 400, 50


def text() -> torch.Tensor:
    """The source of torch.optim as numbers below 128."""
    files = sorted(Path(torch.optim.__file__).parent.glob("*.py"))
    return torch.tensor(list("".join(file.read_text(encoding="utf-8") for file in files).encode("ascii", "ignore")))


def final_loss(kind: str, lr: float, data: torch.Tensor) -> float:
    """Mean training loss of the last steps with AdamW; the data and the first weights are the same for every kind."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Embedding(128, 64), nn.Flatten(), nn.Linear(CONTEXT * 64, 128), nn.ReLU()),
        *(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)),
    )
    net = net if kind == "float32" else net.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    if kind in UPDATES:
        bf16_updates(optimizer, update=kind)  # type: ignore[arg-type]
    order, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        places = torch.randint(0, len(data) - CONTEXT - 1, (64,), generator=order)
        batch = data[places[:, None] + torch.arange(CONTEXT + 1)]
        loss = nn.functional.cross_entropy(net(batch[:, :CONTEXT]).float(), batch[:, CONTEXT])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-TAIL:]) / TAIL


@pytest.mark.long
@pytest.mark.parametrize("lr", [1e-4, 1e-5])
def test_the_updates_reach_float32_where_bf16_true_does_not(lr: float) -> None:
    data = text()
    losses = {kind: final_loss(kind, lr, data) for kind in ("float32", "bf16-true", *UPDATES)}
    print(f"\nlr {lr}:", ", ".join(f"{kind} {loss:.4f}" for kind, loss in losses.items()))
    assert losses["bf16-true"] > losses["float32"] + 0.05
    for update in UPDATES:
        assert abs(losses[update] - losses["float32"]) < 0.01
