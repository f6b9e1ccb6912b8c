"""LightningCLI: ``python examples/train_cli.py fit --config examples/cli_luq4.yaml``.

The precision is a line in the YAML file; add ``--trainer.precision=bf16-mixed`` to override it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the file also runs by its path

from lightning.pytorch.cli import ArgsType, LightningCLI

import lightning_eff  # noqa: F401 - makes precision: luq4 known to the command line
from examples.common.data import DigitsData
from examples.common.modules import DigitsCNN


def main(args: ArgsType = None) -> LightningCLI:
    """Run the command line; ``args`` replaces ``sys.argv`` in tests and notebooks."""
    return LightningCLI(DigitsCNN, DigitsData, args=args, save_config_callback=None)


if __name__ == "__main__":
    main()
