"""FSDP2 and DeepSpeed's ZeRO carry the precision methods: the numbers of DDP, exact resume, one verdict, undone after.

Everything here runs on a CPU harness: gloo ranks on one machine, DeepSpeed with Lightning's checks for CUDA left out.
It shows that the numbers are right. It shows nothing about GPUs, NCCL, offloading or speed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_eff.errors import UnsupportedCombinationError
from lightning_eff.integration.graft import check_strategy, strategy_family
from lightning_eff.methods import METHODS
from lightning_eff.precision.layers.sharded import own_class, with_base
from tests.harness import run_ranks
from tests.harness.ranks import free_port
from tests.integration.conftest import ROOT, ROOTS
from tests.integration.sharded import fsdp2
from tests.integration.sharded.models import CONVERTED

SHARDED = [info.name for info in METHODS.values() if "fsdp2" in info.strategies]
DEEPSPEED_S = 300.0
long_deepspeed = [
    pytest.mark.long,
    pytest.mark.timeout(DEEPSPEED_S + 30),  # the first run builds DeepSpeed's communication operator
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed: pip install 'lightning-eff[deepspeed]' (no GPU needed)",
    ),
]
TWINS = {"block.up": "QuantLinear", "block.down": "QuantLinear", "block.relu": "QuantReLU", "alone": "QuantLinear",
         "mixer.conv": "QuantConv1d"}  # fmt: skip


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Same losses and same parameters, to the bit, of runs that went to their end."""
    assert one["error"] == other["error"] == ""
    assert len(one["losses"]) == len(other["losses"]) > 0
    return one["losses"] == other["losses"] and one["digest"] == other["digest"]


# ----------------------------------------------------------------------------------------------------------- FSDP2


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("precision", [*SHARDED, "luq4+bf16-mixed", "fp8+bf16-true"])
def test_fsdp2_trains_as_ddp_does(world_size: int, precision: str) -> None:
    for ddp, sharded in run_ranks(fsdp2.both, world_size, precision, limit_val_batches=2, init_group=False):
        assert equal(ddp, sharded)
        assert ddp["val_losses"] == sharded["val_losses"]
        assert ddp["calls"] == sharded["calls"]
        assert ddp["seen"] == TWINS
        assert sharded["seen"] == TWINS | {"alone": "QuantFSDPLinear"}
        assert sharded["after"] == CONVERTED | {"alone": "FSDPLinear"}  # what fully_shard had made of it


def test_fsdp2_differs_from_plain_training() -> None:
    """Negative control of the comparison above."""
    ((_, plain),) = run_ranks(fsdp2.both, 1, "32-true", init_group=False)
    ((_, quantised),) = run_ranks(fsdp2.both, 1, "luq4", init_group=False)
    assert not equal(plain, quantised)


def test_fsdp2_accumulates_as_one_device_does() -> None:
    ((one, sharded),) = run_ranks(fsdp2.both, 1, "luq4", accumulate_grad_batches=2, init_group=False)
    assert equal(one, sharded)


@pytest.mark.parametrize("distributed_checkpoint", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("precision", "options", "at"),
    [("luq4", {"hindsight": 0.5}, 3), ("luq4", {"hindsight": 0.5}, 4), ("fp8-delayed", {}, 3), ("fp6-fit", {}, 3)],
)
def test_fsdp2_resumes_to_the_same_bits(
    tmp_path: Path, precision: str, options: dict[str, Any], at: int, distributed_checkpoint: bool
) -> None:
    results = run_ranks(
        fsdp2.cut_and_resume, 2, str(tmp_path / "cut.ckpt"), at, precision=precision, options=options,
        distributed_checkpoint=distributed_checkpoint, init_group=False,
    )  # fmt: skip
    for whole, continued in results:
        assert equal({**whole, "losses": whole["losses"][at:]}, continued)
        assert len(continued["losses"]) == 8 - at


@pytest.mark.parametrize("narrow", [True, False])
def test_fsdp2_a_nan_on_one_rank_stops_both(narrow: bool) -> None:
    """``narrow``: the only NaN lies in a shard of rank 0, where rank 1 has none."""
    clean = run_ranks(fsdp2.fit, 2, "fsdp2", precision="luq4", max_steps=2, init_group=False)
    stopped = run_ranks(fsdp2.fit, 2, "fsdp2", precision="luq4", poison=(1, 2), narrow=narrow, init_group=False)
    for rank, (before, after) in enumerate(zip(clean, stopped, strict=True)):
        assert f"optimizer step 2 (rank {rank})" in after["error"]
        assert "in 1 " in after["error"] or not narrow
        assert "net.gain" in after["error"]
        assert after["digest"] == before["digest"]  # no parameter was changed
        assert after["after"] == CONVERTED | {"alone": "FSDPLinear"}


@pytest.mark.parametrize("method", ["luq4", "fp8-fit"])
def test_fabric_shards_after_conversion(method: str) -> None:
    ddp = run_ranks(fsdp2.fabric, 2, "ddp", method, init_group=False)
    sharded = run_ranks(fsdp2.fabric, 2, "fsdp2", method, init_group=False)
    broken = run_ranks(fsdp2.fabric, 2, "fsdp2", method, 1, init_group=False)
    for rank in range(2):
        assert equal(ddp[rank], sharded[rank])
        assert sharded[rank]["seen"] == TWINS | {"alone": "QuantFSDPLinear"}
        assert sharded[rank]["after"] == CONVERTED | {"alone": "FSDPLinear"}
        assert f"optimizer step 2 (rank {rank})" in broken[rank]["error"]


def test_a_layer_split_by_tensor_parallelism_is_left_alone() -> None:
    for reasons in run_ranks(fsdp2.tensor_parallel, 2):
        assert "DTensor that fully_shard does not make whole" in reasons["alone"]
        assert reasons["block.up"] == ""


def test_classes_around_a_layer_stay_around_it() -> None:
    class FSDPModule:
        pass

    class ReplicateModule(FSDPModule):
        pass

    class Twin(nn.Linear):
        pass

    for wrapper in (FSDPModule, ReplicateModule):
        kind = type("FSDPLinear", (wrapper, nn.Linear), {"__deepcopy__": lambda self, memo: None})
        assert own_class(kind) is nn.Linear
        twin = with_base(kind, nn.Linear, Twin)
        assert twin.__name__ == "FSDPLinear"
        assert twin.__bases__ == (wrapper, Twin)
        assert twin.__dict__["__deepcopy__"] is kind.__dict__["__deepcopy__"]
        assert with_base(twin, Twin, nn.Linear).__bases__ == kind.__bases__
        assert with_base(kind, Twin, nn.Linear) is kind
    assert own_class(Twin) is Twin
    assert with_base(nn.Linear, nn.Linear, Twin) is Twin


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("method", ["luq4", "fp8"])
def test_what_is_admitted_and_what_is_not(root: str, method: str) -> None:
    for home in (root, ROOTS[root]):
        strategies = importlib.import_module(f"{home}.strategies")
        arguments: dict[str, Any] = {} if home == root else {"parallelize_fn": lambda net, mesh: net}
        parallel = strategies.ModelParallelStrategy
        check_strategy(METHODS[method], parallel(data_parallel_size=2, tensor_parallel_size=1, **arguments))
        for sizes in ({}, {"tensor_parallel_size": 2}, {"data_parallel_size": 2}):
            with pytest.raises(UnsupportedCombinationError, match=r"'model_parallel'\).*tensor_parallel_size=1"):
                check_strategy(METHODS[method], parallel(**sizes, **arguments))
        with pytest.raises(UnsupportedCombinationError, match=r"FSDPStrategy \(family 'fsdp'\).*ModelParallelStrategy"):
            check_strategy(METHODS[method], object.__new__(strategies.FSDPStrategy))
        deepspeed = object.__new__(strategies.DeepSpeedStrategy)  # its constructor needs the package
        assert strategy_family(deepspeed) == ("deepspeed" if home == root else "fabric_deepspeed")
        if home == root:
            check_strategy(METHODS[method], deepspeed)
        else:
            with pytest.raises(UnsupportedCombinationError, match="Fabric steps.*Trainer"):
                check_strategy(METHODS[method], deepspeed)


@pytest.mark.parametrize("method", ["bf16-sr", "bf16-kahan", "bf16-split"])
def test_methods_of_the_optimizer_are_refused(method: str) -> None:
    strategies = importlib.import_module("lightning.pytorch.strategies")
    for strategy in (strategies.ModelParallelStrategy(1, 1), object.__new__(strategies.DeepSpeedStrategy)):
        with pytest.raises(UnsupportedCombinationError, match="use strategy='ddp'"):
            check_strategy(METHODS[method], strategy)


# -------------------------------------------------------------------------------------------------------- DeepSpeed


def zero(folder: Path, world_size: int, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Reports of ``cases`` (stage -1 is DDP) by rank, each rank in a process of its own."""
    command = [sys.executable, "-m", "tests.integration.sharded.zero", json.dumps(cases)]
    size, port = str(world_size), str(free_port())
    common = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
              "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0",
              "TORCHELASTIC_RUN_ID": "tests"}  # fmt: skip
    outputs = [(folder / f"out-{rank}.txt", folder / f"err-{rank}.txt") for rank in range(world_size)]
    with contextlib.ExitStack() as stack:
        started = [
            subprocess.Popen(
                command,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=stack.enter_context(out.open("w")),  # no pipes: a rank that fills one stops its peers
                stderr=stack.enter_context(err.open("w")),
            )
            for rank, (out, err) in enumerate(outputs)
        ]
        for process in started:
            stack.callback(process.wait)
            stack.callback(process.kill)
        codes = [process.wait(timeout=DEEPSPEED_S) for process in started]
    assert codes == [0] * world_size, "\n".join(err.read_text()[-3000:] for _, err in outputs)
    reports = [
        [json.loads(line) for line in out.read_text().splitlines() if line.startswith("{")] for out, _ in outputs
    ]
    assert all(len(report) == len(cases) for report in reports)
    return reports


class TestDeepSpeed:
    pytestmark = long_deepspeed

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_zero_trains_as_ddp_does(self, tmp_path: Path, world_size: int) -> None:
        stages, precisions = (-1, 0, 1, 2, 3), SHARDED
        cases = [dict(stage=s, precision=p, limit_val_batches=2) for p in precisions for s in stages]
        for reports in zero(tmp_path, world_size, cases):
            for first in range(0, len(cases), len(stages)):
                ddp, *sharded = reports[first : first + len(stages)]
                for run in sharded:
                    assert equal(ddp, run)
                    assert run["val_losses"] == ddp["val_losses"]
                    assert run["calls"] == ddp["calls"]
                    assert "DeepSpeedPrecision" in run["plugin"]
                    assert run["seen"] == TWINS
                    assert run["after"] == CONVERTED

    def test_zero_has_one_answer_in_bfloat16(self, tmp_path: Path) -> None:
        """DeepSpeed's bf16 keeps float32 masters of bfloat16 weights, which is neither of Lightning's two."""
        precisions = ("luq4+bf16-mixed", "fp8+bf16-true")
        for reports in zero(tmp_path, 2, [dict(stage=s, precision=p) for p in precisions for s in (1, 2, 3)]):
            for first in (0, 3):
                assert equal(reports[first], reports[first + 1])
                assert equal(reports[first], reports[first + 2])
                assert reports[first]["losses"][-1] < reports[first]["losses"][0]

    def test_a_model_made_in_shards(self, tmp_path: Path) -> None:
        """``configure_model`` of stage 3 makes parameters of which each rank has a part when they are converted."""
        for whole, shards in zero(tmp_path, 2, [dict(stage=s, precision="luq4", late=True) for s in (-1, 3)]):
            assert equal(whole, shards)
            assert shards["seen"] == TWINS

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_attention(self, tmp_path: Path, world_size: int) -> None:
        """Stage 3 projects query, key and value apart, in float32 as here: equal up to the order of sums."""
        cases = [dict(stage=s, precision="fp8", attention=True) for s in (-1, 1, 2, 3)]
        for ddp, one, two, three in zero(tmp_path, world_size, cases):
            assert equal(ddp, one)
            assert equal(ddp, two)
            assert ddp["parameters"] == pytest.approx(three["parameters"], abs=1e-6)
            assert three["seen"]["mixer.attention"] == "QuantMultiheadAttention"
            assert three["after"]["mixer.attention"] == "MultiheadAttention"

    def test_accumulation(self, tmp_path: Path) -> None:
        """Lightning and DeepSpeed both divide the loss by the micro-batches; twice the learning rate makes up for it.

        Weight codes are made anew, and the gradient is looked at, in optimizer steps only.
        """
        cases = [dict(stage=s, precision="luq4", accumulate_grad_batches=2, lr=0.125) for s in (1, 2, 3)]
        ((ddp, *sharded),) = zero(tmp_path, 1, [{**cases[0], "stage": -1, "lr": 0.0625}, *cases])
        assert all(equal(ddp, run) for run in sharded)

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_resume_to_the_same_bits(self, tmp_path: Path, world_size: int) -> None:
        cases = []
        for stage in (1, 2, 3):
            common = dict(stage=stage, precision="luq4", options={"hindsight": 0.5})
            path = str(tmp_path / f"stage-{stage}")
            cases += [dict(**common, save=path, at=3), dict(**common, resume=path)]
        for reports in zero(tmp_path, world_size, cases):
            for whole, continued in zip(reports[::2], reports[1::2], strict=True):
                assert equal({**whole, "losses": whole["losses"][3:]}, continued)
                assert len(continued["losses"]) == 5

    @pytest.mark.parametrize("precision", ["luq4", "luq4+bf16-mixed"])
    def test_a_nan_on_one_rank_stops_both(self, tmp_path: Path, precision: str) -> None:
        cases: list[dict[str, Any]] = []
        for stage in (1, 2, 3):
            common = dict(stage=stage, precision=precision)
            cases += [dict(**common, max_steps=2), dict(**common, poison=[1, 2], narrow=True),
                      dict(**common, poison=[1, 2])]  # fmt: skip
        for rank, reports in enumerate(zero(tmp_path, 2, cases)):
            for clean, narrow, wide in zip(reports[::3], reports[1::3], reports[2::3], strict=True):
                for stopped in (narrow, wide):
                    assert f"optimizer step 2 (rank {rank})" in stopped["error"]
                    assert "net.gain" in stopped["error"]
                    assert stopped["digest"] == clean["digest"]  # no parameter was changed
                    assert stopped["after"] == CONVERTED
                assert "net.block.up.weight" in wide["error"]
                assert "net.block.up.weight" not in narrow["error"]
