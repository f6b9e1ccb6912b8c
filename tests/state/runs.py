"""A small run of every method that keeps something in a checkpoint; ``python -m tests.state.runs`` writes the files.

``tests/data/*.ckpt`` were written by version 0.1.0 as it was before states were checked: they have to load for good.
A method that is added later gets a file of its own; the old ones stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[1] / "data"
CUT, END = 4, 8
"""Optimizer steps in the file, and of the whole run."""


class Run(NamedTuple):
    """How a method is run, and where in the checkpoint its state is."""

    options: Callable[[], dict[str, Any]]
    path: tuple[str | int, ...]
    optimizer: str = "sgd"
    warmup: int = 0


def _precision(name: str, **options: Any) -> dict[str, Any]:
    import lightning_eff.precision

    return {"plugins": [getattr(lightning_eff.precision, name)(**options)]}


def _strategy(name: str, **options: Any) -> dict[str, Any]:
    import lightning_eff.strategies

    micro_batches = 2 if name == "DropComputeStrategy" else 1
    made = getattr(lightning_eff.strategies, name)(process_group_backend="gloo", **options)
    return {"strategy": made, "accumulate_grad_batches": micro_batches}


def _callback(name: str, *args: Any, **options: Any) -> dict[str, Any]:
    import lightning_eff.callbacks

    return {"callbacks": [getattr(lightning_eff.callbacks, name)(*args, **options)]}


RUNS: dict[str, Run] = {
    "luq4": Run(lambda: _precision("LUQPrecision", hindsight=0.1), ("LUQPrecision",)),
    "fp8-delayed": Run(
        lambda: _precision("FP8Precision", scaling="delayed", history=3, filter_slow=False), ("FP8Precision",)
    ),
    "fp8-fit": Run(lambda: _precision("FittedPrecision", gradient_rounding="stochastic"), ("FittedPrecision",)),
    "fp6-fit": Run(lambda: _precision("FittedPrecision", bits=6), ("FittedPrecision",)),
    "flexpoint16": Run(
        lambda: _precision("FlexpointPrecision", weights="flex16", weight_rounding="stochastic", length=3),
        ("FlexpointPrecision",),
    ),
    "dfp16": Run(lambda: _precision("DFP16Precision"), ("DFP16Precision",)),
    "bf16-sr": Run(lambda: _precision("BF16Precision", update="sr"), ("optimizer_states", 0)),
    "bf16-kahan": Run(lambda: _precision("BF16Precision", update="kahan"), ("optimizer_states", 0)),
    "bf16-split": Run(lambda: _precision("BF16Precision", update="split"), ("optimizer_states", 0), "adam"),
    "dropcompute": Run(lambda: _strategy("DropComputeStrategy", warmup_steps=6), ("DropComputeStrategy",), warmup=3),
    "pipelined_bp": Run(
        lambda: _strategy("PipelinedBPStrategy", module="net", stages=["2"], mitigation="lwp_w"),
        ("PipelinedBPStrategy",),
    ),
    "gradient_pruning": Run(
        lambda: _callback("GradientPruning", 0.5, warmup_steps=1, feedback=True), ("callbacks", "GradientPruning")
    ),
    "gradient_statistics": Run(lambda: _callback("GradientStatistics", 2), ("callbacks", "GradientStatistics")),
    "non_finite_guard": Run(lambda: _callback("NonFiniteGuard", on_nonfinite="skip"), ("callbacks", "NonFiniteGuard")),
    "luq_fine_tuning": Run(
        lambda: {"precision": "luq4", **_callback("LUQFineTuning", 6)}, ("callbacks", "LUQFineTuning")
    ),
}


def task(optimizer: str) -> Any:
    """The smallest model with something in its middle to convert."""
    from lightning.pytorch import LightningModule

    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch.to(next(self.net.parameters()).dtype)).float().square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            kinds = {"sgd": (torch.optim.SGD, {"momentum": 0.5}), "adam": (torch.optim.Adam, {})}
            kind, extra = kinds[optimizer]
            return kind(self.parameters(), lr=0.01, **extra)

        def train_dataloader(self) -> Any:
            return torch.randn(64, 4, 3, generator=torch.Generator().manual_seed(1))

    return Task()


def quiet_trainer(**options: Any) -> Any:
    """A Trainer on the CPU that writes nothing."""
    from lightning.pytorch import Trainer

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=1, log_every_n_steps=1, **quiet, **options)


def fit(name: str, steps: int, *, resume: str | Path | None = None) -> Any:
    """The Trainer after ``steps`` optimizer steps of one run, or of a run that is resumed."""
    run = RUNS[name]
    trainer = quiet_trainer(max_steps=steps, **run.options())
    torch.manual_seed(3)
    keyword = {} if resume is None else {"ckpt_path": str(resume), "weights_only": True}
    trainer.fit(task(run.optimizer), **keyword)
    return trainer


def cut_of(name: str) -> int:
    """Steps in the file; dropcompute has ended its measurement by then, luq_fine_tuning is in its phase."""
    return CUT + RUNS[name].warmup


def main() -> None:
    """Write the files that are not there."""
    for name in RUNS:
        path = DATA / f"{name}.ckpt"
        if not path.exists():
            trainer = fit(name, cut_of(name))
            trainer.save_checkpoint(path)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
