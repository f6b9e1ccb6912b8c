"""bfloat16 updates around torch's optimizers: against float32, against stagnation, and through a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError
from lightning_eff.optim import UPDATES, bf16_updates
from lightning_eff.optim.bf16.shadows import steps_by_itself
from tests.optim.optimizers import OPTIMIZERS, Make, every_update, gradients, train, weights, wide


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_split_is_float32_to_the_bit(name: str) -> None:
    plain, ours, grads = weights(torch.float32), weights(), gradients(20)
    train(OPTIMIZERS[name](plain), plain, grads)
    optimizer = bf16_updates(OPTIMIZERS[name](ours), update="split")
    train(optimizer, ours, grads)
    for p, q in zip(plain, ours, strict=True):
        assert q.dtype is torch.bfloat16
        assert torch.equal(wide(optimizer, q), p.detach())
        states = [value for key, value in optimizer.state[q].items() if key != "lo" and isinstance(value, Tensor)]
        assert all(value.dtype is not torch.bfloat16 for value in states)


class StatefulFromTheStart(torch.optim.SGD):
    """Of a third party: its constructor makes states, one of a number that bfloat16 cannot hold, one of weights."""

    def __init__(self, params: Any, lr: float = 0.1, start: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.defaults["start"] = start
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p].update(mean=torch.full_like(p, start), slow=p.detach().clone(), other=torch.ones_like(p))


class NeedsMore(StatefulFromTheStart):
    """Its constructor takes what it does not keep, so that it cannot be called again."""

    def __init__(self, params: Any, scale: float) -> None:
        super().__init__(params, start=0.3 * scale)


def test_states_of_the_constructor_begin_at_the_float32_value() -> None:
    params = weights()
    stepped = StatefulFromTheStart(params, start=0.3)
    stepped.state[params[1]]["mean"].mul_(2)  # no longer what the constructor made of it
    optimizer = bf16_updates(stepped)
    first, second = (optimizer.state[p] for p in params)
    assert torch.equal(first["mean"], torch.full((5, 7), 0.3))
    assert torch.equal(second["mean"], torch.full((9, 3), 0.6, dtype=torch.bfloat16).float())
    assert torch.equal(first["slow"], params[0].detach().float())
    assert {value.dtype for state in (first, second) for value in state.values()} == {torch.float32}
    starts = []
    for dtype in (torch.bfloat16, torch.float32):  # whether torch looks at a group's own value depends on its version
        made = [p.detach().to(dtype).requires_grad_() for p in weights()]
        groups = [{"params": made[:1], "initial_accumulator_value": 0.7}, {"params": made[1:]}]
        adagrad = torch.optim.Adagrad(groups, initial_accumulator_value=0.1)
        adagrad = bf16_updates(adagrad) if dtype is torch.bfloat16 else adagrad
        starts.append([adagrad.state[p]["sum"].unique().tolist() for p in made])
    assert starts[0] == starts[1]
    widened = bf16_updates(NeedsMore(params := weights(), 1.0))
    assert torch.equal(widened.state[params[0]]["mean"], torch.full((5, 7), 0.3, dtype=torch.bfloat16).float())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updating_in_parts_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's optimizers are run over a few parameters at a time; a subclass of the user's over all at once."""
    shapes, ends = ((5, 7), (9, 3), (2, 2), (40, 3), (1, 1)), []
    for part in (1, 40, 1 << 20):
        monkeypatch.setattr("lightning_eff.optim.bf16.shadows.PART", part)
        params = weights(shapes=shapes)
        optimizer = bf16_updates(OPTIMIZERS[name](params))
        train(optimizer, params, gradients(10, shapes))
        ends.append([wide(optimizer, p) for p in params])
    made = OPTIMIZERS[name](params := weights(shapes=shapes))
    users = type("Users", (type(made),), {"__module__": "users.code"})
    made.__class__ = users
    optimizer = bf16_updates(made)
    train(optimizer, params, gradients(10, shapes))
    ends.append([wide(optimizer, p) for p in params])
    assert not steps_by_itself(users)
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("update", ["sr", "kahan"])
def test_sr_and_kahan_stay_near_float32(name: str, update: Any) -> None:
    plain, ours, grads = weights(torch.float32), weights(), gradients(20)
    train(OPTIMIZERS[name](plain), plain, grads)
    train(bf16_updates(OPTIMIZERS[name](ours), update=update, seed=1), ours, grads)
    for p, q in zip(plain, ours, strict=True):
        assert not torch.equal(q.detach(), weights()[0 if q is ours[0] else 1].detach())
        # SR walks at random, about one unit in the last place (2^-7) a step at the worst.
        assert bool(((q.float() - p).abs() <= 0.02 + (0.05 if update == "kahan" else 0.2) * p.abs()).all())


CONSTANT: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, fused=True),
}


@pytest.mark.parametrize("make", CONSTANT.values(), ids=CONSTANT)
def test_small_updates_arrive(make: Make) -> None:
    """500 updates of +0.001 to 1.0: a plain bfloat16 weight stays 1.0."""
    ends = {}
    for update in (None, *UPDATES):
        (p,) = params = [nn.Parameter(torch.ones(64, dtype=torch.bfloat16))]
        optimizer = make(params) if update is None else bf16_updates(make(params), update=update, seed=3)  # type: ignore[arg-type]
        train(optimizer, params, [[-torch.ones(64)]] * 500)
        ends[update] = p.detach().float()
    assert torch.equal(ends[None], torch.ones(64))
    assert torch.allclose(ends["split"], torch.full((64,), 1.5), atol=2**-8)
    assert torch.allclose(ends["kahan"], torch.full((64,), 1.5), atol=2**-7)
    # One element has variance of at most 500 * 0.001 * 2^-7; the mean of 64 of them 1/64 of it.
    assert abs(float(ends["sr"].mean()) - 1.5) < 6 * (0.5 * 2**-7 / 64) ** 0.5
    assert ends["sr"].unique().numel() > 4


@every_update
def test_identity_ties_and_hooks_are_kept(update: Any) -> None:
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    tied = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    tied.weight = layer.weight
    storage, called = layer.weight.data_ptr(), []
    layer.weight.register_post_accumulate_grad_hook(lambda p: called.append(p is layer.weight))
    node = layer.weight.expand_as(layer.weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    original = torch.optim.AdamW(nn.Sequential(layer, tied).parameters(), lr=0.1)
    optimizer = bf16_updates(original, update=update)
    assert optimizer is original
    assert isinstance(optimizer, torch.optim.AdamW)
    for _ in range(3):
        tied(layer(torch.ones(2, 4, dtype=torch.bfloat16))).sum().backward()
        before = layer.weight._version
        optimizer.step()
        assert layer.weight._version > before
        optimizer.zero_grad()
    assert layer.weight.data_ptr() == storage
    assert layer.weight.dtype is torch.bfloat16
    assert layer.weight.grad is None
    assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], (layer.weight, layer.bias), strict=True)]
    assert set(optimizer.state) == {layer.weight, layer.bias}
    assert called == [True] * 3
    after = layer.weight.expand_as(layer.weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert after is node, "DDP hooks into this node: it must not be made anew"


@every_update
def test_closures_run_once_at_the_bfloat16_weights(update: Any) -> None:
    (p,) = params = weights(shapes=((3, 3),))
    optimizer, seen = bf16_updates(torch.optim.SGD(params, lr=0.1), update=update), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append((p.dtype, optimizer.param_groups[0]["params"][0] is p, torch.is_grad_enabled()))
        loss = p.square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)  # type: ignore[func-returns-value]
    assert second < first
    assert seen == [(torch.bfloat16, True, True)] * 2


def test_mixed_dtypes_missing_and_sparse_gradients() -> None:
    half, full = nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(4))
    idle = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    table = nn.Embedding(10, 4, sparse=True).to(torch.bfloat16)
    before = table.weight.detach().clone()
    optimizer = bf16_updates(torch.optim.SGD([half, full, idle, table.weight], lr=1e-3))
    for _ in range(10):
        (half.float() + full).sum().backward()
        table(torch.tensor([2, 5])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(wide(optimizer, half), torch.full((4,), 0.99))
    assert torch.allclose(full, torch.full((4,), 0.99))
    assert torch.equal(idle, torch.ones(4, dtype=torch.bfloat16))
    assert idle not in optimizer.state
    assert (wide(optimizer, table.weight) != before.float()).any(1).nonzero().flatten().tolist() == [2, 5]


@every_update
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("error")
def test_schedulers_made_before_and_after_steer_and_do_not_warn(update: Any, when: str) -> None:
    (p,) = params = [nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]
    optimizer: Optimizer = torch.optim.SGD(params, lr=1.0)
    if when == "after":
        optimizer = bf16_updates(optimizer, update=update)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    if when == "before":
        optimizer = bf16_updates(optimizer, update=update)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    assert torch.equal(p.detach().float(), torch.full((8,), 1 - 1.75))
    assert scheduler.optimizer is optimizer


@every_update
def test_groups_hooks_and_added_groups(update: Any) -> None:
    a, b, c = weights(shapes=((4,), (4,), (4,)))
    optimizer = bf16_updates(torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.0}], lr=1.0), update=update)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0]))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0]))
    optimizer.add_param_group({"params": [c], "lr": 2.0})
    starts = [p.detach().clone() for p in (a, b, c)]
    for p in (a, b, c):
        p.grad = torch.full_like(p, 4.0)
    optimizer.step()
    moved = [(start.float() - p.detach().float()) for start, p in zip(starts, (a, b, c), strict=True)]
    for amount, expected in zip(moved, (4.0, 0.0, 8.0), strict=True):
        assert torch.allclose(amount, torch.full((4,), expected), atol=0.07)
    assert torch.equal(moved[1], torch.zeros(4))
    assert [p is a for p in seen] == [True, True]


def test_sr_depends_on_seed_step_and_place_alone() -> None:
    def run(seed: int) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(256, dtype=torch.bfloat16)) for _ in range(2)]
        train(bf16_updates(torch.optim.SGD(params, lr=1e-3), update="sr", seed=seed), params, [[-torch.ones(256)] * 2])
        return [p.detach() for p in params]

    first, second = run(1)
    torch.rand(3)
    assert torch.equal(first, run(1)[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, run(2)[0])


def test_the_seed_default_is_the_runs(seed: int) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    optimizer = bf16_updates(torch.optim.SGD(weights(), lr=1.0), update="sr")
    assert optimizer.state_dict()["bf16"]["seed"] == 11
    assert torch.equal(state, torch.get_rng_state())


def test_several_closures_are_refused_before_anything_changed() -> None:
    with pytest.raises(UnsupportedCombinationError, match="LBFGS evaluates its closure several times"):
        bf16_updates(torch.optim.LBFGS(weights()))

    class Sharpness(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            closure()
            self.param_groups[0]["params"][0].data.add_(1.0)
            return closure()

    (p,) = params = weights(shapes=((3,),))
    start = p.detach().clone()
    optimizer = bf16_updates(Sharpness(params, lr=0.1))

    def closure() -> Tensor:
        p.grad = torch.ones_like(p)
        return p.sum()

    with pytest.raises(UnsupportedCombinationError, match="Sharpness evaluates its closure several times"):
        optimizer.step(closure)
    assert torch.equal(p.detach(), start)
    assert optimizer.param_groups[0]["params"][0] is p


def test_a_step_that_fails_leaves_everything_in_its_place() -> None:
    params, grads = weights(), gradients(3)
    optimizer = bf16_updates(torch.optim.AdamW(params, lr=1e-3))
    train(optimizer, params, grads[:2])
    starts, los = [p.detach().clone() for p in params], [optimizer.state[p]["lo"].clone() for p in params]
    optimizer.param_groups[0]["betas"] = ("broken", 0.9)
    with pytest.raises(TypeError):
        train(optimizer, params, grads[2:])
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True))
    assert all(torch.equal(p, start) for p, start in zip(params, starts, strict=True))
    assert all(torch.equal(optimizer.state[p]["lo"], lo) for p, lo in zip(params, los, strict=True))


def test_arguments_are_checked() -> None:
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"update='splt' is not allowed.* Did you mean 'split'\?"):
        bf16_updates(optimizer, update="splt")  # type: ignore[arg-type]
    assert bf16_updates(bf16_updates(optimizer, update="sr"), update="sr") is optimizer
    with pytest.raises(ConfigurationError, match="already has update='sr'; 'split' was given"):
        bf16_updates(optimizer, update="split")
    replaced = torch.optim.SGD(weights(), lr=0.1)
    replaced.step = lambda closure=None: None  # type: ignore[method-assign]
    with pytest.raises(UnsupportedCombinationError, match="has been replaced"):
        bf16_updates(replaced)


def test_no_float32_copy_is_kept_between_steps() -> None:
    params = weights(shapes=((64, 64),))
    for update in UPDATES:
        optimizer = bf16_updates(torch.optim.SGD(params, lr=0.1), update=update)  # type: ignore[arg-type]
        train(optimizer, params, gradients(2, ((64, 64),)))
        kept = [v for v in optimizer.state[params[0]].values() if isinstance(v, Tensor)]
        assert sum(v.numel() * v.element_size() for v in kept) == (0 if update == "sr" else 2 * 64 * 64)
