"""bfloat16 weights whose updates do not stagnate."""

from lightning_eff.optim.bf16.wrapper import UPDATES, Update, bf16_updates

__all__ = ["UPDATES", "Update", "bf16_updates"]
