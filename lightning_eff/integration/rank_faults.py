"""Wherever Lightning makes ranks meet, a rank that dies, hangs or raises is named on the others.

They meet in collectives of the strategy (barriers, broadcasts, reductions), each of which is a call in the
:class:`~lightning_eff.runtime.roll_call.RollCall`; in collectives that Lightning, torchmetrics or the user call
directly, whose errors are translated where a run ends; and at the start. Whatever ends a run on a rank is noted for the
others, and its connections are closed, so that they learn of it although the process may live on.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist

from lightning_eff.errors import RankLostError
from lightning_eff.integration.bases import StrategyBase
from lightning_eff.methods import MethodInfo
from lightning_eff.runtime.patches import Undo, replace_attribute
from lightning_eff.runtime.processes import EndWithParent, lost_a_loader_worker
from lightning_eff.runtime.rendezvous import forget_collectives, form_group, is_ours
from lightning_eff.runtime.roll_call import RollCall, is_of_a_collective

_NOT_ERRORS = ("_TunerExitException",)
"""Exceptions with which Lightning ends a run that went well."""


class RankFaults(StrategyBase):
    """Names the ranks that are missing wherever those of a strategy meet.

    Attributes:
        roll_call: of this run, once the ranks have come together.
        left: the roll call of a run that an error has ended here.
    """

    info: MethodInfo
    roll_call: RollCall | None = None
    left: RollCall | None = None
    _formed_here = False
    _undo: list[Undo]

    # ------------------------------------------------------------------------------------------ the start

    def setup_distributed(self) -> None:
        """Bring the ranks together within ``timeout_s``, and name those that do not come."""
        world = int(self.num_nodes * self.num_processes)
        if world > 1 and not dist.is_initialized():
            self._form(world)
        super().setup_distributed()
        self.roll_call, self.left = RollCall(self.info.name), None
        self._formed_here = world > 1 and is_ours()

    def _form(self, world: int) -> None:
        self.set_world_ranks()
        backend = self._get_process_group_backend()
        environment: Any = self.cluster_environment
        timeout: Any = self._timeout
        device = self.root_device
        (ddp,) = [kind for kind in type(self).__mro__ if kind.__name__ == "DDPStrategy"]
        form = functools.partial(
            sys.modules[ddp.__module__]._init_dist_connection,
            environment,
            backend,
            timeout=timeout,
            device_id=None if device.type == "cpu" else device,
        )
        form_group(
            self.info.name,
            environment,
            rank=self.global_rank,
            world=world,
            timeout=timeout,
            form=lambda store: form(store=store),
        )

    # ------------------------------------------------------------------------------------------ the run

    def _configure_launcher(self) -> None:
        """Translate errors in the launcher, which every entry point of a Trainer goes through."""
        super()._configure_launcher()
        launcher: Any = self._launcher
        launcher.launch = functools.partial(self._launch, launcher.launch)

    def _launch(self, launch: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return launch(functools.partial(self._watched, function), *args, **kwargs)

    def _watched(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an entry point of the Trainer; say of an error which rank it is about, and leave the others."""
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            roll_call = self.roll_call
            if roll_call is None or roll_call.world == 1 or type(error).__name__ in _NOT_ERRORS:
                raise
            told = self._name_rank(error, roll_call)
            self._leave_whatever_comes(error, roll_call)
            if told is None:
                raise
            raise told from error

    def _leave_whatever_comes(self, error: BaseException, roll_call: RollCall) -> None:
        """Leave, though torch's signal handler raises the death of a loader worker wherever it is told of it."""
        try:
            self._leave(error, roll_call)
        except RuntimeError as another:
            if not lost_a_loader_worker(another):
                raise
            self._leave_whatever_comes(error, roll_call)

    def _name_rank(self, error: BaseException, roll_call: RollCall) -> RankLostError | None:
        """Return the error that names the rank, or None if this one says enough."""
        if is_of_a_collective(error):
            return roll_call.lost(self._place_of(error), error)
        if lost_a_loader_worker(error):
            return RankLostError(
                f"{self.info.name}: rank {roll_call.rank} lost a loader worker ({type(error).__name__}: {error}). It "
                "was killed (out of memory, or of shared memory?) or crashed: look at the system's log, try fewer "
                "workers or num_workers=0."
            )
        return None

    def _place_of(self, error: BaseException) -> str:
        """Return where a collective was called that is not the strategy's own."""
        module: Any = self.lightning_module
        state = module.trainer.state
        stage = state.stage.value if state.stage else state.fn.value
        frames = traceback.extract_tb(error.__traceback__)
        inner = [i for i, frame in enumerate(frames) if "/torch/distributed/" in frame.filename.replace("\\", "/")]
        if not inner or inner[0] == 0:
            return f"a collective (stage {stage})"
        caller = frames[inner[0] - 1]
        name = frames[inner[-1]].name
        return f"torch.distributed.{name} (stage {stage}, called in {caller.filename}:{caller.lineno})"

    def _leave(self, error: BaseException, roll_call: RollCall) -> None:
        """Tell the others why, then close the connections: they fail at once instead of waiting."""
        if not isinstance(error, RankLostError) and not is_of_a_collective(error):
            roll_call.note_error(error)
        forget_collectives(error)
        self.roll_call, self.left = None, roll_call  # it keeps the store for as long as others may read it
        self.close_connections()
        if self._formed_here and dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
        roll_call.stay()

    def close_connections(self) -> None:
        """Close the connections that a strategy has besides the default group's."""

    def teardown(self) -> None:
        """Put back what was exchanged for the run."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        if self.roll_call is not None:
            self.roll_call.note_end()
        super().teardown()

    def process_dataloader(self, dataloader: Any) -> Any:
        """Let loader workers end with their rank: they hold copies of its connections."""
        several = self.roll_call is not None and self.roll_call.world > 1
        if several and bool(getattr(dataloader, "num_workers", False)) and hasattr(dataloader, "worker_init_fn"):
            ending = EndWithParent(dataloader.worker_init_fn)
            self._undo.append(replace_attribute(dataloader, "worker_init_fn", ending))
        return super().process_dataloader(dataloader)

    # ------------------------------------------------------------------------------------------ meetings

    def naming_lost_ranks(self, where: str) -> AbstractContextManager[None]:
        """Return the context of a collective, in which ranks that do not come are named."""
        return nullcontext() if self.roll_call is None else self.roll_call(where)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor over the ranks."""
        with self.naming_lost_ranks("a reduction"):
            return super().reduce(*args, **kwargs)

    def all_gather(self, *args: Any, **kwargs: Any) -> Any:
        """Gather a tensor from all ranks."""
        with self.naming_lost_ranks("gathering tensors"):
            return super().all_gather(*args, **kwargs)

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        """Broadcast an object."""
        with self.naming_lost_ranks("a broadcast"):
            return super().broadcast(*args, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        name = args[0] if args else kwargs.get("name")
        with self.naming_lost_ranks(f"the barrier {name!r}" if name else "a barrier"):
            super().barrier(*args, **kwargs)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Note that one is being written: the others wait for it."""
        if self.roll_call is not None:
            self.roll_call.note("writing a checkpoint")
        super().save_checkpoint(*args, **kwargs)
