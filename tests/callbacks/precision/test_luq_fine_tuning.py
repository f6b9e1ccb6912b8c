"""The fine-tuning phase: when it begins, what it does to the learning rate and the layers, and its resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_eff.callbacks import LUQFineTuning
from lightning_eff.errors import ConfigurationError, UnsupportedCombinationError

STEPS = 12
PHASE = 5


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 2)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Record(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.seen.append((optimizer.param_groups[0]["lr"], trainer.precision_plugin.weights_only))


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(24, 8, generator=generator)), batch_size=4)


def trainer(tmp_path: Path, *callbacks: Callback, max_epochs: int = 2, **options: Any) -> Trainer:
    return Trainer(
        **{"precision": "luq4", **options},
        max_epochs=max_epochs,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_the_phase_takes_the_last_steps_and_draws_the_triangle(tmp_path: Path) -> None:
    record = Record()
    trainer(tmp_path, LUQFineTuning(PHASE), record).fit(Model(), data())
    rates, phase = zip(*record.seen, strict=True)
    assert phase == (False,) * (STEPS - PHASE) + (True,) * PHASE
    assert rates[: STEPS - PHASE] == pytest.approx([0.1] * 6 + [0.01])
    up = [0.01 + 0.09 * t / 2.5 for t in range(3)]
    assert rates[STEPS - PHASE :] == pytest.approx([*up, 0.1 * 2 / 2.5, 0.1 * 1 / 2.5])


def test_weights_stay_on_int4_levels_and_inputs_do_not(tmp_path: Path) -> None:
    levels = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            if trainer.precision_plugin.weights_only:
                with torch.no_grad():
                    layer = module.net[2]
                    columns = layer(torch.eye(16))
                    levels.append(columns.unique().numel())

    model = Model()
    trainer(tmp_path, LUQFineTuning(PHASE), Look()).fit(model, data())
    assert len(levels) == PHASE
    assert max(levels) <= 15


def test_resume_inside_the_phase_is_exact(tmp_path: Path) -> None:
    def run(resume: bool, drop: str | None = None) -> tuple[dict[str, Tensor], list[tuple[float, bool]]]:
        torch.manual_seed(3)
        model, path, record = Model(), tmp_path / "cut.ckpt", Record()
        if not resume:
            whole = trainer(tmp_path, LUQFineTuning(8), record)
            save = Save(path)
            whole.callbacks.append(save)
            whole.fit(model, data())
        else:
            if drop:
                state = torch.load(path, weights_only=True)
                del state["callbacks"][drop]
                torch.save(state, path)
            torch.manual_seed(99)
            trainer(tmp_path, LUQFineTuning(8), record).fit(Model() if drop else model, data(), ckpt_path=path)
        return {k: v.clone() for k, v in model.state_dict().items()}, record.seen

    class Save(Callback):
        def __init__(self, path: Path) -> None:
            self.path = path

        def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(self.path)

    whole, rates = run(resume=False)
    resumed, rest = run(resume=True)
    assert rest == rates[6:]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    _, wrong = run(resume=True, drop="LUQFineTuning")
    assert wrong != rates[6:], "without its state the callback must not find the same learning rates"


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_a_bad_number_of_steps_is_named(steps: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"steps=.*is not allowed"):
        LUQFineTuning(steps)


def test_a_bad_rate_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"base_lr=-1"):
        LUQFineTuning(3, base_lr=-1)


@pytest.mark.parametrize("precision", ["32-true", "dfp16"])
def test_another_precision_is_refused(precision: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCombinationError, match="precision='luq4'"):
        trainer(tmp_path, LUQFineTuning(3), precision=precision).fit(Model(), data())


def test_an_endless_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_steps or max_epochs"):
        trainer(tmp_path, LUQFineTuning(3), max_epochs=-1).fit(Model(), data())
