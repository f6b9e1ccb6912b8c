"""strategy="pipelined_bp" as users ask for it: strings, YAML, scripts; what it prints and logs; the data it gets."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import math
import random
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning.pytorch  # noqa: F401 - draws random numbers when it is imported: before any run
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_eff.methods import METHODS
from tests.harness import RanksFailedError, run_ranks
from tests.integration.conftest import reports, run_python
from tests.strategies.command_line import app_of
from tests.strategies.pipelined_bp.models import (
    BATCH,
    CUTS,
    NAMESPACES,
    SAMPLES,
    STEPS,
    bits,
    data,
    loader,
    outcome_of,
    strategy,
    task,
    trainer,
)

HOMES = {"lightning.pytorch": "lightning_eff.strategies", "pytorch_lightning": "lightning_eff.pytorch_lightning"}

# ---------------------------------------------------------------------------------------------------- strings and YAML


def _by_string(rank: int, world: int, root: str, folder: str) -> dict[str, Any]:
    """``Trainer(strategy="pipelined_bp")`` with everything that is usually on, in a folder of its own."""
    importlib.import_module("lightning_eff")
    pl = importlib.import_module(root)
    logger = importlib.import_module(f"{root}.loggers").CSVLogger(folder)
    rates = importlib.import_module(f"{root}.callbacks").LearningRateMonitor("step")
    options = {"enable_checkpointing": True, "logger": logger, "log_every_n_steps": 4, "callbacks": [rates]}
    run = trainer("pipelined_bp", root, devices=world, val_check_interval=1.0, **options)
    model = task(root, dropout=0.1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run.fit(model, loader(), loader(10, seed=2, shuffle=False))
    stack = run.strategy._engine.stack
    return {
        "kind": type(run.strategy).__name__,
        "is": isinstance(run.strategy, pl.strategies.DDPStrategy),
        "stack": (stack.name, len(stack)),
        "printed": printed.getvalue(),
        "state": bits(dict(model.state_dict())),
        "folder": run.log_dir,
        "world": run.world_size,
        "kept": run.checkpoint_callback.best_model_path,
    }


@pytest.mark.parametrize("root", NAMESPACES)
def test_the_string_is_enough(root: str, tmp_path: Path) -> None:
    """The only stack is found, and rank 0 alone says how it is cut and what came of it."""
    last, first = run_ranks(_by_string, 2, root, str(tmp_path), init_group=False)
    for found in (last, first):
        assert (found["kind"], found["is"], found["stack"]) == ("PipelinedBPStrategy", True, ("net", 6))
        assert found["world"] == 1, "one replica"
        assert Path(found["kept"]).exists()
    assert first["state"] == last["state"]
    assert first["printed"] == ""
    assert "6 layers of net in 2 stages" in last["printed"]
    assert f"pipelined_bp: {STEPS} updates in" in last["printed"]
    picture = Path(last["folder"]) / "pipeline_schedule.svg"
    assert str(picture) in last["printed"].replace("\n", "")
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    lines = [line.split(",") for line in (Path(last["folder"]) / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    for name in METHODS["pipelined_bp"].metrics:
        values = [float(row[name]) for row in rows if row.get(name)]
        assert len(values) == STEPS // 4
        assert all(math.isfinite(value) and value >= 0 for value in values)
    rates = [float(row["lr-SGD"]) for row in rows if row.get("lr-SGD")]
    assert rates == pytest.approx([0.03 * 0.95**step for step in (3, 7, 11, 15, 19)])


YAMLS = {
    "string": "trainer:\n  strategy: pipelined_bp\n",
    "class": (
        "trainer:\n  strategy:\n    class_path: {home}.PipelinedBPStrategy\n    init_args:\n      module: net\n"
        "      stages: {stages}\n      mitigation: lwp_w+sc\n      horizon: 2\n      micro_batch_size: 1\n"
        "      stash: true\n      in_flight: 1\n      curvature: {curvature}\n      on_nonfinite: warn\n"
        "      process_group_backend: gloo\n      timeout_s: 60\n"
    ),
}


@pytest.mark.parametrize("root", NAMESPACES)
def test_yaml_with_the_string(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py"])
    app = app_of(root, YAMLS["string"], tmp_path)
    assert type(app.trainer.strategy).__name__ == "PipelinedBPStrategy"
    assert app.trainer.strategy.stages is None
    assert "strategy: pipelined_bp\n" in app.parser.dump(app.config)


@pytest.mark.parametrize("root", NAMESPACES)
@pytest.mark.parametrize(
    ("stages", "curvature", "read"),
    [("layers", "measure", ("layers", "measure")), ("4", "2.5", (4, 2.5)), ("[net.2, net.4]", "null", (None, None))],
)
def test_yaml_with_the_class(
    root: str, stages: str, curvature: str, read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py"])
    text = YAMLS["class"].format(home=HOMES[root], stages=stages, curvature=curvature)
    made = app_of(root, text, tmp_path).trainer.strategy
    assert type(made).__name__ == "PipelinedBPStrategy"
    assert (made.stages, made.curvature) == (read[0] or ("net.2", "net.4"), read[1])
    assert (made.module, made.micro_batch_size, made.in_flight, made.on_nonfinite) == ("net", 1, 1, "warn")
    assert (str(made.mitigation), made.mitigation.horizon) == ("lwp_w+sc+stash", 2.0)
    assert any(base.__module__.startswith(root) for base in type(made).__mro__)


# ---------------------------------------------------------------------------------------------------- whole processes

SCRIPT = """
import json, os, sys
import torch
from {root} import LightningModule, Trainer

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(5)])

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)), batch_size=2,
                                           shuffle=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_train_end(self):
        strategy = self.trainer.strategy
        found = dict(rank=self.global_rank, processes=strategy.num_processes, kind=type(strategy).__name__,
                     base=type(strategy).__bases__[1].__module__.partition(".")[0], steps=self.trainer.global_step)
        os.write(1, (json.dumps(found) + chr(10)).encode())

def strategy():
    {strategy}

if __name__ == "__main__":
    model = Model()  # nobody seeds: every process draws weights of its own
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy(), max_epochs=2, max_time="00:00:05:00", **quiet)
    trainer.fit(model)
    weight = sum(p.detach().double().sum().item() for p in model.parameters())
    os.write(1, (json.dumps(dict(rank=trainer.global_rank, weight=weight)) + chr(10)).encode())
"""
STRING = "return 'pipelined_bp'"
CLASS = "from {home} import PipelinedBPStrategy; return PipelinedBPStrategy(stages=['net.2'], mitigation='lwp')"


@pytest.mark.long
@pytest.mark.parametrize(
    ("launch", "asked", "root"),
    [
        (("-m", "lightning_eff", "run", "train.py"), STRING, NAMESPACES[0]),
        (("-m", "lightning_eff", "run", "train.py"), STRING, NAMESPACES[1]),
        (("train.py",), CLASS, NAMESPACES[0]),
        (("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "train.py"), CLASS, NAMESPACES[1]),
    ],
    ids=["string", "string, pytorch_lightning", "class", "class, torchrun, pytorch_lightning"],
)
def test_a_script_on_two_processes(launch: tuple[str, ...], asked: str, root: str, tmp_path: Path) -> None:
    text = SCRIPT.replace("{strategy}", asked.replace("{home}", HOMES[root])).replace("{root}", root)
    (tmp_path / "train.py").write_text(text)
    done = run_python(*launch, cwd=tmp_path)
    lines = reports(done)
    trained = sorted((line for line in lines if "kind" in line), key=lambda line: line["rank"])
    weights = [line["weight"] for line in lines if "weight" in line]
    assert [line["rank"] for line in trained] == [0, 1]
    for line in trained:
        assert (line["processes"], line["kind"], line["steps"]) == (2, "PipelinedBPStrategy", 64)
        assert line["base"] == root.partition(".")[0]
    assert len(weights) == 2
    assert weights[0] == weights[1] != 0
    assert done.stdout.count("pipelined_bp: 64 updates in") == 1
    assert (tmp_path / "pipeline_schedule.svg").exists()


# ---------------------------------------------------------------------------------------------------- data


class Augmented(torch.utils.data.Dataset):
    """Rows with noise from every generator a user may draw from."""

    def __init__(self) -> None:
        self.x, self.y = data(SAMPLES)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(6) + random.random() + np.random.rand()  # noqa: NPY002 - users do
        return self.x[i] + 0.1 * noise.float(), self.y[i]


def _augmented(rank: int, world: int, workers: int, seeded: bool) -> dict[str, Any]:
    """Ranks come with different generators, or with Lightning's own way to seed the loader's workers."""
    gc.collect()  # the groups of the call before: their destructors must not run in a forked worker
    if seeded:
        importlib.import_module("lightning.pytorch").seed_everything(7, workers=True)
    else:
        torch.manual_seed(rank)
        random.seed(rank)
        np.random.seed(rank)  # noqa: NPY002
    model = task(dropout=0.2)
    # A spawned process, as a rank of these tests is, would spawn its workers: seconds for each.
    fork = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    rows = torch.utils.data.DataLoader(Augmented(), batch_size=BATCH, shuffle=True, **fork)
    run = trainer(strategy(stages=CUTS[2]), devices=world)
    if not seeded:
        torch.manual_seed(100 + rank)
    run.fit(model, rows, loader(10, seed=2, shuffle=False))
    outcome = outcome_of(model, run)
    return {"state": bits(outcome.state), "losses": outcome.losses, "generators": bits(outcome.generators)}


@pytest.mark.parametrize(("workers", "seeded"), [(0, False), (2, False), (2, True)])
def test_shuffles_and_augmentation_are_the_same_on_all_ranks(workers: int, seeded: bool) -> None:
    last, first = run_ranks(_augmented, 2, workers, seeded, init_group=False)
    (one,) = run_ranks(_augmented, 1, workers, seeded, init_group=False)
    assert first["state"] == last["state"] == one["state"]
    assert last["losses"] == one["losses"]
    assert first["generators"] == last["generators"] == one["generators"]


def _sharded(rank: int, world: int) -> None:
    rows = torch.utils.data.TensorDataset(*data(SAMPLES))
    sampler = torch.utils.data.DistributedSampler(rows, num_replicas=world, rank=rank)
    sharded = torch.utils.data.DataLoader(rows, batch_size=BATCH, sampler=sampler)
    run = trainer(strategy(stages=CUTS[2], timeout_s=5.0), devices=world)
    run.fit(task(), sharded, loader(10, seed=2, shuffle=False))


def test_data_that_is_shared_out_is_an_error() -> None:
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(_sharded, 2, init_group=False)
    assert failed.value.failures[0] == "UnsupportedCombinationError"
    assert "different batches in micro-batch 0" in str(failed.value)


# ---------------------------------------------------------------------------------------------------- evaluation


def _evaluated(rank: int, world: int, fits: bool) -> dict[str, Any]:
    def test_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]

    model = task(norm="batch", dropout=0.3, hooks={"test_step": test_step, "predict_step": predict_step})
    rows = loader(10, seed=2, shuffle=False)
    run = trainer(strategy(stages=CUTS[max(world, 2)]), devices=world)
    if fits:
        run.fit(model, loader(), rows)
    found = {
        "validate": run.validate(model, rows, verbose=False),
        "test": run.test(model, rows, verbose=False),
        "predict": bits(run.predict(model, rows)),
    }
    with torch.no_grad():
        found["by hand"] = bits([model.eval()(batch[0]) for batch in rows])
    return found


@pytest.mark.parametrize("fits", [False, True], ids=["without fit", "after fit"])
def test_validate_test_and_predict_run_the_whole_model_on_every_rank(fits: bool) -> None:
    (one,) = run_ranks(_evaluated, 1, fits, init_group=False)
    assert one["predict"] == one["by hand"]
    for found in run_ranks(_evaluated, 2, fits, init_group=False):
        assert found == one


def _stages(rank: int, world: int, asked: Any) -> tuple[str, tuple[int, ...]]:
    run = trainer(strategy(stages=asked, module=None), devices=world)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run.fit(task(), loader(), loader(10, seed=2, shuffle=False))
    return printed.getvalue(), run.strategy._engine.partition.starts


def test_a_stage_for_every_layer_in_one_process() -> None:
    ((printed, starts),) = run_ranks(_stages, 1, "layers", init_group=False)
    assert starts == (0, 1, 2, 3, 4, 5)
    assert "in 6 stages" in printed
    assert "gradients were up to 10 updates late" in printed


def test_stages_are_balanced_by_themselves_over_three() -> None:
    (printed, starts), *others = run_ranks(_stages, 3, "auto", init_group=False)
    assert starts[0] == 0 and len(starts) == 3  # noqa: PT018
    assert "in 3 stages" in printed
    assert others == [("", starts)] * 2
