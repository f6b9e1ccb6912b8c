"""Run by ``benchmarks.compile_time`` in a fresh interpreter: time of the import and of the first two steps, as JSON."""

from __future__ import annotations

import json
import sys
import time


def main(model: str, variant: str, tiny: bool) -> dict[str, float]:
    """Return seconds of wall time."""
    from benchmarks._setup import training_step
    from benchmarks._workloads import workload

    work = workload(model, tiny=tiny)
    begin = time.perf_counter()
    import lightning_eff  # noqa: F401

    imported = time.perf_counter()
    step = training_step(variant, work)
    step()
    first = time.perf_counter()
    step()
    second = time.perf_counter()
    return {"import_s": imported - begin, "first_step_s": first - imported, "second_step_s": second - first}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3] == "tiny")))
