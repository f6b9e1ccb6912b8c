"""The state of bfloat16 updates through files, copies and other updates."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.optim import bf16_updates
from lightning_eff.optim.bf16.wrapper import ShadowedOptimizer
from tests.optim.optimizers import OPTIMIZERS, every_update, gradients, train, weights


def resume(name: str, update: Any, *, cut: int, drop: str | None = None) -> tuple[list[Tensor], list[Tensor], Any]:
    """Weights of the whole run, and of one that went through a file after ``cut`` steps."""
    make, grads = OPTIMIZERS[name], gradients(12)
    whole, first, second = weights(), weights(), weights()
    train(bf16_updates(make(whole), update=update, seed=7), whole, grads)
    optimizer = bf16_updates(make(first), update=update, seed=7)
    train(optimizer, first, grads[:cut])
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in first], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for state in saved["optimizer"]["state"].values():
        state.pop(drop, None)
    if drop in saved["optimizer"]["bf16"]:
        saved["optimizer"]["bf16"][drop] = 0
    for p, value in zip(second, saved["weights"], strict=True):
        p.data.copy_(value)
    continued = bf16_updates(make(second), update=update, seed=8)
    continued.load_state_dict(saved["optimizer"])
    train(continued, second, grads[cut:])
    return [p.detach() for p in whole], [p.detach() for p in second], saved["optimizer"]


@every_update
@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adamw", "adamw-fused", "adagrad", "nadam"])
@pytest.mark.parametrize("cut", [1, 5])
def test_a_run_continues_from_a_file_to_the_same_bits(name: str, update: Any, cut: int) -> None:
    whole, continued, saved = resume(name, update, cut=cut)
    assert all(torch.equal(p, q) for p, q in zip(whole, continued, strict=True))
    streams = {"streams": [0, 1]} if update == "sr" else {}
    assert saved["bf16"] == {"update": update, "seed": 7, "steps": cut, **streams}


@pytest.mark.parametrize(
    ("update", "drop"), [("split", "lo"), ("kahan", "compensation"), ("sr", "seed"), ("sr", "steps")]
)
def test_each_part_of_the_state_is_needed(update: Any, drop: str) -> None:
    """Negative control: with one key lost the comparison above sees a difference."""
    whole, continued, _ = resume("sgd", update, cut=5, drop=drop)
    assert not all(torch.equal(p, q) for p, q in zip(whole, continued, strict=True))


@every_update
def test_plain_states_load_and_ours_load_plainly(update: Any) -> None:
    plain, ours, grads = weights(), weights(), gradients(6)
    before = torch.optim.AdamW(plain, lr=1e-3)
    train(before, plain, grads[:3])
    after = bf16_updates(torch.optim.AdamW(ours, lr=1e-3), update=update)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert all(state["exp_avg"].dtype is torch.float32 for state in after.state.values())
    assert all(state["step"] == 3 for state in after.state.values())
    train(after, ours, grads[3:])
    before.load_state_dict(copy.deepcopy(after.state_dict()))
    train(before, plain, grads)


def test_another_update_takes_over_as_far_as_it_goes() -> None:
    ours, grads = weights(), gradients(3)
    split = bf16_updates(torch.optim.AdamW(ours, lr=1e-3), update="split")
    train(split, ours, grads)
    kahan = bf16_updates(torch.optim.AdamW(ours, lr=1e-3), update="kahan")
    kahan.load_state_dict(copy.deepcopy(split.state_dict()))
    assert all("lo" not in state and state["step"] == 3 for state in kahan.state.values())
    train(kahan, ours, grads)
    assert all(state["compensation"].dtype is torch.bfloat16 for state in kahan.state.values())


@every_update
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_train_on(update: Any, duplicate: Any) -> None:
    params, grads = weights(), gradients(8)
    optimizer = bf16_updates(torch.optim.AdamW(params, lr=1e-3), update=update, seed=4)
    train(optimizer, params, grads[:4])
    other = duplicate(optimizer)
    train(optimizer, params, grads[4:])
    copied = other.param_groups[0]["params"]
    train(other, copied, grads[4:])
    assert isinstance(other, ShadowedOptimizer)
    assert all(torch.equal(p, q) for p, q in zip(params, copied, strict=True))
