"""A project that knows nothing of lightning_eff. Prints one line of JSON per rank: what its middle layer was."""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer


class AppModel(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(3)))

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            plugin = self.trainer.precision_plugin
            report = {
                "rank": self.global_rank,
                "method": getattr(plugin, "eff_method", None),
                "base": plugin.precision,
                "swapped": type(self.net[1]) is not torch.nn.Linear,
                "argv": sys.argv[1:],
                "script": Path(sys.argv[0]).name,
                "main_file": Path(__file__).name,
            }
            os.write(1, (json.dumps(report) + "\n").encode())  # one write: ranks share the pipe
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, self.net[0].in_features), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

if __name__ == "__main__":
    strategy, devices, *_ = sys.argv[1:]
    trainer = Trainer(accelerator="cpu", strategy=strategy, devices=int(devices), max_steps=2, **QUIET)
    trainer.fit(AppModel())
