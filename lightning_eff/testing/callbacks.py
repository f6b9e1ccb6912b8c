"""The battery of callbacks: what every one has to keep, on one device and under data parallelism."""

from __future__ import annotations

from lightning_eff.testing.replicas import ReplicaBattery

__all__ = ["CallbackBattery"]


class CallbackBattery(ReplicaBattery):
    """Tests that every callback has to pass.

    Example:
        In a test module of yours::

            from lightning_eff.testing import CallbackBattery, CallbackCase


            class TestMine(CallbackBattery):
                case = CallbackCase(
                    info=MINE,  # your MethodInfo
                    classes={"lightning.pytorch": "my_package:MyCallback"},
                    options={"share": 0.5},
                    neutral={"share": 0.0},
                )
    """
