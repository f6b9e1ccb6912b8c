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
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eff.errors import NoEffectWarning, UnsupportedCombinationError
from lightning_eff.integration.attached import trainer_of
from lightning_eff.integration.graft import check_strategy
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.optim.bf16.handover import Left, hand_over, left_by, take_back, versions
from lightning_eff.optim.bf16.wrapper import ShadowedOptimizer, Update, bf16_updates
from lightning_eff.optim.steps import Closure
from lightning_eff.precision.run import RunMixin
from lightning_eff.runtime.ranks import seed_of_rank_0
from lightning_eff.runtime.runs import Run


class BF16Mixin(RunMixin):
    """Keeps weights, activations and gradients in bfloat16; updates weights in float32 and loses no small update.

    Args:
        update: how updated weights are written back. ``"split"`` keeps the lower 16 bits beside the weight: float32
            exactly. ``"kahan"`` keeps a bfloat16 compensation. ``"sr"`` rounds stochastically and keeps nothing.

    Raises:
        ConfigurationError: ``update`` is not known, or contradicts the string the method was asked for by.
        UnsupportedCombinationError: the optimizer evaluates its closure several times (LBFGS); or a raw optimizer that
            is none of the Trainer's steps bfloat16 parameters of the model.

    State: in the optimizer's state, ``lo`` (split) or ``compensation`` (kahan) of each parameter, and under ``bf16``
    ``update``, ``seed``, ``steps`` and (sr) ``streams``, one number for each parameter, from its name.
    Randomness: a hash of ``torch.initial_seed()`` of rank 0, the step, and the parameter's name with the number of its
    optimizer, so that no two parameters and no two optimizers share their noise; no generator is drawn from, and every
    rank rounds alike, so that replicas stay equal.
    """

    info: MethodInfo = METHODS["bf16-sr"]
    precision: Any = "bf16-true"

    def __init__(self, *, update: Update = "split") -> None:
        super().__init__()
        self.configure_method(update=update)

    def _begin(self, **options: Any) -> None:
        """See the base class."""
        self.update: Update = options["update"]
        self._seed: int | None = None
        self._models: list[nn.Module] = []
        self._adopted: list[Optimizer] = []
        self._run = Run()
        self._left: Left | None = None
        self._new: list[Any] = []
        self._versions: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the options; what a run leaves to the next is the original's."""
        return {**self.__dict__, "_left": None, "_new": [], "_versions": {}, "_models": [], "_adopted": []}

    def _forget_run(self) -> None:
        """Begin without what another run has left behind."""
        self._seed = None
        self._left = None

    def _restart(self) -> None:
        """Undo the handover: a checkpoint holds what the optimizers go on with."""
        take_back(self._new, self._optimizers())

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
        self._new = [] if self._left is None else hand_over(self._left, optimizers)
        self._left = None
        return super().connect(model, optimizers, lr_schedulers)

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the optimizer. Fabric tells of an optimizer here for the first time."""
        self._adopt(optimizer)
        return super().optimizer_step(optimizer, *args, **kwargs)

    def _adopt(self, optimizer: Optimizer) -> None:
        if self._seed is None:
            self._seed = seed_of_rank_0()
        if not any(known is optimizer for known in self._adopted):
            self._adopted.append(optimizer)
        elif isinstance(optimizer, ShadowedOptimizer) and not optimizer.unidentified():
            return
        bf16_updates(optimizer, update=self.update, seed=self._seed, names=self._names(optimizer))

    def _names(self, optimizer: Optimizer) -> dict[Tensor, str]:
        """Return what identifies the optimizer's parameters: its number, and their names in the model or places."""
        number = next(i for i, known in enumerate(self._adopted) if known is optimizer)
        every = [p for group in optimizer.param_groups for p in group["params"]]
        names = {p: f"{number}.#{place}" for place, p in enumerate(every)}
        models = enumerate(self._models)
        return names | {p: f"{number}.{i}.{name}" for i, model in models for name, p in model.named_parameters()}

    def before_step(self, optimizer: Optimizer, closure: Closure | None) -> Closure | None:
        """Refuse an optimizer that would lose small updates: one that neither Trainer nor Fabric has told of."""
        if not isinstance(optimizer, ShadowedOptimizer) and self._run.has(optimizer):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if any(p.dtype is torch.bfloat16 for p in params):
                raise UnsupportedCombinationError(
                    f"{self.eff_method}: a {type(optimizer).__name__} that is not one of the Trainer's (or Fabric's) "
                    f"is about to update bfloat16 parameters of the model, and would lose small updates. Return it "
                    f"from configure_optimizers (give it to fabric.setup), or make it with "
                    f"lightning_eff.optim.bf16_updates(optimizer, update={self.update!r})."
                )
        return closure

    def teardown(self) -> None:
        """Forget the seed, the next run takes its own; note the weights that the lower halves belong to."""
        self._versions = versions(self._optimizers())
        self._seed = None
        self._new = []
        self._models = []
        self._adopted = []
        self._end_run()
        super().teardown()

    # ------------------------------------------------------------------------------------------ as in bf16-true

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the module's floating parameters and buffers to bfloat16."""
        module = super().convert_module(module)
        if self._start_run(module):
            self._left = left_by(self._optimizers(), self._versions)
        trainer = trainer_of(module)
        if trainer is not None:
            check_strategy(self.info, trainer.strategy)
        if not any(known is module for known in self._models):
            self._models.append(module)
        return module.to(torch.bfloat16)

    def convert_input(self, data: Any) -> Any:
        """Convert floating tensors of a batch to bfloat16."""
        return apply_to_collection(data, dtype=Tensor, function=_to_bf16)

    def tensor_init_context(self) -> AbstractContextManager[None]:
        """Make new floating tensors bfloat16."""
        return _default_bf16()

    def module_init_context(self) -> AbstractContextManager[None]:
        """Make new modules bfloat16."""
        return _default_bf16()

    @contextlib.contextmanager
    def train_step_context(self) -> Generator[None]:
        """Adopt optimizers that have taken the place of others since; the rest is as in bf16-true."""
        for optimizer in self._optimizers():
            self._adopt(optimizer)
        with super().train_step_context():
            yield

    def _optimizers(self) -> list[Optimizer]:
        """Return the Trainer's, as they are now; none with Fabric."""
        return [] if self._run.trainer is None else list(self._run.trainer.strategy.optimizers)

    def forward_context(self) -> AbstractContextManager[None]:
        """Make new floating tensors in a forward pass bfloat16."""
        return _default_bf16()


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
