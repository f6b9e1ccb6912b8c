"""Seconds per sample of ``strategy="pipelined_bp"`` and of synchronous pipelines, relative to one process.

Real gloo ranks, one per stage. With ``--compute sleep`` a stage sleeps ``--ms-per-sample`` in its forward pass and
twice that in its backward pass, so that stages do not compete for cores; besides that it has one small linear layer,
whose outputs travel. With ``--compute real`` (two stages only) it is six large linear layers, one thread per rank, and
nothing sleeps. Variants take turns; smaller is better, and the speed-up is the column beside it:

    pipelined_bp      through Lightning's Trainer, an update per micro-batch, mitigation "lwp+sc"; relative to one
                      process, strategy "auto", with batches as small
    GPipe, 1F1B       torch.distributed.pipelining in a plain loop, an update per batch of 64; relative to one process
                      through the Trainer with batches of 64

The clock is wall time on rank 0, from the end of the last untimed step to the end of the last timed one. Not timed: the
first steps and those in which a pipeline fills, and as many at the end as it takes to drain. "with flush" is the
speed-up that no synchronous pipeline exceeds with micro-batches of that size, S m / (m + S - 1), m of them in a batch
of 64. The overhead of a tick is what an update takes beyond what one stage sleeps for one micro-batch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from benchmarks._ranks import launch
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._stats import ratio, spread
from lightning_eff.functional.staleness.schedule import flush_bubble

BATCH = 64
"""Samples of a synchronous pipeline's update."""
CLASSES = 10
FIRST = 4
"""Steps at the beginning that are not timed, besides those in which a pipeline fills."""
SPIN_S = 2e-4
"""A sleep ends late by less than this; the end of it is spent looking at the clock."""
ONE, OURS, GPIPE, ONE_F_ONE_B = "one process", "pipelined_bp", "GPipe", "1F1B"
SCHEDULES = {GPIPE: ScheduleGPipe, ONE_F_ONE_B: Schedule1F1B}
SIZE = 16
"""The micro-batch size at which targets are set and samples in flight are varied."""
BEST_OF = 8
"""Micro-batches per batch of the synchronous pipelines that ours is compared with."""
REAL_SIZES = (16, 32, 64)
TARGET = 1 / 1.80
"""Largest accepted seconds per sample relative to one process: two stages, micro-batches of 16, 0.5 ms per sample."""
TARGET_SYNCHRONOUS = 1 / 1.12
"""The same relative to the better of GPipe and 1F1B, all three by their speed-ups over one process."""
TARGET_TICK_MS = 2.0
"""Largest accepted overhead of a tick."""


@dataclass(frozen=True)
class Work:
    """What is computed.

    Attributes:
        compute: "sleep" or "real".
        stages: as many as ranks.
        width: of the linear layers.
        depth: linear layers in a stage.
        sleep_s: seconds per sample that a stage's forward pass sleeps; its backward pass twice that.
    """

    compute: str
    stages: int
    width: int
    depth: int
    sleep_s: float


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        kind: one process, ours, or one of the schedules.
        samples: in a micro-batch.
        in_flight: of ours.
    """

    kind: str
    samples: int
    in_flight: int = 0

    @property
    def per_step(self) -> int:
        """Samples of an update."""
        return BATCH if self.kind in SCHEDULES else self.samples

    @property
    def micro_batches(self) -> int:
        """Of a batch of 64."""
        return BATCH // self.samples

    @property
    def base(self) -> Variant:
        """What it is compared with."""
        return Variant(ONE, self.per_step)

    def __str__(self) -> str:
        if self.kind in SCHEDULES:
            return f"{self.kind}, m={self.micro_batches}"
        return f"{self.kind}, {self.in_flight} in flight" if self.in_flight else self.kind


CENTRE = Variant(OURS, SIZE, 2)
"""Ours, as it is meant to be used."""


@dataclass
class Turn:
    """One turn of one variant: seconds per sample, and what the strategy logged meanwhile."""

    per_sample: float
    utilisation: float | None = None


@dataclass
class Result:
    """Every variant's turns."""

    work: Work
    turns: dict[Variant, list[Turn]] = field(default_factory=dict)


def _wait(seconds: float) -> None:
    """Sleep for exactly that long."""
    end = time.perf_counter() + seconds
    if seconds > SPIN_S:
        time.sleep(seconds - SPIN_S)
    while time.perf_counter() < end:
        pass


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, per_sample: float) -> Tensor:
        ctx.seconds = 2 * per_sample * len(x)
        _wait(per_sample * len(x))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _wait(ctx.seconds)
        return grad.clone(), None


class Stage(nn.Module):
    """What one rank computes: a layer of the stack, so that the cut is where it has to be."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(work.width, work.width), nn.ReLU()) for _ in range(work.depth)]
        self.layers, self.sleep_s = nn.Sequential(*layers), work.sleep_s

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return _Sleep.apply(x, self.sleep_s) if self.sleep_s else x


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)


class Module(L.LightningModule):
    """All stages and a head, which notes when its steps end."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Stage(work) for _ in range(work.stages)))
        self.head = nn.Linear(work.width, CLASSES)
        self.ends: list[float] = []
        self.utilisation: dict[int, float] = {}
        self._seen: Any = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time, and what the strategy has logged in this step."""
        self.ends.append(time.perf_counter())
        metrics = getattr(self.trainer.strategy, "metrics", None)
        if metrics and metrics is not self._seen:
            self._seen = metrics
            self.utilisation[len(self.ends)] = metrics["eff/pipelined_bp/utilisation"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return _optimizer(self)


def _loader(work: Work, samples: int, steps: int) -> torch.utils.data.DataLoader[Any]:
    x, y = torch.randn(samples * steps, work.width), torch.randint(0, CLASSES, (samples * steps,))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=samples)


def _with_trainer(variant: Variant, work: Work, steps: int, log_every: int) -> Module:
    """Train for ``steps`` steps through Lightning."""
    from lightning_eff.strategies import PipelinedBPStrategy

    module, alone = Module(work), variant.kind == ONE
    ours = {"mitigation": "lwp+sc", "in_flight": variant.in_flight, "schedule_picture": False}
    trainer = L.Trainer(
        strategy="auto" if alone else PipelinedBPStrategy(**ours),
        accelerator="cpu",
        devices=1 if alone else work.stages,
        max_epochs=1,
        log_every_n_steps=log_every,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, _loader(work, variant.per_step, steps))
    return module


def _synchronous(variant: Variant, work: Work, steps: int) -> list[float]:
    """Train for ``steps`` batches with a schedule of torch's, and return when they ended."""
    rank, last = dist.get_rank(), work.stages - 1
    own = Stage(work) if rank < last else nn.Sequential(Stage(work), nn.Linear(work.width, CLASSES))
    stage = PipelineStage(own, rank, work.stages, torch.device("cpu"))
    schedule = SCHEDULES[variant.kind](stage, variant.micro_batches, loss_fn=nn.functional.cross_entropy)
    optimizer, ends = _optimizer(own), []
    for x, y in _loader(work, variant.per_step, steps):
        optimizer.zero_grad()
        schedule.step(*([x] if rank == 0 else []), target=y if rank == last else None)
        optimizer.step()
        ends.append(time.perf_counter())
    return ends


def _turn(variant: Variant, work: Work, steps: int) -> Turn:
    """Train, and return what ``steps`` steps took; on all ranks, of which one may have nothing to do."""
    torch.manual_seed(0)
    ahead = variant.in_flight * (work.stages - 1)
    start, whole = FIRST + ahead, FIRST + steps + 2 * ahead
    ends, logged = [0.0] * whole, dict[int, float]()
    if variant.kind in SCHEDULES:
        ends = _synchronous(variant, work, whole)
    elif variant.kind == OURS or dist.get_rank() == 0:
        log_every = max(1, steps // 2)  # one whole interval at least lies within the timed steps
        module = _with_trainer(variant, work, whole, log_every)
        ends = module.ends
        logged = {n: u for n, u in module.utilisation.items() if start + log_every <= n <= start + steps}
    dist.barrier()
    seconds = ends[start + steps - 1] - ends[start - 1]
    utilisation = statistics.mean(logged.values()) if logged else None
    return Turn(seconds / (steps * variant.per_step), utilisation)


def variants(work: Work, sizes: Sequence[int]) -> list[Variant]:
    """What takes turns, each after what it is compared with."""
    if work.compute == "real":
        ours = [Variant(OURS, samples, 2) for samples in sizes]
    elif work.stages > 2:
        ours = [CENTRE, Variant(ONE_F_ONE_B, BATCH // BEST_OF)]
    else:
        ours = [Variant(OURS, samples, 2) for samples in sizes]
        ours += [Variant(OURS, SIZE, in_flight) for in_flight in (1, 3) if SIZE in sizes]
        ours += [Variant(kind, BATCH // m) for kind in SCHEDULES for m in (2, 4, BEST_OF)]
    return list(dict.fromkeys(v for variant in ours for v in (variant.base, variant)))


def _measure(options: argparse.Namespace, stages: int) -> Iterator[Result]:
    """On every rank: let the variants take turns."""
    for compute in options.compute.split(","):
        if compute == "real" and stages > 2:
            continue
        width, depth = (256, 1) if compute == "sleep" else (1024, 6)
        sleep_s = options.ms_per_sample / 1000 if compute == "sleep" else 0.0
        work = Work(compute, stages, 16 if options.tiny else width, depth, sleep_s)
        every = variants(work, options.sizes if compute == "sleep" or options.tiny else REAL_SIZES)
        result = Result(work, {variant: [] for variant in every})
        for turn in range(options.rounds):
            first = turn % len(every)
            for variant in every[first:] + every[:first]:
                steps = max(4, options.steps * 16 // max(16, variant.per_step))
                result.turns[variant].append(_turn(variant, work, steps))
        yield result


def _per_sample(result: Result, variant: Variant) -> list[float]:
    return [turn.per_sample for turn in result.turns[variant]]


def _relative(result: Result, variant: Variant) -> list[float]:
    """Seconds per sample over those of one process, round by round."""
    own, base = _per_sample(result, variant), _per_sample(result, variant.base)
    return [a / b for a, b in zip(own, base, strict=True)]


def _settings(result: Result, variant: Variant) -> dict[str, str | int]:
    return {"compute": result.work.compute, "stages": result.work.stages, "samples": variant.samples}


def add_ratio(report: Report, result: Result, variant: Variant, *, at_size: bool) -> None:
    """Add how long a sample takes relative to one process."""
    value, stages = spread(_relative(result, variant)), result.work.stages
    utilisation = [turn.utilisation for turn in result.turns[variant] if turn.utilisation is not None]
    settings = _settings(result, variant) | {
        "speed-up": f"{1 / value.median:.3f}x",
        "with flush": f"{stages * (1 - flush_bubble(stages, variant.micro_batches)):.3f}x",
        "utilisation": f"{statistics.median(utilisation):.1%}" if utilisation else "",
    }
    step_ms = {
        str(timed): [1000 * timed.per_step * seconds for seconds in _per_sample(result, timed)]
        for timed in (variant, variant.base)
    }
    target = TARGET if at_size and variant == CENTRE else None
    details = {"step_ms": step_ms, "utilisation": utilisation}
    report.add(Row(settings, f"{variant} / {ONE}", value, target=target, details=details))


def add_against_synchronous(report: Report, result: Result, *, at_size: bool) -> None:
    """Add ours over the better of the synchronous pipelines, by their speed-ups over one process."""
    peers = [v for v in result.turns if v.kind in SCHEDULES and v.micro_batches == BEST_OF]
    if CENTRE not in result.turns or not peers:
        return
    best = min(peers, key=lambda peer: spread(_relative(result, peer)).median)
    value = ratio(_relative(result, CENTRE), _relative(result, best))
    settings = _settings(result, CENTRE) | {"speed-up": f"{1 / value.median:.3f}x"}
    report.add(Row(settings, f"{CENTRE} / {best}", value, target=TARGET_SYNCHRONOUS if at_size else None))


def add_overhead(report: Report, result: Result, variant: Variant, *, at_size: bool) -> None:
    """Add what an update takes beyond the sleeps: those of one stage, or of all where one process has them all."""
    sleeps = 3 * result.work.sleep_s * (result.work.stages if variant.kind == ONE else 1)
    value = spread([1000 * variant.samples * (seconds - sleeps) for seconds in _per_sample(result, variant)])
    target = TARGET_TICK_MS if at_size and variant == CENTRE else None
    report.add(Row(_settings(result, variant), f"{variant}: tick - sleeps", value, unit="ms", target=target))


def add_rows(report: Report, result: Result, options: argparse.Namespace) -> None:
    """Add a row per variant that is compared, ours over its peers, and what ticks take."""
    sleeps = result.work.compute == "sleep"
    at_size = sleeps and result.work.stages == 2 and options.ms_per_sample == 0.5 and not options.tiny
    for variant in result.turns:
        if variant.kind != ONE:
            add_ratio(report, result, variant, at_size=at_size)
    add_against_synchronous(report, result, at_size=at_size)
    for variant in result.turns:
        if sleeps and variant.kind in (ONE, OURS):
            add_overhead(report, result, variant, at_size=at_size)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipelined_bp", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compute", default="sleep,real", help="comma-separated: sleep, real")
    parser.add_argument("--stages", default="2", help="comma-separated; a rank each, and above 2 they only sleep")
    parser.add_argument("--sizes", default="4,8,16,32", help="of micro-batches that sleep, on two stages")
    parser.add_argument("--ms-per-sample", type=float, default=0.5, help="a stage's forward pass")
    parser.add_argument("--steps", type=int, default=40, help="timed per turn; fewer where a step has more than 16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    if options.tiny:
        options.sizes, options.ms_per_sample, options.steps = "16", 0.01, 4
    if unknown := set(options.compute.split(",")) - {"sleep", "real"}:
        parser.error(f"unknown compute {sorted(unknown)}; known: sleep, real")
    options.sizes = [int(size) for size in options.sizes.split(",")]
    options.stages = [int(stages) for stages in options.stages.split(",")]
    if any(BATCH % size for size in options.sizes) or min(options.stages) < 2:
        parser.error(f"--sizes divide {BATCH}, and --stages are 2 or more")
    if options.device != "cpu":
        parser.error("the ranks sleep and talk gloo: --device cpu only")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    options = parse(argv)
    report = Report("pipelined_bp", ("compute", "stages", "samples", "speed-up", "with flush", "utilisation"))
    for stages in options.stages:
        for result in launch(_measure, stages, options, stages):
            add_rows(report, result, options)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
