"""Optimizers and what is put around them; torch alone, no Lightning."""

from lightning_eff.optim.bf16.wrapper import UPDATES, Update, bf16_updates

__all__ = ["UPDATES", "Update", "bf16_updates"]
