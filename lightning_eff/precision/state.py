"""What one converted layer knows: its formats, cached weight codes, rounding stream and sampled figures."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_eff.functional import hindsight_max, saturated_share, sqnr_db, zero_share
from lightning_eff.functional.formats import Codes
from lightning_eff.functional.random import rank_seed
from lightning_eff.kernels.capability import native_int8
from lightning_eff.kernels.products import scratch
from lightning_eff.kernels.quantize import fingerprint, largest_magnitude, luq_codes, sawb_encode, unpack_int4
from lightning_eff.precision.config import LUQConfig

_MASK64 = (1 << 64) - 1


class SeedStream:
    """Seeds of the gradient rounding: a counter hashed with the run's seed, so that two integers resume it exactly.

    It starts from ``torch.initial_seed()`` at first use, without drawing: the user's dropout masks and shuffles are
    those of the run without the method.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.calls = 0

    def next(self) -> int:
        """The next 64-bit seed (splitmix64 of the counter), different on every rank."""
        if self.seed is None:
            self.seed = torch.initial_seed() & _MASK64
        self.calls += 1
        z = (self.seed + self.calls * 0x9E3779B97F4A7C15) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        return rank_seed(z ^ (z >> 31))


class SavedInput(NamedTuple):
    """A layer's input as kept for backward: INT4 codes two to a byte, and (scale, 1 if unsigned)."""

    packed: Tensor
    scale: Tensor


Arrange = Callable[[Tensor], Tensor]


class RecentInputs:
    """The last inputs that were encoded for backward: layers that share an input share its codes.

    Query, key and value projections read one tensor, as do the two branches of a residual block; float32 keeps it once,
    so the packed codes are kept, and made, once too. The inputs themselves are not kept alive.
    """

    CAPACITY = 3
    """A residual block reads its input, then something else, then its input again for the shortcut."""

    def __init__(self) -> None:
        self._entries: list[tuple[weakref.ref[Tensor], tuple[Any, ...], SavedInput, torch.Size]] = []

    @staticmethod
    def _key(x: Tensor, arrange: Arrange) -> tuple[Any, ...]:
        return (x._version, x.data_ptr(), x.shape, x.stride(), x.dtype, arrange, fingerprint(x))

    def find(self, x: Tensor, arrange: Arrange) -> tuple[SavedInput, torch.Size] | None:
        """What was kept for ``arrange(x)``, if it is there and ``x`` has not been written to since."""
        for tensor, key, saved, shape in self._entries:
            if tensor() is x and key == self._key(x, arrange):
                return saved, shape
        return None

    def put(self, x: Tensor, arrange: Arrange, saved: SavedInput, shape: torch.Size) -> None:
        """Remember what was kept for ``arrange(x)``, in place of the oldest."""
        entry = (weakref.ref(x), self._key(x, arrange), saved, shape)
        self._entries = [entry, *self._entries[: self.CAPACITY - 1]]

    def clear(self) -> None:
        """Forget all, and let the codes go."""
        self._entries = []


_STATES: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def state_of(handle: Tensor) -> LayerState:
    """The state behind a handle tensor; how compiled graphs, which carry tensors alone, find their layer."""
    return _STATES[int(handle)]


class LayerState:
    """Formats, caches and figures of one converted layer.

    Args:
        name: the layer's qualified name.
        config: options of the method.
        seeds: the stream all layers of a model share.
        recent: the memory of the last input all layers of a model share.
    """

    def __init__(self, name: str, config: LUQConfig, seeds: SeedStream, recent: RecentInputs | None = None) -> None:
        self.name, self.config, self.seeds = name, config, seeds
        self.recent = RecentInputs() if recent is None else recent
        self.weights_only = False
        self.measure = False
        self.metrics: dict[str, Tensor] = {}
        self.saved_bytes = self.saved_bytes_fp32 = 0
        self._counted = False
        self.hindsight = torch.full((), torch.nan)
        self._cache: dict[tuple[Any, ...], Codes] = {}
        self._register()

    def _register(self) -> None:
        self.handle = torch.tensor(next(_NUMBERS))
        _STATES[int(self.handle)] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "handle": None, "recent": RecentInputs()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def native(self, device: torch.device) -> bool:
        """Whether this layer's products run on int8 units."""
        if self.config.levels > 7 or self.config.products == "emulated":
            return False
        return self.config.products == "native" or native_int8(device)

    def invalidate(self) -> None:
        """Forget the weight codes: the weights have changed or may have."""
        self._cache.clear()
        self.recent.clear()

    def encode_weight(self, weight: Tensor, *, cached: bool = True, arrange: Arrange | None = None) -> Codes:
        """INT4 codes of ``weight``, rearranged by ``arrange``, made once per optimizer step.

        The key holds the version counter and a sampled fingerprint: writes through ``.data`` do not move the former.
        """
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, fingerprint(weight))
        if not cached or (codes := self._cache.get(key)) is None:
            codes = sawb_encode(weight.detach())[0]
            if self.measure:
                self.metrics["weight_sqnr_db"] = sqnr_db(weight, codes.dequantize())
            codes = codes if arrange is None else Codes(arrange(codes.codes).contiguous(), codes.scale)
            if cached:
                full = len(self._cache) >= 4  # query, key, value and output projections of one attention
                self._cache = {key: codes} if full else {**self._cache, key: codes}
        return codes

    def encode_input(
        self, x: Tensor, arrange: Arrange, *, save: bool, cached: bool = True
    ) -> tuple[Codes, SavedInput | None]:
        """INT4 codes of ``arrange(x)`` (in a shared buffer), and what to keep for backward if ``save``."""
        unsigned = self.config.unsigned
        if save and cached and (kept := self.recent.find(x, arrange)):
            return self.restore_input(*kept), kept[0]
        values = arrange(x)
        buffer = scratch("input", x.numel(), torch.int8) if x.device.type == "cpu" else None
        codes, packed, is_unsigned = sawb_encode(values, unsigned=unsigned, pack=save, out=buffer)
        if self.measure:
            self.metrics["input_sqnr_db"] = sqnr_db(values, codes.dequantize())
        if packed is None:
            return codes, None
        self._count(packed.numel() + 8, x.numel() * 4)
        saved = SavedInput(packed, torch.stack([codes.scale, torch.full((), float(is_unsigned), device=x.device)]))
        if cached:
            self.recent.put(x, arrange, saved, values.shape)
        return codes, saved

    def _count(self, kept: int, full: int) -> None:
        """Add to the bytes kept since the last backward."""
        if self._counted:
            self.saved_bytes = self.saved_bytes_fp32 = 0
            self._counted = False
        self.saved_bytes += kept
        self.saved_bytes_fp32 += full

    def restore_input(self, saved: SavedInput, shape: Sequence[int]) -> Codes:
        """Undo the packing of :meth:`encode_input`; the codes lie in a shared buffer."""
        numel = math.prod(shape)
        buffer = scratch("input", numel, torch.int8) if saved.packed.device.type == "cpu" else None
        codes = unpack_int4(saved.packed, numel, unsigned=bool(saved.scale[1]), out=buffer)
        return Codes(codes.view(shape), saved.scale[0])

    def encode_grad(self, grad: Tensor) -> list[Codes]:
        """FP4 codes of an output gradient, one independent sample for each of ``config.samples``."""
        config, observed = self.config, None
        self._counted = True
        if config.hindsight is None or bool(self.hindsight.isnan()):
            largest = largest_magnitude(grad)
            observed = largest
        else:
            largest, observed = self.hindsight, torch.empty((), device=grad.device)
        samples = []
        for i in range(config.samples):
            buffer = scratch(f"grad{i}", grad.numel(), torch.int8) if grad.device.type == "cpu" else None
            codes = luq_codes(
                grad,
                levels=config.levels,
                max_abs=largest,
                power_of_two=config.power_of_two,
                rounding=config.gradient_rounding,
                seed=self.seeds.next(),
                out=buffer,
                observed=observed if largest is self.hindsight and i == 0 else None,
            )
            samples.append(codes)
        if largest is self.hindsight and not bool(observed.isfinite()):  # NaN must not pass as the top code
            samples = [Codes(codes.codes, torch.full_like(codes.scale, torch.nan)) for codes in samples]
        if config.hindsight is not None:
            self._observe(observed)
        if self.measure:
            self.metrics["grad_zeros"] = zero_share(samples[0].codes)
            self.metrics["grad_saturated"] = saturated_share(samples[0].codes, 2 ** (config.levels - 1))
        return samples

    def _observe(self, observed: Tensor) -> None:
        if bool(observed.isfinite()):  # a broken step must not poison the estimate for good
            self.hindsight = hindsight_max(
                self.hindsight.to(observed.device), observed, momentum=self.config.hindsight or 0.0
            )
