"""Number formats and what rounding to them does: LUQ, SAWB, FP8, small floats, shared exponents, bfloat16."""
