"""``precision="bf16-sr" | "bf16-kahan" | "bf16-split"``: bfloat16 weights whose small updates are not lost.

Everything of Lightning's ``bf16-true``; the optimizers are made to update in float32 when the run starts.

References:
    Zamirai, Zhang, Aberger, De Sa, Revisiting BFloat16 Training, 2020, arXiv:2010.06192 (stochastic rounding, Kahan).
    Kalamkar et al., Optimizing Deep Learning Recommender Systems Training on CPU Cluster Architectures, SC 2020,
    arXiv:2005.04680 (split).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_eff.errors import ConfigurationError, NoEffectWarning
from lightning_eff.integration.precision import check_strategy
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.optim.bf16 import Update, bf16_updates


class BF16Mixin:
    """Weights, activations and gradients in bfloat16; weight updates in float32, written back without losing them.

    Args:
        update: how updated weights are written back. ``"split"`` keeps the lower 16 bits beside the weight: float32
            exactly. ``"kahan"`` keeps a bfloat16 compensation. ``"sr"`` rounds stochastically and keeps nothing.

    Raises:
        ConfigurationError: ``update`` is not known, or contradicts the string the method was asked for by.
        UnsupportedCombinationError: the optimizer evaluates its closure several times (LBFGS).

    State: in the optimizer's state, ``lo`` (split) or ``compensation`` (kahan) of each parameter, and under ``bf16``
    ``update``, ``seed`` and ``steps``.
    Randomness: a hash of ``torch.initial_seed()`` of rank 0, the step and the parameter's place; no generator is drawn
    from, and every rank rounds alike, so that replicas stay equal.
    """

    info: ClassVar[MethodInfo] = METHODS["bf16-sr"]
    precision: Any = "bf16-true"
    eff_method: str

    def __init__(self, *, update: Update = "split") -> None:
        super().__init__()
        self._eff_init(update=update)

    def _eff_init(self, update: Update | None = None) -> None:
        """Set up after construction, or after a graft, which has said by which string it was asked for."""
        asked = self.__dict__.get("eff_method")
        self.eff_method = asked or f"bf16-{update}"
        if self.eff_method not in METHODS or METHODS[self.eff_method].shell != self.info.shell:
            raise ConfigurationError(f"update={update!r} is not known; use 'split', 'kahan' or 'sr'.")
        if update is not None and self.eff_method != f"bf16-{update}":
            raise ConfigurationError(
                f"{self.eff_method!r} was asked for with update={update!r}. Ask for 'bf16-{update}', or leave it out."
            )
        self.update: Any = self.eff_method.removeprefix("bf16-")
        self._seed: int | None = None

    # ------------------------------------------------------------------------------------------ optimizers

    def connect(self, model: nn.Module, optimizers: list[Any], lr_schedulers: list[Any]) -> Any:
        """Make the Trainer's optimizers update in float32 (in place: schedulers and checkpoints keep theirs)."""
        for optimizer in optimizers:
            self._adopt(optimizer)
        every = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        if every and not any(p.dtype is torch.bfloat16 for p in every):
            warnings.warn(
                f"{self.eff_method} changes nothing: none of the {len(every)} parameters of the optimizers is "
                "bfloat16. Something has changed the module's dtype after Lightning converted it.",
                NoEffectWarning,
                stacklevel=2,
            )
        return super().connect(model, optimizers, lr_schedulers)  # type: ignore[misc]

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the optimizer. Fabric tells of an optimizer here for the first time."""
        self._adopt(optimizer)
        return super().optimizer_step(optimizer, *args, **kwargs)  # type: ignore[misc]

    def _adopt(self, optimizer: Any) -> None:
        if self._seed is None:
            self._seed = _seed_of_rank_0()
        bf16_updates(optimizer, update=self.update, seed=self._seed)

    def teardown(self) -> None:
        """Forget the seed: the next run takes its own."""
        self._seed = None
        super().teardown()  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------ as in bf16-true

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the module's floating parameters and buffers to bfloat16."""
        module = super().convert_module(module)  # type: ignore[misc]
        trainer = getattr(module, "_trainer", None)
        if trainer is not None:
            check_strategy(METHODS[self.eff_method], trainer.strategy)
        return module.to(torch.bfloat16)

    def convert_input(self, data: Any) -> Any:
        """Convert floating tensors of a batch to bfloat16."""
        return apply_to_collection(data, dtype=Tensor, function=_to_bf16)

    def tensor_init_context(self) -> Any:
        """New floating tensors are bfloat16."""
        return _default_bf16()

    def module_init_context(self) -> Any:
        """New modules are bfloat16."""
        return _default_bf16()

    def forward_context(self) -> Any:
        """New floating tensors in a forward pass are bfloat16."""
        return _default_bf16()


def _seed_of_rank_0() -> int:
    """``torch.initial_seed()`` of rank 0: ranks that hold the same weights have to round them alike."""
    seed = [torch.initial_seed()]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(seed, src=0)
    return seed[0]


def _to_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16) if x.is_floating_point() else x


@contextlib.contextmanager
def _default_bf16() -> Generator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
