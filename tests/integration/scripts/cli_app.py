"""A LightningCLI project that knows nothing of lightning_eff."""

from app import QUIET, AppModel
from lightning.pytorch.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI(AppModel, trainer_defaults={"accelerator": "cpu", "max_steps": 2, **QUIET}, save_config_callback=None)
