"""LightningCLI over a YAML file, as far as the Trainer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


def app_of(root: str, text: str, folder: Path) -> Any:
    """Return the application that a YAML configuration makes, with nothing run."""
    module = importlib.import_module(f"{root}.cli")
    boring = importlib.import_module(f"{root}.demos.boring_classes").BoringModel
    (folder / "config.yaml").write_text(text)
    defaults = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    return module.LightningCLI(
        boring, run=False, args=[f"--config={folder / 'config.yaml'}"], trainer_defaults=defaults
    )
