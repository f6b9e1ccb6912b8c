"""What one converted layer knows: its formats, cached weight codes, rounding stream and sampled figures."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_eff.errors import EffWarning
from lightning_eff.functional import sqnr_db
from lightning_eff.functional.codes import Codes
from lightning_eff.kernels.quantize import fingerprint
from lightning_eff.precision.formats.base import GradCodes, LayerOptions, SavedInput, WeightCodes
from lightning_eff.precision.formats.history import History
from lightning_eff.runtime.seeds import SeedStream

Arrange = Callable[[Tensor], Tensor]
Key = tuple[Hashable, ...]


class Kept(NamedTuple):
    """Holds an input as it was kept: codes, their shape, and the history its scale was predicted from, if it was."""

    saved: SavedInput
    shape: torch.Size
    history: History | None


class RecentInputs:
    """Keeps the last inputs that were encoded for backward: layers that share an input share its codes.

    Query, key and value projections read one tensor, as do the two branches of a residual block; float32 keeps it once,
    so the packed codes are kept, and made, once too. The inputs themselves are not kept alive.
    """

    CAPACITY = 3
    """A residual block reads its input, then something else, then its input again for the shortcut."""

    def __init__(self) -> None:
        self._entries: list[tuple[weakref.ref[Tensor], Key, Kept]] = []

    @staticmethod
    def _key(x: Tensor, arrange: Arrange) -> Key:
        return (x._version, x.data_ptr(), x.shape, x.stride(), x.dtype, arrange, fingerprint(x))

    def find(self, x: Tensor, arrange: Arrange) -> Kept | None:
        """Return what was kept for ``arrange(x)``, if it is there and ``x`` has not been written to since."""
        return next((kept for t, key, kept in self._entries if t() is x and key == self._key(x, arrange)), None)

    def put(self, x: Tensor, arrange: Arrange, kept: Kept) -> None:
        """Remember what was kept for ``arrange(x)``, in place of the oldest."""
        entry = (weakref.ref(x), self._key(x, arrange), kept)
        self._entries = [entry, *self._entries[: self.CAPACITY - 1]]

    def clear(self) -> None:
        """Forget all, and let the codes go."""
        self._entries = []


_STATES: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def state_of(handle: Tensor) -> LayerState:
    """Return the state behind a handle tensor; how compiled graphs, which carry tensors alone, find their layer."""
    return _STATES[int(handle)]


def _no_state() -> None:
    """Return None, which a copy of a layer's state is."""


class LayerState:
    """Holds the format, caches and figures of one converted layer; a format sees it as a ``LayerView``.

    Args:
        name: the layer's qualified name.
        options: of the method.
        seeds: the stream all layers of a model share.
        recent: the last inputs of all layers of a model.
    """

    def __init__(self, name: str, options: LayerOptions, seeds: SeedStream, recent: RecentInputs | None = None) -> None:
        self.name = name
        self.format = options.format()
        self.seeds = seeds
        self.recent = RecentInputs() if recent is None else recent
        self.weights_only = False
        self.on_path = True
        self.measure = False
        self.metrics: dict[str, Tensor] = {}
        self.saved_bytes = 0
        self.saved_bytes_fp32 = 0
        self._counted = False
        self.step = 0
        self.histories = self.format.histories()
        self.written: dict[int, float] = {}
        self._cache: dict[Key, WeightCodes] = {}
        self._said: set[str] = set()
        self.handle = torch.tensor(next(_NUMBERS), dtype=torch.int64, device="cpu")
        _STATES[int(self.handle)] = self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Copy and pickle as None: the state belongs to the run, and a layer without one is plain."""
        return _no_state, ()

    def is_on_path(self, x: Tensor, weight: Tensor) -> bool:
        """Return whether gradients pass the layer: it was trainable at first, or has been seen to pass one since."""
        if not self.on_path and (weight.requires_grad or x.requires_grad):
            self.on_path = True
        return self.on_path

    def say_once(self, reason: str) -> None:
        """Warn that the layer computes in high precision now, once for each reason."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(
                f"Layer {self.name or '(model)'!r} computes in high precision here: {reason}.", EffWarning, stacklevel=2
            )

    def native(self, device: torch.device) -> bool:
        """Return whether this layer's products run on units made for its codes."""
        return self.format.native(device)

    def invalidate(self) -> None:
        """Forget the weight codes: the weights have changed or may have."""
        self._cache.clear()
        self.recent.clear()

    def encode_weight(self, weight: Tensor, *, arrange: Arrange | None = None) -> WeightCodes:
        """Encode ``weight`` once per optimizer step, and rearrange its codes by ``arrange``.

        The key holds the version counter and a sampled fingerprint: writes through ``.data`` do not move the former.
        """
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, fingerprint(weight))
        if (codes := self._cache.get(key)) is None:
            codes = self.format.encode_weight(weight.detach(), self)
            if self.measure:
                self.metrics["weight_sqnr_db"] = sqnr_db(weight, codes.forward.dequantize())
            if arrange is not None:
                once = Codes(arrange(codes.forward.codes).contiguous(), codes.forward.scale)
                codes = WeightCodes(once, once)
            full = len(self._cache) >= 4  # query, key, value and output projections of one attention
            self._cache = {key: codes} if full else {**self._cache, key: codes}
        return codes

    def encode_input(
        self, x: Tensor, arrange: Arrange, *, save: bool, share: bool = True
    ) -> tuple[Codes, SavedInput | None]:
        """Encode ``arrange(x)``; return its codes (in a shared buffer), and what to keep for backward if ``save``."""
        share = share and self.format.one_code_for_all
        if save and share and (kept := self.recent.find(x, arrange)):
            if kept.history is not None:  # one tensor, one prediction
                self.histories["input"] = kept.history
            return self.restore_input(kept.saved, kept.shape), kept.saved
        values = arrange(x)
        codes, saved = self.format.encode_input(values, self, save=save)
        if self.measure:
            self.metrics["input_sqnr_db"] = sqnr_db(values, codes.dequantize())
        if saved is not None:
            self._count(saved.packed.nbytes + saved.scale.nbytes, x.numel() * 4)
            if share:
                self.recent.put(x, arrange, Kept(saved, values.shape, self.histories.get("input")))
        return codes, saved

    def _count(self, kept: int, full: int) -> None:
        """Add to the bytes kept since the last backward; activation checkpointing computes anew during it."""
        if torch._C._current_graph_task_id() != -1:
            return
        if self._counted:
            self.saved_bytes = self.saved_bytes_fp32 = 0
            self._counted = False
        self.saved_bytes += kept
        self.saved_bytes_fp32 += full

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Return the codes :meth:`encode_input` packed; the codes lie in a shared buffer."""
        return self.format.restore_input(saved, shape)

    def encode_grad(self, grad: Tensor) -> GradCodes:
        """Encode an output gradient."""
        self._counted = True
        codes = self.format.encode_grad(grad, self)
        if self.measure:
            self.metrics |= self.format.grad_figures(grad, codes.to_input, self)
        return codes

    def store(self, result: Tensor, role: str) -> Tensor:
        """Return what the method keeps of a product's result."""
        return self.format.store(result, role, self)
