"""Fast paths with the signatures and the numbers of ``functional``: C++ quantisers and exact integer products.

Everything falls back to ``functional`` where the compiled code is not available, and says so once.
"""

from lightning_eff.kernels.capability import describe, native_int8
from lightning_eff.kernels.quantize import luq_codes, luq_quantize, sawb_codes, sawb_quantize

__all__ = ["describe", "luq_codes", "luq_quantize", "native_int8", "sawb_codes", "sawb_quantize"]
