"""What must work on every supported Lightning, runnable with any interpreter: ``python window_smoke.py``.

No pytest and no fixtures, so that it also runs where only Lightning itself is installed. Prints one line per check and
ends with status 1 if any failed.
"""

from __future__ import annotations

import importlib
import logging
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import lightning_eff.pytorch_lightning
from lightning_eff.callbacks import LowPrecision
from lightning_eff.errors import UnknownMethodError, UnsupportedCombinationError
from lightning_eff.integration.lazy import status
from lightning_eff.precision import LUQPrecision

PAIRS = (("lightning.pytorch", "lightning.fabric"), ("pytorch_lightning", "lightning_fabric"))
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class FailedError(Exception):
    """A check found something else than it expected."""


def expect(condition: bool, what: object) -> None:
    if not condition:
        raise FailedError(str(what))


def refused(error: type[Exception], words: str, build: Callable[[], object]) -> None:
    try:
        build()
    except error as caught:
        expect(words in str(caught), f"message lacks {words!r}: {caught}")
        return
    raise FailedError(f"{error.__name__} was not raised")


class Suite:
    """The checks, for one pair of Trainer and Fabric."""

    def __init__(self, root: str, fabric: str) -> None:
        self.pl, self.fabric = importlib.import_module(root), importlib.import_module(fabric).Fabric
        self.strategies = importlib.import_module(f"{root}.strategies")
        standalone = root == "pytorch_lightning"
        self.plugin = lightning_eff.pytorch_lightning.LUQPrecision if standalone else LUQPrecision
        self.callback = lightning_eff.pytorch_lightning.LowPrecision if standalone else LowPrecision

    def trainer(self, **kwargs: Any) -> Any:
        return self.pl.Trainer(**{**QUIET, "accelerator": "cpu", "devices": 1, "max_steps": 4, **kwargs})

    def model(self) -> Any:
        class Model(self.pl.LightningModule):  # type: ignore[name-defined, misc]
            swapped: bool | None = None

            def __init__(self) -> None:
                super().__init__()
                self.net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.swapped = type(self.net[1]) is not torch.nn.Linear
                return self.net(batch).square().mean()

            def validation_step(self, batch: Any, batch_idx: int) -> Any:
                return self.net(batch).square().mean()

            def train_dataloader(self) -> Any:
                return torch.utils.data.DataLoader(torch.randn(16, 16), batch_size=4)

            val_dataloader = train_dataloader

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.parameters(), lr=1e-2)

        return Model()

    def check_strings(self) -> None:
        for given in ("luq4", "LUQ4+bf16-mixed", "luq4+bf16-true"):
            model, trainer = self.model(), self.trainer(precision=given)
            before = model.net[1].weight.detach().clone()
            trainer.fit(model)
            expect(model.swapped is True, f"{given}: not converted")
            expect(type(model.net[1]) is torch.nn.Linear, f"{given}: not converted back")
            expect(not torch.equal(before, model.net[1].weight), f"{given}: did not train")
            expect(trainer.precision_plugin.eff_method == "luq4", given)

    def check_instance_callback_fabric(self) -> None:
        for kwargs in ({"plugins": [self.plugin()]}, {"callbacks": [self.callback("luq4", {"levels": 8})]}):
            model = self.model()
            self.trainer(**kwargs).fit(model)
            expect(model.swapped is True, kwargs)
        fabric = self.fabric(precision="luq4", accelerator="cpu", devices=1)
        net = self.model().net
        module, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        fabric.backward(module(torch.randn(4, 16)).square().mean())
        optimizer.step()
        expect(type(net[1]) is not torch.nn.Linear, "Fabric did not convert")

    def check_refusals(self) -> None:
        for build in (self.trainer, self.fabric):
            refused(UnknownMethodError, "Did you mean 'luq4'?", lambda build=build: build(precision="luq5"))
            refused(UnsupportedCombinationError, "scaler", lambda build=build: build(precision="luq4+16-mixed"))
        refused(ValueError, "Received both", lambda: self.trainer(precision="luq4", plugins=[self.plugin()]))
        if hasattr(self.strategies, "ModelParallelStrategy"):  # since 2.3
            strategy = self.strategies.ModelParallelStrategy()
            refused(
                UnsupportedCombinationError,
                "ModelParallelStrategy",
                lambda: self.trainer(precision="luq4", strategy=strategy),
            )

    def check_resume_and_plain_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.ckpt"
            trainer, model = self.trainer(precision="luq4", max_steps=2), self.model()
            trainer.fit(model)
            trainer.save_checkpoint(path)
            saved = torch.load(path, weights_only=True)
            expect("LUQPrecision" in saved, list(saved))
            plain = self.model()
            expect(set(saved["state_dict"]) == set(plain.state_dict()), "keys differ from the plain model's")
            resumed = self.trainer(precision="luq4", max_steps=4)
            resumed.fit(plain, ckpt_path=path)
            expect(resumed.global_step == 4, resumed.global_step)
            unaware = self.trainer(max_steps=3)
            unaware.fit(self.model(), ckpt_path=path)
            expect(unaware.global_step == 3, "a plain Trainer did not resume")

    def check_pickle(self) -> None:
        plugin = self.trainer(precision="luq4+bf16-mixed").precision_plugin
        copied = pickle.loads(pickle.dumps(plugin))
        expect(type(copied) is type(plugin), type(copied))
        expect(type(pickle.loads(pickle.dumps(self.plugin()))) is self.plugin, "instance")

    def check_cli(self) -> None:
        cli = importlib.import_module(f"{self.pl.__name__}.cli")
        defaults = {**QUIET, "accelerator": "cpu"}
        sys.argv = ["window_smoke.py"]
        for given, base in (("luq4+bf16-mixed", "bf16-mixed"), ("32", "32-true"), ("bf16-mixed", "bf16-mixed")):
            args = [f"--trainer.precision={given}"]
            app = cli.LightningCLI(type(self.model()), run=False, args=args, trainer_defaults=defaults)
            expect(app.trainer.precision == base, given)


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for root, fabric in PAIRS:
        suite = Suite(root, fabric)
        for name in sorted(name for name in dir(suite) if name.startswith("check_")):
            yield f"{root} {name.removeprefix('check_')}", getattr(suite, name)


def main() -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("lightning", importlib.import_module("lightning").__version__, "torch", torch.__version__)
    failures = [root for root, state in status().items() if state != "ready"]
    for name, check in checks():
        try:
            check()
            print("ok    ", name, flush=True)
        except Exception:  # noqa: BLE001, PERF203 - every check is run and reported
            traceback.print_exc()
            print("FAILED", name, flush=True)
            failures.append(name)
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
