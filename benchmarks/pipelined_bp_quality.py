"""Accuracy of ``strategy="pipelined_bp"`` with one stage per layer, beside SGD without delays.

Everything runs in one process, which computes the delays of the pipeline exactly. Hyperparameters are those of a batch
of 32, scaled to the micro-batch (``scale_hyperparameters``); plain SGD has the same micro-batch and the same ones, so
that what is between the two is the delay. ``D(1-m)`` is the delay of the first stage in units of the momentum's memory:
it grows with the micro-batch, from the paper's setting (micro-batches of one) to the reference batch, where the delay
is too long for weight prediction; ``adaptive braking``, an optimizer of this file, stands beside it there.

``lr / limit`` says why: it is the learning rate over the largest one that is stable in the first stage, which has the
longest delay, by the linear analysis of ``lightning_eff.functional`` and for the curvature that training
without delays has led to in that stage's weights. Well below 1 the delay does not show, well above 1 it does.

Two deep networks of narrow layers, with GroupNorm, on scikit-learn's digits: 16 residual linear layers (a delay of 30
updates) and 12 residual convolutions (22). Small tasks, few seeds: a difference below half a point is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._measure import threads
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._stats import spread
from benchmarks.tasks.compare import quiet
from benchmarks.tasks.data import DigitsData
from lightning_eff.errors import EffWarning, NonFiniteGradientError
from lightning_eff.functional.staleness.curvature import top_curvature
from lightning_eff.functional.staleness.mitigation import scale_hyperparameters
from lightning_eff.functional.staleness.schedule import stage_delay
from lightning_eff.functional.staleness.stability import MitigationName, max_stable_lr
from lightning_eff.strategies import PipelinedBPStrategy

REFERENCE_BATCH, REFERENCE_MOMENTUM = 32, 0.9
REFERENCE_LR = 0.01
"""Of .003, .01, .03 and .1 the one, or next to the one, with which SGD without delays names the most digits."""
SGD, BRAKING = "sgd", "adaptive braking"
FEW = ("none", "lwp+sc")
ALL = ("none", "sc", "lwp", "lwp+sc", "lwp_w", "stash", "spectrain")
VARIANTS = {1: FEW, 2: FEW, 4: ALL, 8: (*FEW, BRAKING), 16: (*FEW, BRAKING), 32: (*ALL, BRAKING)}
"""Micro-batch -> what is compared with SGD. Runs at 1 and 2 take long; ``--variants`` has all of them there too."""
TARGETS = {"lwp+sc": 1.0}
"""Variant -> percentage points below SGD, where ``lr / limit`` is below 1: the paper's claim is that accuracy stays."""
LOOKS = 10
"""Times a network is looked at in its last epoch: with a constant learning rate it never comes to rest."""
MEAN, DEVIATION = 0.3057, 0.3760
"""Of the pixels that are trained on."""


# ------------------------------------------------------------------------------------------------------- networks


class _Layer(nn.Sequential):
    """One layer of the pipeline; a plain nn.Sequential would be taken for the layers in it."""


class _Residual(nn.Sequential):
    """One layer of the pipeline, x + scale f(x).

    Args:
        f: what it consists of.
        scale: of what is added.
    """

    def __init__(self, *f: nn.Module, scale: float = 1.0) -> None:
        super().__init__(*f)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, super().forward(x), alpha=self.scale)


def deep_mlp(layers: int = 16, width: int = 64) -> nn.Sequential:
    """Return residual layers of GroupNorm, ReLU and a linear map between a first and a last linear layer.

    What a layer adds is divided by sqrt(layers), so that the curvature does not grow with the depth.
    """
    norms = [nn.Sequential(nn.GroupNorm(8, width), nn.ReLU()) for _ in range(layers - 1)]
    return nn.Sequential(
        _Layer(nn.Flatten(), nn.Linear(64, width)),
        *(_Residual(norm, nn.Linear(width, width), scale=1 / math.sqrt(layers)) for norm in norms[1:]),
        _Layer(norms[0], nn.Linear(width, 10)),
    )


def resnet(layers: int = 12, width: int = 16) -> nn.Sequential:
    """Return residual layers of GroupNorm, ReLU and a convolution between a stem and a linear layer."""
    norms = [nn.Sequential(nn.GroupNorm(4, width), nn.ReLU()) for _ in range(layers - 1)]

    def convolution(channels: int) -> nn.Module:
        return nn.Conv2d(channels, width, 3, padding=1, bias=False)

    return nn.Sequential(
        _Layer(convolution(1)),
        *(_Residual(norm, convolution(width)) for norm in norms[1:]),
        _Layer(norms[0], nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10)),
    )


TASKS: dict[str, Callable[..., nn.Sequential]] = {"mlp": deep_mlp, "resnet": resnet}


# ------------------------------------------------------------------------------------------------------- training


class AdaptiveBraking(torch.optim.SGD):
    """SGD whose gradients count less where they agree with the velocity, and more where they oppose it.

        alpha = 1 - rho <g, v> / (|g| |v|) for every filter;    v' = m v + alpha g;    w' = w - lr v'

    Venigalla, Kosson, Chiley, Köster, Adaptive braking for mitigating gradient delay, 2020, arXiv:2007.01397; the
    formula is from memory. Biases and the like are one filter.
    """

    rho = 1.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Scale the gradients by alpha, then do what SGD does."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].get("momentum_buffer")
                if p.grad is not None and velocity is not None:
                    self._brake(p.grad, velocity)
        super().step()
        return loss

    def _brake(self, grad: Tensor, velocity: Tensor) -> None:
        filters = len(grad) if grad.ndim > 1 else 1
        g, v = grad.view(filters, -1), velocity.view(filters, -1)
        norms = (g.norm(dim=1) * v.norm(dim=1)).clamp_min(1e-30)
        g.mul_((1 - self.rho * (g * v).sum(1) / norms).unsqueeze(1))


class _Module(L.LightningModule):
    """A network, cross-entropy, and SGD with constant hyperparameters."""

    def __init__(self, net: nn.Module, optimizer: type[torch.optim.SGD], lr: float, momentum: float) -> None:
        super().__init__()
        self.net, self.optimizer, self.lr, self.momentum = net, optimizer, lr, momentum

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - MEAN) / DEVIATION)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True)
class Setting:
    """What the variants of a comparison have in common.

    Attributes:
        task: a key of :data:`TASKS`.
        lr: at the reference batch.
        micro_batch: samples per update.
        epochs: passes over the 1200 digits.
        tiny: a size for testing the benchmark itself.
    """

    task: str
    lr: float
    micro_batch: int
    epochs: int
    tiny: bool = False

    def build(self) -> nn.Sequential:
        """Return the network; every child is a stage."""
        return TASKS[self.task](4) if self.tiny else TASKS[self.task]()

    @property
    def hyperparameters(self) -> tuple[float, float]:
        """Learning rate and momentum for the micro-batch."""
        return scale_hyperparameters(self.lr, REFERENCE_MOMENTUM, REFERENCE_BATCH, self.micro_batch)

    @property
    def delay(self) -> int:
        """D, of the first stage."""
        return stage_delay(0, len(self.build()))

    def over_limit(self, variant: str, curvature: float | None) -> float | None:
        """Learning rate over the largest stable one; None where the analysis says nothing.

        In one direction of a quadratic it does not matter whether the backward pass sees the weights of the forward
        pass: ``stash`` is ``none``.
        """
        lr, momentum = self.hyperparameters
        kind: Any = {SGD: "none", "stash": "none"}.get(variant, variant)
        if kind not in get_args(MitigationName) or curvature is None or curvature <= 0:
            return None
        return lr / max_stable_lr(curvature, 0 if variant == SGD else self.delay, momentum, mitigation=kind)


@dataclass(frozen=True)
class Run:
    """What a training left behind: means over :data:`LOOKS` looks at the network in the last epoch.

    Attributes:
        train_loss: mean cross-entropy of all training images.
        accuracy: per cent of the held-out ones named correctly.
        finite: whether it ended where it was to end, and not at a gradient that is NaN or Inf.
        curvature: largest eigenvalue of the Hessian of the loss in the first stage's weights; for SGD, where
            it ended well.
    """

    train_loss: float
    accuracy: float
    finite: bool
    curvature: float | None = None


class _Looks(L.Callback):
    """Looks at the network in its last epoch."""

    def __init__(self, data: DigitsData) -> None:
        self.data = data
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = max(int(trainer.num_training_batches) // LOOKS, 1)
        if trainer.current_epoch + 1 == trainer.max_epochs and (batch_idx + 1) % every == 0:
            self.look(pl_module)

    @torch.no_grad()
    def look(self, module: L.LightningModule) -> None:
        """Take loss and accuracy."""
        (images, labels), (held_out, expected) = self.data.train.tensors, self.data.validation.tensors
        loss = F.cross_entropy(module(images), labels)
        self.seen.append((float(loss), 100 * float((module(held_out).argmax(1) == expected).float().mean())))

    def mean(self, module: L.LightningModule) -> tuple[float, float]:
        """Loss and accuracy; of what is left where the last epoch was not reached."""
        if not self.seen:
            self.look(module)
        losses, accuracies = zip(*self.seen, strict=True)
        return statistics.mean(losses), statistics.mean(accuracies)


@contextlib.contextmanager
def _cleaned_up() -> Iterator[None]:
    """Take back what Lightning sets up for a strategy of several processes: their group and environment variables."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def train(setting: Setting, variant: str, seed: int) -> Run:
    """Train once: the same weights and the same order of samples for every variant."""
    L.seed_everything(seed, verbose=False)
    optimizer = AdaptiveBraking if variant == BRAKING else torch.optim.SGD
    module = _Module(setting.build(), optimizer, *setting.hyperparameters)
    data = DigitsData(setting.micro_batch)
    data.setup()
    looks = _Looks(data)
    mitigation = "none" if variant == BRAKING else variant
    trainer = L.Trainer(
        strategy="auto" if variant == SGD else PipelinedBPStrategy(stages="layers", mitigation=mitigation),
        max_epochs=setting.epochs,
        callbacks=[looks],
        limit_train_batches=3 if setting.tiny else None,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    finite = True
    with _cleaned_up(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", EffWarning)  # that D(1-m) is large is what some rows are about
        try:
            trainer.fit(module, data.train_dataloader())
        except NonFiniteGradientError:
            finite = False
    loss, accuracy = looks.mean(module)
    ended_well = variant == SGD and math.isfinite(loss)
    return Run(loss, accuracy, finite, _curvature(module, data) if ended_well else None)


def _curvature(module: _Module, data: DigitsData) -> float:
    """Largest eigenvalue of the Hessian of 256 images' loss, in the weights of the first stage."""
    images, labels = (t[:256] for t in data.train.tensors)
    weights = {name: p.detach() for name, p in module.named_parameters() if name.startswith("net.0.")}

    def gradient(flat: Tensor) -> Tensor:
        flat = flat.detach().requires_grad_()
        parts = flat.split([p.numel() for p in weights.values()])
        seen = {name: part.view_as(p) for (name, p), part in zip(weights.items(), parts, strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(module, seen, (images,)), labels)
        return torch.autograd.grad(loss, flat)[0]

    return float(top_curvature(gradient, torch.cat([p.reshape(-1) for p in weights.values()])))


# ------------------------------------------------------------------------------------------------------- the report


def _mean(values: Sequence[float], digits: int) -> str:
    """Mean and half the range."""
    return f"{statistics.mean(values):.{digits}f} ±{(max(values) - min(values)) / 2:.{digits}f}"


def measure(report: Report, setting: Setting, variants: Sequence[str], seeds: int) -> None:
    """Train every variant with every seed, seeds outermost, and add a row per variant: points of accuracy below SGD."""
    found: dict[str, list[Run]] = {variant: [] for variant in (SGD, *variants)}
    for seed in range(seeds):
        for variant, runs in found.items():
            runs.append(train(setting, variant, seed))
    for variant, runs in found.items():
        below = [base.accuracy - run.accuracy for base, run in zip(found[SGD], runs, strict=True)]
        settings: dict[str, str | int] = {"task": setting.task, "batch": setting.micro_batch, "lr": f"{setting.lr:g}"}
        settings["D(1-m)"] = f"{setting.delay * (1 - setting.hyperparameters[1]):.2f}"
        over = [x for base in found[SGD] if (x := setting.over_limit(variant, base.curvature)) is not None]
        settings["lr / limit"] = f"{statistics.mean(over):.2g}" if over else ""
        settings["train loss"] = _mean([run.train_loss for run in runs], 3)
        settings["% accuracy"] = _mean([run.accuracy for run in runs], 1)
        expected = bool(over) and max(over) < 1 and not setting.tiny
        target = TARGETS.get(variant) if expected else None
        details = {"runs": [vars(run) for run in runs], "hyperparameters": setting.hyperparameters}
        report.add(Row(settings, f"{variant} / sgd", spread(below), "pt", target, details))
        if stopped := sum(not run.finite for run in runs):
            report.note(f"{setting}, {variant}: {stopped} of {seeds} runs ended at a gradient that was not finite.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipelined_bp_quality", description=__doc__)
    parser.add_argument("--task", default="mlp,resnet", help=f"comma-separated, of {', '.join(TASKS)}")
    sizes = ",".join(map(str, VARIANTS))
    parser.add_argument("--micro-batches", default=sizes, help=f"comma-separated, of {sizes}")
    known = (*ALL, BRAKING)
    chosen = f"comma-separated, of {', '.join(known)}; default: all at 4 and 32, a few at the others"
    parser.add_argument("--variants", help=chosen)
    parser.add_argument("--lr", default=f"{REFERENCE_LR}", help="comma-separated, at the reference batch")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3, help="passes over the digits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    asked = None if options.variants is None else options.variants.split(",")
    for what, values, allowed in (
        ("tasks", options.task.split(","), TASKS),
        ("variants", asked or [], known),
        ("micro-batches", options.micro_batches.split(","), sizes.split(",")),
    ):
        if unknown := set(values) - set(allowed):
            parser.error(f"unknown {what} {sorted(unknown)}; known: {', '.join(allowed)}")
    if options.device != "cpu":
        parser.error("the tasks are too small for a GPU: --device cpu only")
    quiet()
    report = Report("pipelined_bp_quality", ("task", "batch", "lr", "D(1-m)", "lr / limit", "train loss", "% accuracy"))
    with threads(options.threads):
        for task in options.task.split(","):
            for lr in map(float, options.lr.split(",")):
                for batch in map(int, options.micro_batches.split(",")):
                    setting = Setting(task, lr, batch, 1 if options.tiny else options.epochs, options.tiny)
                    measure(report, setting, asked or VARIANTS[batch], options.seeds)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
