"""Computed samples per second of ``strategy="dropcompute"`` and of its peers, all hit by the same delays.

Real gloo ranks, and a micro-batch that sleeps: ``--micro-batch-ms``, and longer by a delay that is a function of step,
rank and micro-batch alone, so that every strategy meets the same stragglers. Strategies take turns, in blocks of
``--steps`` timed optimizer steps. The figure is seconds per computed sample relative to stock DistributedDataParallel,
smaller is better; samples per second are the column beside it. Peers:

    ddp               Lightning's DDPStrategy, with a broadcast from rank 0 before every micro-batch
    ddp, one look     the same with one such broadcast per step, as ours has it
    local-sgd         post-local SGD, parameters averaged every fourth step; Lightning registers its hook on CUDA alone,
                      here it is registered by hand
    local-sgd, ...    with one broadcast per averaging

The threshold comes from steps that are not timed again, by what ``threshold="auto"`` uses. The prediction comes from
the micro-batch times recorded in the turns of ``dropcompute, inf``, which drops nothing; for stock DDP it takes in who
waits for whom in the broadcasts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook

from benchmarks._ranks import launch
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._stats import ratio, spread
from lightning_eff.functional.stragglers.model import best_threshold, predicted
from lightning_eff.functional.stragglers.simulated import parse_delay
from lightning_eff.functional.stragglers.threshold import Timings
from lightning_eff.functional.stragglers.timings import read_timings
from lightning_eff.integration.loop import look_for_sigterm_once_per_window

PERIOD = 4
"""Steps between two averagings of local SGD."""
UNTIMED = 5
"""Steps at the beginning of a block that do not sleep; as many as ``dropcompute`` leaves out of what it records."""
WIDTH = 512
"""Of the one linear layer, whose gradient is 1 MiB."""
BASE, ONE_LOOK, PLAIN, OURS = "ddp", "ddp, one look", "dropcompute, inf", "dropcompute"
VARIANTS = (BASE, ONE_LOOK, "local-sgd", "local-sgd, one look", PLAIN, OURS)
TARGETS = {"none": 1.01, "lognormal": 1 / 1.05, "stall": 1 / 1.33}
"""Noise -> largest accepted seconds per sample relative to stock DDP: 4 ranks, 8 micro-batches of 30 ms."""
OFF_BY = 1.05
"""Largest accepted ratio of measured and predicted speed-up, whichever is larger."""


@dataclass
class Block:
    """One turn of one strategy, all ranks together.

    Attributes:
        seconds: of the timed steps, on the slowest rank.
        computed: micro-batches of the timed steps.
        recorded: micro-batch times, where they were recorded.
    """

    seconds: float
    computed: int
    recorded: Timings | None = None

    @property
    def per_sample(self) -> float:
        """Seconds per computed micro-batch."""
        return self.seconds / self.computed


@dataclass
class Result:
    """What was measured under one kind of noise."""

    noise: str
    threshold_s: float
    blocks: dict[str, list[Block]] = field(default_factory=dict)


class Sleeper(L.LightningModule):
    """One linear layer behind a sleep.

    Args:
        seconds: how long this rank sleeps, in every micro-batch of every step.
    """

    def __init__(self, seconds: list[list[float]]) -> None:
        super().__init__()
        self.net = nn.Linear(WIDTH, WIDTH)
        self.seconds, self.computed, self.ends = seconds, [0] * len(seconds), list[float]()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Sleep, then compute the little there is."""
        times = self.seconds[self.trainer.global_step]
        time.sleep(times[batch_idx % len(times)])
        self.computed[self.trainer.global_step] += 1
        return self.net(batch[0]).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note when a step has ended."""
        if self.trainer.global_step > len(self.ends):
            self.ends.append(time.perf_counter())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class LocalSGDStrategy(DDPStrategy):
    """Post-local SGD, with its hook: without it gradients are averaged in every step as well."""

    def __init__(self) -> None:
        state = PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)
        super().__init__(process_group_backend="gloo", ddp_comm_state=state, model_averaging_period=PERIOD)

    def configure_ddp(self) -> None:
        """Wrap, and register the hook whatever the device."""
        super().configure_ddp()
        self.model.register_comm_hook(self._ddp_comm_state, post_localSGD_hook)  # type: ignore[union-attr, operator]


def _strategy(variant: str, threshold_s: float, csv: Path, steps: int) -> DDPStrategy:
    from lightning_eff.strategies import DropComputeStrategy

    if variant.startswith("ddp"):
        return DDPStrategy(process_group_backend="gloo")
    if variant.startswith("local-sgd"):
        return LocalSGDStrategy()
    if variant == OURS:
        return DropComputeStrategy(threshold=threshold_s, process_group_backend="gloo")
    # One step more than is timed: the file is written when the last of them has ended.
    return DropComputeStrategy(
        threshold=math.inf, warmup_steps=steps + 1, record_timings=str(csv), process_group_backend="gloo"
    )


def _one_look(trainer: Any, micro_batches: int) -> None:
    """Let Lightning ask for SIGTERM once per averaging, right after it."""
    loop = trainer.fit_loop.epoch_loop
    ask = getattr(loop, "_broadcast_sigterm_tensor", lambda: None)

    def once() -> None:
        if loop.batch_progress.current.ready % (PERIOD * micro_batches) == micro_batches:
            ask()

    loop._broadcast_sigterm_tensor = once


def _block(variant: str, table: Tensor, threshold_s: float = math.inf) -> Block:
    """Train through ``table``, (steps, ranks, micro-batches), and return what all ranks took."""
    steps, _, micro_batches = table.shape
    whole = nn.functional.pad(table[:, dist.get_rank()], (0, 0, UNTIMED, 1))  # the step after the timed ones: no sleep
    module = Sleeper(whole.tolist())
    data = torch.utils.data.TensorDataset(torch.randn(len(whole) * micro_batches, WIDTH))
    with tempfile.TemporaryDirectory() as folder:
        csv = Path(folder) / "timings.csv"
        trainer = L.Trainer(
            strategy=_strategy(variant, threshold_s, csv, steps),
            accumulate_grad_batches=micro_batches,
            accelerator="cpu",
            devices=dist.get_world_size(),
            max_epochs=1,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if variant == ONE_LOOK:
            look_for_sigterm_once_per_window(trainer)
        if variant == "local-sgd, one look":
            _one_look(trainer, micro_batches)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=1))
        recorded = [read_timings(csv) if csv.exists() else None]
        dist.broadcast_object_list(recorded)
    own = module.ends[UNTIMED + steps - 1] - module.ends[UNTIMED - 1], sum(module.computed[UNTIMED : UNTIMED + steps])
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    times = recorded[0] and Timings(recorded[0].table[:steps], recorded[0].other[:steps])
    return Block(max(seconds for seconds, _ in every), sum(computed for _, computed in every), times)


def _measure(options: argparse.Namespace) -> Iterator[Result]:
    """On every rank: for each noise, find the threshold, then let the strategies take turns."""
    shape, base_s = (options.ranks, options.micro_batches), options.micro_batch_ms / 1000
    for noise in options.noise.split(","):
        delay = parse_delay("stall:p=0" if noise == "none" else noise)
        first = _block(PLAIN, delay.table(options.record_steps, *shape, base_s=base_s, first_step=1_000_000)).recorded
        tau = best_threshold(*first, max_drop_rate=0.1) if first else math.inf
        result = Result(noise, tau, {variant: [] for variant in VARIANTS})
        for turn in range(options.rounds):
            table = delay.table(options.steps, *shape, base_s=base_s, first_step=turn * options.steps)
            start = turn % len(VARIANTS)
            for variant in VARIANTS[start:] + VARIANTS[:start]:
                result.blocks[variant].append(_block(variant, table, tau))
        yield result


def _after_look(reached: Tensor) -> Tensor:
    """When the ranks come out of a broadcast from rank 0 that they reach at ``reached``; (steps, ranks).

    Gloo passes it on along a binomial tree, and who sends waits until the other has reached the broadcast too.
    """
    world = reached.shape[1]
    rounds = range((world - 1).bit_length())
    edges = [(n, n + 2**i) for i in rounds for n in range(min(2**i, world - 2**i))]
    received = reached.clone()
    for parent, child in edges:
        received[:, child] = torch.maximum(received[:, child], received[:, parent])
    done = received.clone()
    for parent, child in edges:
        done[:, parent] = torch.maximum(done[:, parent], reached[:, child])
    return done


def _stock_times(times: Timings) -> Tensor:
    """Seconds of every step of stock DDP, which looks for SIGTERM before every micro-batch."""
    end = torch.zeros_like(times.table[..., 0])
    for m in range(times.table.shape[-1]):
        end = _after_look(end) + times.table[..., m]
    return end.amax(1) + times.other


def _predict(times: Timings, threshold_s: float) -> dict[str, float]:
    """Speed-up in computed samples per second over each base, from the times of a run that drops nothing."""
    ours = predicted(*times, threshold_s)
    stock_s = float(_stock_times(times).mean())
    return {PLAIN: ours.speedup, ONE_LOOK: ours.speedup, BASE: (1 - ours.drop_rate) * stock_s / ours.step_s}


def add_rows(report: Report, result: Result, options: argparse.Namespace) -> None:
    """Add a row per strategy and three for the prediction."""
    at_size = (options.ranks, options.micro_batches, options.micro_batch_ms) == (4, 8, 30.0) and not options.tiny
    per_sample = {name: [block.per_sample for block in blocks] for name, blocks in result.blocks.items()}
    offered = options.steps * options.ranks * options.micro_batches
    for name, blocks in result.blocks.items():
        value = ratio(per_sample[name], per_sample[BASE])
        dropped = 1 - sum(block.computed for block in blocks) / (offered * len(blocks))
        settings: dict[str, str | int] = {"noise": result.noise, "tau ms": ""}
        if name == OURS:
            settings["tau ms"] = f"{1000 * result.threshold_s:.0f}" if math.isfinite(result.threshold_s) else "inf"
        settings |= {"dropped": f"{dropped:.1%}", "speed-up in samples/s": f"{1 / value.median:.3f}x"}
        details = {"step_ms": [1000 * block.seconds / options.steps for block in blocks], "drop_rate": dropped}
        target = TARGETS.get(result.noise) if name == OURS and at_size else None
        report.add(Row(settings, f"{name} / {BASE}", value, target=target, details=details))
    recorded = [block.recorded for block in result.blocks[PLAIN] if block.recorded]
    for base in (BASE, ONE_LOOK, PLAIN):
        expected = [_predict(times, result.threshold_s)[base] for times in recorded]
        found = [b / o for b, o in zip(per_sample[base], per_sample[OURS], strict=True)]
        off = spread([max(f / e, e / f) for f, e in zip(found, expected, strict=True)])
        figures = f"{spread(found).median:.3f}x, predicted {spread(expected).median:.3f}x"
        settings = {"noise": result.noise, "speed-up in samples/s": figures}
        details = {"measured": found, "predicted": expected}
        pair = f"measured / predicted, over {base}"
        report.add(Row(settings, pair, off, target=OFF_BY if at_size else None, details=details))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dropcompute", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--noise", default="none,stall,lognormal", help=f"comma-separated, of {', '.join(TARGETS)}")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8, help="per rank and optimizer step")
    parser.add_argument("--micro-batch-ms", type=float, default=30.0, help="how long one sleeps; below 20 is noise")
    parser.add_argument("--steps", type=int, default=16, help=f"timed per turn, a multiple of {PERIOD}, 8 or more")
    parser.add_argument("--record-steps", type=int, default=45, help="steps the threshold is found in, 8 or more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes for testing the benchmark itself")
    add_common_arguments(parser)
    options = parser.parse_args(argv)
    if options.tiny:
        options.ranks, options.micro_batches, options.micro_batch_ms = 2, 4, 2.0
        options.steps = options.record_steps = 8
    if unknown := set(options.noise.split(",")) - set(TARGETS):
        parser.error(f"unknown noise {sorted(unknown)}; known: {', '.join(TARGETS)}")
    if options.steps % PERIOD or min(options.steps, options.record_steps) < 8:
        parser.error(f"--steps is a multiple of {PERIOD}, and neither it nor --record-steps is below 8")
    if options.device != "cpu":
        parser.error("the ranks sleep and talk gloo: --device cpu only")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    options = parse(argv)
    report = Report("dropcompute", ("noise", "tau ms", "dropped", "speed-up in samples/s"))
    for result in launch(_measure, options.ranks, options):
        add_rows(report, result, options)
    return report.finish(options)


if __name__ == "__main__":
    raise SystemExit(main())
