"""The table of twins: which layers have a quantised form, and which class it is."""

from __future__ import annotations

from torch import nn

from lightning_eff.precision.layers.attention import AttentionTwin
from lightning_eff.precision.layers.linear import ConvTwin, HFConv1DTwin, LinearTwin
from lightning_eff.precision.layers.sharded import own_class
from lightning_eff.precision.layers.twins import Twin, plain_class

SUPPORTED = "Linear, Conv1d, Conv2d, Conv3d, MultiheadAttention, transformers' Conv1D"
"""What has a twin, for people."""
TWINS: dict[type[nn.Module], type[Twin]] = {
    nn.Linear: LinearTwin,
    nn.Conv1d: ConvTwin,
    nn.Conv2d: ConvTwin,
    nn.Conv3d: ConvTwin,
    nn.MultiheadAttention: AttentionTwin,
}
"""torch's layers and their twins."""


def twin_of(module: nn.Module) -> type[Twin] | None:
    """Return the mixin that makes a quantised twin of ``module``, or None.

    A subclass has its base's twin where it leaves the methods alone that the twin replaces. What ``fully_shard`` made
    of a layer has the layer's.
    """
    own = plain_class(own_class(type(module)))
    for base in own.__mro__:
        twin = _twin_of_class(base)
        if twin is not None:
            return twin if all(getattr(own, key) is getattr(base, key) for key in twin.CALLED) else None
    return None


def _twin_of_class(base: type[nn.Module]) -> type[Twin] | None:
    if base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils":  # which need not be installed
        return HFConv1DTwin
    return TWINS.get(base)
