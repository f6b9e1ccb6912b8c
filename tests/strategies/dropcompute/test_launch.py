"""strategy="dropcompute" from the command line: LightningCLI, and projects launched as processes of their own."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import reports, run_python
from tests.strategies.command_line import app_of
from tests.strategies.models import NAMESPACES

# ---------------------------------------------------------------------------------------------------- LightningCLI

YAMLS = {
    "string": "trainer:\n  strategy: dropcompute\n",
    "class": (
        "trainer:\n  strategy:\n    class_path: {home}.DropComputeStrategy\n    init_args:\n"
        "      threshold: {threshold}\n      warmup_steps: 10\n      normalize: maximum\n"
        "      delay: stall:p=0.1,factor=3\n      process_group_backend: gloo\n      timeout_s: 60\n"
    ),
}


@pytest.mark.parametrize("root", NAMESPACES)
def test_yaml_with_the_string(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py"])
    app = app_of(root, YAMLS["string"], tmp_path)
    assert type(app.trainer.strategy).__name__ == "DropComputeStrategy"
    assert app.trainer.strategy.threshold == "auto"
    assert "strategy: dropcompute\n" in app.parser.dump(app.config)


@pytest.mark.parametrize("root", NAMESPACES)
@pytest.mark.parametrize(("written", "read"), [("auto", "auto"), ("0.25", 0.25), ("2", 2.0), (".inf", math.inf)])
def test_yaml_with_the_class(
    root: str, written: str, read: str | float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_eff.functional.stragglers.simulated import StallDelay

    monkeypatch.setattr(sys, "argv", ["app.py"])
    home = "lightning_eff.strategies" if root == NAMESPACES[0] else "lightning_eff.pytorch_lightning"
    text = YAMLS["class"].format(home=home, threshold=written)
    strategy = app_of(root, text, tmp_path).trainer.strategy
    assert type(strategy).__name__ == "DropComputeStrategy"
    assert (strategy.threshold, strategy.warmup_steps, strategy.normalize) == (read, 10, "maximum")
    assert strategy.delay == StallDelay(p=0.1, factor=3.0)
    assert any(base.__module__.startswith(root) for base in type(strategy).__mro__)


# ---------------------------------------------------------------------------------------------------- whole processes

SCRIPT = """
import json, os, sys
import torch
from {root} import LightningModule, Trainer

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self):
        strategy = self.trainer.strategy
        found = dict(rank=self.global_rank, world=self.trainer.world_size, kind=type(strategy).__name__,
                     base=type(strategy).__bases__[1].__module__.partition(".")[0], steps=self.trainer.global_step,
                     weight=self.net.weight.detach().double().sum().item(),
                     sampler=type(self.trainer.train_dataloader.sampler).__name__)
        os.write(1, (json.dumps(found) + chr(10)).encode())

if __name__ == "__main__":
    Trainer(accelerator="cpu", devices=2, strategy=sys.argv[1], accumulate_grad_batches=4, max_epochs=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False).fit(Model())
"""


UNTOUCHED = ("-m", "lightning_eff", "run")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "lightning_eff", "run")


@pytest.mark.long
@pytest.mark.parametrize(("root", "launch"), [*((root, UNTOUCHED) for root in NAMESPACES), (NAMESPACES[0], TORCHRUN)])
def test_an_untouched_project_launched_on_two_processes(root: str, launch: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.replace("{root}", root))
    done = run_python(*launch, "train.py", "dropcompute", cwd=tmp_path)
    found = sorted(reports(done), key=lambda line: line["rank"])
    assert [line["rank"] for line in found] == [0, 1]
    for line in found:
        assert (line["world"], line["kind"], line["steps"]) == (2, "DropComputeStrategy", 8)
        assert line["base"] == root.partition(".")[0]
        assert line["sampler"] == "DistributedSampler"
        assert line["weight"] == found[0]["weight"]
    assert "dropcompute: 8 steps in" in done.stdout
