"""Gradient pruning: what the layers' products see, how many zeros, resume, refusals, both namespaces."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.callbacks import GradientPruning
from lightning_eff.errors import ConfigurationError, NoEffectWarning, UnsupportedCombinationError
from tests.callbacks.gradients.models import ROOTS, Lognormal, Net, images, parameters, trainer, vectors
from tests.harness import run_ranks

KEY = "eff/gradient_pruning/"


class Achieved(Callback):
    def __init__(self) -> None:
        self.sparsity: list[float] = []
        self.sigma: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if KEY + "sparsity" in trainer.callback_metrics:
            self.sparsity.append(float(trainer.callback_metrics[KEY + "sparsity"]))
            self.sigma.append(float(trainer.callback_metrics[KEY + "sigma_log2"]))


@pytest.mark.parametrize("sigma", [0.7, 2.0, 3.0])
@pytest.mark.parametrize(("sparsity", "zeros"), [(0.85, 0.0), (0.5, 0.0), (0.9, 0.6)])
def test_achieved_sparsity_is_within_a_point(
    sigma: float, sparsity: float, zeros: float, seed: int, tmp_path: Path
) -> None:
    seen, rule = Achieved(), GradientPruning(sparsity, warmup_steps=0, refit_every_n_steps=3)
    trainer(tmp_path, rule, seen).fit(Lognormal(sigma, zeros), vectors(6))
    assert len(seen.sparsity) >= 5
    assert max(abs(found - sparsity) for found in seen.sparsity) < 0.01
    assert seen.sigma[-1] == pytest.approx(sigma / math.log(2), rel=0.02)


def test_both_products_see_the_pruned_gradient() -> None:
    layer, x, g = nn.Linear(40, 50), torch.randn(30, 40, requires_grad=True), torch.randn(30, 50)
    rule = attached(layer, GradientPruning(0.8, warmup_steps=0))
    (layer(x) * g).sum().backward()
    assert layer.bias.grad is not None
    assert layer.weight.grad is not None
    state = rule.state_dict()["ranks"][0][""]
    tau = torch.tensor(state["threshold"])
    pruned = torch.linalg.lstsq(x.detach().double().t(), layer.weight.grad.double().t()).solution  # 30 rows, 40 columns
    assert pruned.shape == g.shape
    assert x.grad is not None
    assert torch.allclose(x.grad, pruned.float() @ layer.weight, atol=1e-3)
    assert torch.allclose(layer.bias.grad, pruned.float().sum(0), atol=1e-3)
    small = g.abs() < tau
    assert torch.allclose(pruned[~small].float(), g[~small], atol=1e-3)
    levels = pruned[small].abs() / tau
    assert bool(((levels < 1e-3) | ((levels - 1).abs() < 1e-3)).all())
    assert state["calls"] == 1


def attached(module: nn.Module, rule: Any) -> Any:
    """Put the callback's hooks onto a module without a Trainer."""
    rule.on_train_start(None, module)
    return rule


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_prunes_once(reentrant: bool) -> None:
    body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 32))
    x, g = torch.randn(20, 32, requires_grad=True), torch.randn(20, 32)

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(3)
        rule = attached(body, GradientPruning(0.7, warmup_steps=0))
        y = checkpoint(body, x, use_reentrant=reentrant) if recompute else body(x)
        body.zero_grad()
        (y * g).sum().backward()
        assert [layer["calls"] for layer in rule.state_dict()["ranks"][0].values()] == [1, 1]
        rule._hooks.detach()
        return [p.grad.clone() for p in body.parameters() if p.grad is not None]

    plain, recomputed = gradients(recompute=False), gradients(recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_training_is_unbiased(seed: int) -> None:
    """The mean weight gradient over many prunings is the unpruned one, within the scatter of the mean."""
    layer, x, g = nn.Linear(6, 8), torch.randn(64, 6), torch.randn(64, 8).exp() * torch.randn(64, 8).sign()
    (layer(x) * g).sum().backward()
    assert layer.weight.grad is not None
    exact = layer.weight.grad.clone()
    attached(layer, GradientPruning(0.85, warmup_steps=0))
    draws = []
    for _ in range(2000):
        layer.zero_grad()
        (layer(x) * g).sum().backward()
        draws.append(layer.weight.grad.clone())
    samples = torch.stack(draws).double()
    z = (samples.mean(0) - exact) / (samples.std(0) / len(draws) ** 0.5)
    assert float(z.abs().max()) < 6.5  # 48 comparisons, two seeds: false alarm below 1e-8 for a normal mean


def test_feedback_reaches_the_target_on_gradients_that_are_not_lognormal(tmp_path: Path) -> None:
    class Uniform(Lognormal):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            y = self.layer(batch[0])
            return (y * (torch.rand_like(y) - 0.5)).sum()

    ends = []
    for feedback in (False, True):
        seen = Achieved()
        rule = GradientPruning(0.9, warmup_steps=0, feedback=feedback)
        trainer(tmp_path, rule, seen).fit(Uniform(), vectors(40))
        ends.append(abs(seen.sparsity[-1] - 0.9))
    assert ends[0] > 0.01, "uniform numbers are no lognormal ones: the closed form misses"
    assert ends[1] < 0.005


@pytest.mark.parametrize("seeds", [(7,), pytest.param((1, 2, 3, 4, 5), marks=pytest.mark.long)], ids=["one", "five"])
def test_a_classifier_still_learns_with_few_gradients(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    """Digits, 1347 to train and 450 to test, 15 epochs; the figures of the card (``pytest -s`` prints them)."""
    digits = sklearn.datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(1))
    x, y = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(digits.target)[order]

    def accuracy(sparsity: float, seed: int) -> float:
        torch.manual_seed(seed)
        model = Net()
        loader = DataLoader(TensorDataset(x[:1347], y[:1347]), batch_size=32, shuffle=True)
        rule = GradientPruning(sparsity, warmup_steps=20, refit_every_n_steps=42)
        trainer(tmp_path, rule, max_epochs=15).fit(model, loader)
        return float((model(x[1347:]).argmax(1) == y[1347:]).float().mean())

    found = {sparsity: [accuracy(sparsity, seed) for seed in seeds] for sparsity in (0.0, 0.5, 0.85)}
    for sparsity, values in found.items():
        print(f"sparsity {sparsity}: accuracy", *(f"{value:.3f}" for value in values))
    assert min(found[0.0]) > 0.88
    assert min(found[0.5]) > 0.88
    assert min(found[0.85]) > 0.85


def test_off_is_off(tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(5)
        model = Net()
        trainer(tmp_path, *callbacks).fit(model, images())
        return parameters(model), torch.get_rng_state()

    plain, state = run()
    for rule in (GradientPruning(0.0), GradientPruning(0.85, warmup_steps=1000)):
        if rule.sparsity:
            with pytest.warns(NoEffectWarning, match="pruned nothing"):
                found, after = run(rule)
        else:
            found, after = run(rule)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert torch.equal(state, after)
    pruned, after = run(GradientPruning(0.85, warmup_steps=2))
    assert torch.equal(state, after), "the user's random stream is left alone"
    assert not all(torch.equal(a, b) for a, b in zip(plain, pruned, strict=True))


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact(tmp_path: Path, feedback: bool, accumulate: int) -> None:
    path = tmp_path / "cut.ckpt"

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    def rule() -> GradientPruning:
        return GradientPruning(0.8, warmup_steps=1, refit_every_n_steps=4, feedback=feedback)

    def run(*extra: Callback, ckpt: Path | None = None) -> list[Tensor]:
        torch.manual_seed(5)
        model = Net()
        options = dict(max_epochs=3, accumulate_grad_batches=accumulate)
        trainer(tmp_path, rule(), *extra, **options).fit(model, images(), ckpt_path=ckpt)
        return parameters(model)

    whole = run(Save())
    resumed = run(ckpt=path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    state = torch.load(path, weights_only=True)
    assert set(state["callbacks"]["GradientPruning"]) == set(GradientPruning.info.state_keys)
    del state["callbacks"]["GradientPruning"]
    torch.save(state, path)
    wrong = run(ckpt=path)
    assert not all(torch.equal(a, b) for a, b in zip(whole, wrong, strict=True)), "the state is needed"


@pytest.mark.parametrize("root", ROOTS)
def test_it_trains_in_both_namespaces(root: str, tmp_path: Path) -> None:
    pl, rule = importlib.import_module(root), importlib.import_module(ROOTS[root]).GradientPruning
    model = type("Model", (pl.LightningModule,), {k: v for k, v in vars(Net).items() if callable(v)})
    net = _build(model)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    fit = pl.Trainer(
        **quiet, max_epochs=1, log_every_n_steps=1, callbacks=[rule(0.8, warmup_steps=0)], accelerator="cpu"
    )
    fit.fit(net, images())
    assert 0.7 < float(fit.callback_metrics[KEY + "sparsity"]) < 0.9
    assert not any(layer._forward_hooks for layer in net.modules())


def _build(model: type[Any]) -> Any:
    """An instance of Net's body on another LightningModule."""
    net = model.__new__(model)
    model.__mro__[1].__init__(net)
    donor = Net()
    for name, child in donor.named_children():
        net.add_module(name, child)
    return net


@pytest.mark.parametrize("precision", ["bf16-mixed", "luq4"])
def test_it_goes_with_other_precisions(precision: Any, tmp_path: Path) -> None:
    seen = Achieved()
    model = Net()
    trainer(tmp_path, GradientPruning(0.8, warmup_steps=0), seen, precision=precision).fit(model, images())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert 0.7 < seen.sparsity[-1] < 0.9


def test_a_non_finite_gradient_stays_visible() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(8, 4)
    rule = attached(layer, GradientPruning(0.8, warmup_steps=0, refit_every_n_steps=1))
    layer(x).square().sum().backward()
    threshold = rule.state_dict()["ranks"][0][""]["threshold"]
    layer.zero_grad()
    rule._step = 1
    (layer(x).sum() * math.nan).backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.isnan().any())
    assert rule.state_dict()["ranks"][0][""]["threshold"] == threshold, "damage does not become a threshold"


def test_gradients_of_gradients_are_refused() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(8, 4, requires_grad=True)
    attached(layer, GradientPruning(0.8, warmup_steps=0))
    y = (layer(x) * x).square().sum()
    with pytest.raises(UnsupportedCombinationError, match="differentiated again"):
        torch.autograd.grad(y, x, create_graph=True)


def test_layers_are_chosen_by_name() -> None:
    def names(*args: Any, **options: Any) -> set[str]:
        return set(attached(Net(), GradientPruning(*args, **options)).state_dict()["ranks"][0])

    assert names() == {"conv.0", "conv.2", "head.1", "twice", "last"}
    assert names(layers=["conv.*", "last"]) == {"conv.0", "conv.2", "last"}
    assert names(exclude=["last", "conv.0"]) == {"conv.2", "head.1", "twice"}
    with pytest.raises(ConfigurationError, match=r"pattern 'lats' matches none.*Did you mean 'last'"):
        names(layers=["lats"])
    with pytest.raises(ConfigurationError, match="pattern 'nothing'"):
        names(exclude=["nothing"])
    with pytest.raises(ConfigurationError, match="leaves no layer"):
        names(layers=["conv.*"], exclude=["conv.?"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(sparsity=1.0), "sparsity=1.0"),
        (dict(sparsity=-0.1), "sparsity=-0.1"),
        (dict(sparsity=math.nan), "sparsity=nan"),
        (dict(sparsity="0.5"), "sparsity='0.5'"),
        (dict(layers="conv"), "layers='conv'"),
        (dict(exclude=[3]), r"exclude=\[3\]"),
        (dict(warmup_steps=-1), "warmup_steps=-1"),
        (dict(warmup_steps=0.5), "warmup_steps=0.5"),
        (dict(refit_every_n_steps=0), "refit_every_n_steps=0"),
    ],
)
def test_bad_arguments_are_named(options: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        GradientPruning(**options)


def test_the_loss_scaler_is_refused(tmp_path: Path) -> None:
    fit = trainer(tmp_path, GradientPruning(0.5))
    fit.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(UnsupportedCombinationError, match="precision='16-mixed'.*loss scale changes"):
        fit.fit(Net(), images())


def test_hooks_are_gone_after_an_exception(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, GradientPruning(0.5)).fit(model, images())
    assert not any(layer._forward_hooks for layer in model.modules())


def _two_ranks(rank: int, world_size: int, path: str) -> tuple[list[list[float]], dict[str, Any], int]:
    torch.manual_seed(5)
    model, rule = Net(), GradientPruning(0.8, warmup_steps=0)
    fit = trainer(Path(path), rule, devices=world_size, strategy="ddp")
    fit.fit(model, images())
    seed = rule._next_seed("last", rule._layers["last"])
    return [p.detach().flatten().tolist() for p in model.parameters()], rule.state_dict(), seed


def test_two_ranks_stay_equal_and_both_are_in_the_checkpoint(tmp_path: Path) -> None:
    (first, state, seed), (second, other, other_seed) = run_ranks(_two_ranks, 2, str(tmp_path))
    assert first == second
    assert state == other
    assert len(state["ranks"]) == 2
    assert state["ranks"][0] != state["ranks"][1], "each rank has its own gradients"
    assert seed != other_seed, "ranks prune independently, so that their noise averages out"
