"""Hydra imports every module of this namespace package at ``@hydra.main``; that is all our strings need.

A project with ``_target_: lightning.pytorch.Trainer`` and ``precision: luq4`` in its config works with no import of
``lightning_eff`` in its own code.
"""

import lightning_eff  # noqa: F401 - importing it registers the strings
