"""``bf16-sr``, ``bf16-kahan`` and ``bf16-split`` in a Trainer and in Fabric: against float32, resumed, on two ranks."""

from __future__ import annotations

import contextlib
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_eff.precision
from lightning_eff.errors import ConfigurationError, EffWarning, NoEffectWarning, UnsupportedCombinationError
from lightning_eff.functional.numerics.bf16 import join_fp32
from lightning_eff.integration.graft import graft
from tests.harness import run_ranks
from tests.precision.models import DATA, NAMESPACES, TARGET, ResumableLoader, parameters_of, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
STRINGS = ("bf16-sr", "bf16-kahan", "bf16-split")
every_string = pytest.mark.parametrize("precision", STRINGS)
every_root = pytest.mark.parametrize("root", NAMESPACES)


def two_groups(self: Any) -> Any:
    """AdamW on two groups, steered by a schedule of each batch."""
    first, *rest = self.net.children()
    groups = [{"params": list(first.parameters())}, {"params": nn.Sequential(*rest).parameters(), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(root: str = "lightning.pytorch", *, hooks: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    resume = options.pop("ckpt_path", None)
    model = task(root, **{"configure_optimizers": two_groups, **(hooks or {})})
    runner = trainer(root, **options)
    torch.manual_seed(3 if resume is None else 4)
    runner.fit(model, ckpt_path=resume)
    return model, runner


@every_root
@every_string
def test_a_string_trains_with_groups_schedules_clipping_and_accumulation(root: str, precision: str) -> None:
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 4}
    model, runner = fit(root, precision=precision, **options)
    (optimizer,) = runner.optimizers
    plugin = runner.precision_plugin
    assert runner.precision == "bf16-true"
    assert (plugin.eff_method, plugin.update) == (precision, precision.removeprefix("bf16-"))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.update == plugin.update
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert sum(map(len, (group["params"] for group in optimizer.param_groups))) == len(list(model.parameters()))
    assert runner.global_step == 16
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3 * 0.95**16, 3e-3 * 0.95**16])
    assert runner.lr_scheduler_configs[0].scheduler.optimizer is optimizer
    assert all(p.grad is None or p.grad.dtype is torch.bfloat16 for p in model.parameters())
    losses = torch.tensor(model.losses)
    assert losses[-8:].mean() < losses[:8].mean()


@every_root
def test_an_instance_is_the_string(root: str) -> None:
    home = "lightning_eff" if root == "lightning.pytorch" else "lightning_eff.pytorch_lightning"
    module = importlib.import_module("lightning_eff.precision" if root == "lightning.pytorch" else home)
    for precision in STRINGS:
        plugin = module.BF16Precision(update=precision.removeprefix("bf16-"))
        copied = pickle.loads(pickle.dumps(plugin))
        by_string, _ = fit(root, precision=precision)
        for one in (plugin, copied):
            by_instance, runner = fit(root, plugins=[one])
            assert torch.equal(parameters_of(by_instance), parameters_of(by_string))
            assert runner.precision == "bf16-true"
            assert one.eff_method == precision


def shadow_of_split(model: Any, runner: Any) -> Tensor:
    state = runner.optimizers[0].state
    return torch.cat([join_fp32(p, state[p]["lo"]).reshape(-1).double() for p in model.parameters()])


def test_split_is_float32_masters_to_the_bit() -> None:
    """The same gradients given to float32 AdamW end at the same float32 weights."""
    grads: list[list[Tensor]] = []

    def on_before_optimizer_step(self: Any, optimizer: Any) -> None:
        grads.append([p.grad.detach().float().clone() for p in self.parameters()])

    model, runner = fit(precision="bf16-split", hooks={"on_before_optimizer_step": on_before_optimizer_step})
    plain = task(configure_optimizers=two_groups).to(torch.bfloat16).float()
    made = plain.configure_optimizers()
    for step in grads:
        for p, grad in zip(plain.parameters(), step, strict=True):
            p.grad = grad
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert len(grads) == 8
    assert torch.equal(shadow_of_split(model, runner), parameters_of(plain))


@every_string
def test_small_updates_arrive_where_bf16_true_stands_still(precision: str) -> None:
    def configure_optimizers(self: Any) -> Any:
        self.weight = nn.Parameter(torch.ones(64, dtype=next(self.parameters()).dtype))
        return torch.optim.SGD([self.weight], lr=1e-3)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return -self.weight.sum()

    hooks = {"configure_optimizers": configure_optimizers, "training_step": training_step}
    ends = [fit(precision=one, hooks=hooks, max_epochs=63, max_steps=500)[0] for one in (precision, "bf16-true")]
    mine, lightnings = (float(model.weight.detach().float().mean()) for model in ends)
    assert lightnings == 1.0
    assert abs(mine - 1.5) < 0.05


@every_string
def test_manual_optimization_and_two_optimizers(precision: str) -> None:
    def configure(self: Any) -> Any:
        first, *rest = self.net.children()
        return [
            torch.optim.SGD(first.parameters(), lr=0.1),
            torch.optim.Adagrad(nn.Sequential(*rest).parameters(), lr=0.1),
        ]

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    hooks = {"configure_optimizers": configure, "training_step": training_step, "automatic_optimization": False}
    model, runner = fit(precision=precision, hooks=hooks)
    assert [optimizer.update for optimizer in runner.optimizers] == [precision.removeprefix("bf16-")] * 2
    assert not torch.equal(parameters_of(model), parameters_of(task().to(torch.bfloat16)))


def run_to(folder: Path, root: str, precision: str, *, resume: Path | None = None) -> Any:
    """Eight steps, or what is left of them after ``resume``; ModelCheckpoint writes a file after the third."""
    pl = importlib.import_module(root)
    checkpoint = pl.callbacks.ModelCheckpoint(
        folder, filename=f"{precision}-{{step}}", every_n_train_steps=3, save_top_k=-1
    )
    model = task(root, configure_optimizers=two_groups)
    runner = trainer(root, precision=precision, callbacks=[checkpoint], enable_checkpointing=True)
    torch.manual_seed(3 if resume is None else 4)
    runner.fit(model, ResumableLoader(), ckpt_path=None if resume is None else str(resume))
    return model


@every_root
@every_string
def test_a_checkpoint_continues_to_the_same_bits(tmp_path: Path, root: str, precision: str) -> None:
    whole = run_to(tmp_path, root, precision)
    file = tmp_path / f"{precision}-step=3.ckpt"
    continued = run_to(tmp_path, root, precision, resume=file)
    assert len(continued.losses) == 5
    assert continued.losses == whole.losses[3:]
    assert torch.equal(parameters_of(continued), parameters_of(whole))
    saved = torch.load(file, weights_only=True)["optimizer_states"][0]
    streams = saved["bf16"].pop("streams", [])
    assert saved["bf16"] == {"update": precision.removeprefix("bf16-"), "seed": 3, "steps": 3}
    assert len(set(streams)) == (8 if precision == "bf16-sr" else 0)
    assert all(state["exp_avg"].dtype is torch.float32 for state in saved["state"].values())


@pytest.mark.parametrize(
    ("precision", "key"), [("bf16-split", "lo"), ("bf16-kahan", "compensation"), ("bf16-sr", "seed")]
)
def test_each_part_of_the_state_is_needed(tmp_path: Path, precision: str, key: str) -> None:
    """Negative control: without it the comparison above sees a difference."""
    root = "lightning.pytorch"
    whole = run_to(tmp_path, root, precision)
    checkpoint = torch.load(tmp_path / f"{precision}-step=3.ckpt", weights_only=True)
    saved = checkpoint["optimizer_states"][0]
    for state in saved["state"].values():
        state.pop(key, None)
    if key == "seed":
        saved["bf16"]["seed"] = 0
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    told = contextlib.nullcontext() if key == "seed" else pytest.warns(EffWarning, match="the resume is not exact")
    with told:
        continued = run_to(tmp_path, root, precision, resume=tmp_path / "broken.ckpt")
    assert not torch.equal(parameters_of(continued), parameters_of(whole))


def _streams(hooks: dict[str, Any], root: str = "lightning.pytorch", **options: Any) -> list[list[int]]:
    _, runner = fit(root, hooks=hooks, precision="bf16-sr", max_epochs=1, **options)
    return [optimizer.state_dict()["bf16"]["streams"] for optimizer in runner.optimizers]


def _manual_step(self: Any, batch: Any, batch_idx: int) -> None:
    loss = self.loss(batch)
    self.manual_backward(loss)
    for optimizer in self.optimizers():
        optimizer.step()
        optimizer.zero_grad()


def _two_optimizers(self: Any) -> Any:
    self.automatic_optimization = False
    first, *rest = self.net.children()
    return [torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.SGD(nn.Sequential(*rest).parameters(), lr=0.1)]


@every_root
def test_optimizers_share_no_noise_and_a_parameter_keeps_its_own(root: str) -> None:
    """By name: the same in the next run, whatever groups there are and whenever they are added."""
    hooks = {"configure_optimizers": _two_optimizers, "training_step": _manual_step}
    first, second = _streams(hooks, root)
    assert len(set(first + second)) == 8
    assert [first, second] == _streams(hooks, root)

    def late_group(self: Any) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            for layer in (2, 4, 6):
                self.trainer.optimizers[0].add_param_group({"params": list(self.net[layer].parameters())})

    (late,) = _streams({"configure_optimizers": late_group, "on_train_batch_start": on_train_batch_start}, root)
    (whole,) = _streams({"configure_optimizers": two_groups}, root)
    assert late == whole
    assert late[:2] == first
    assert not set(late[2:]) & set(second)  # the same parameters in another optimizer


@every_string
def test_the_method_is_added_to_and_taken_from_a_run(tmp_path: Path, precision: str) -> None:
    root = "lightning.pytorch"
    for given in (precision, "bf16-true"):
        run_to(tmp_path, root, given)
    for before, after in ((precision, "bf16-true"), ("bf16-true", precision), (precision, "32-true")):
        assert len(run_to(tmp_path, root, after, resume=tmp_path / f"{before}-step=3.ckpt").losses) == 5


def _ranks(rank: int, world_size: int, precision: str) -> tuple[list[Tensor], list[float], int]:
    from lightning.pytorch.strategies import DDPStrategy

    steps: list[Tensor] = []

    def on_before_zero_grad(self: Any, optimizer: Any) -> None:
        steps.append(parameters_of(self))

    model = task(configure_optimizers=two_groups, on_before_zero_grad=on_before_zero_grad)
    data = torch.utils.data.TensorDataset(DATA[rank * 32 : rank * 32 + 32], TARGET[rank * 32 : rank * 32 + 32])
    strategy = DDPStrategy(process_group_backend="gloo")
    runner = trainer(devices=2, strategy=strategy, use_distributed_sampler=False, precision=precision, max_epochs=2)
    torch.manual_seed(3 + rank)  # replicas must round alike also when nobody seeded the ranks alike
    runner.fit(model, torch.utils.data.DataLoader(data, batch_size=8))
    steps.append(parameters_of(model))
    return steps, model.losses, runner.optimizers[0].state_dict()["bf16"]["seed"]


@every_string
def test_replicas_stay_equal_on_two_ranks(precision: str) -> None:
    (steps_0, losses_0, seed_0), (steps_1, losses_1, seed_1) = run_ranks(_ranks, 2, precision, init_group=False)
    assert seed_0 == seed_1 == 3
    assert len(steps_0) == 9
    assert losses_0 != losses_1
    for first, second in zip(steps_0, steps_1, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(steps_0[0], steps_0[-1])


@every_string
@pytest.mark.parametrize("root", ["lightning.fabric", "lightning_fabric"])
def test_fabric_trains(root: str, precision: str) -> None:
    fabric = importlib.import_module(root).Fabric(precision=precision, accelerator="cpu", devices=1)
    layer = nn.Linear(4, 4, bias=False)
    nn.init.ones_(layer.weight)
    module, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), lr=1e-3))
    for _ in range(300):
        fabric.backward(-module(torch.ones(1, 4)).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert layer.weight.dtype is torch.bfloat16
    assert abs(float(layer.weight.detach().float().mean()) - 1.3) < 0.05
    assert optimizer.state_dict()["bf16"]["steps"] == 300


@every_root
def test_what_cannot_work_is_refused(root: str) -> None:
    for given, reason in (("32-true", "lose no update"), ("bf16-mixed", "lose no update"), ("16-true", "bfloat16")):
        with pytest.raises(UnsupportedCombinationError, match=reason):
            trainer(root, precision=f"bf16-split+{given}")
    with pytest.raises(UnsupportedCombinationError, match="family 'fsdp'|family 'model_parallel'"):
        trainer(
            root, precision="bf16-sr", strategy=importlib.import_module(f"{root}.strategies").ModelParallelStrategy()
        )
    lbfgs = {"configure_optimizers": lambda self: torch.optim.LBFGS(self.parameters())}
    with pytest.raises(UnsupportedCombinationError, match="LBFGS evaluates its closure several times"):
        fit(root, precision="bf16-sr", hooks=lbfgs)


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="update='half' is not allowed"):
        lightning_eff.precision.BF16Precision(update="half")
    half = importlib.import_module("lightning.pytorch.plugins").HalfPrecision
    with pytest.raises(ConfigurationError, match="'bf16-sr' was asked for with update='kahan'"):
        graft(half("bf16-true"), "bf16-sr", update="kahan")
    assert graft(half("bf16-true"), "bf16-kahan", update="kahan").update == "kahan"


def test_a_model_that_is_no_longer_bfloat16_is_told_of() -> None:
    def configure(self: Any) -> Any:
        return torch.optim.SGD(self.float().parameters(), lr=0.1)

    with pytest.warns(NoEffectWarning, match="none of the 8 parameters of the optimizers is bfloat16"):
        fit(precision="bf16-sr", hooks={"configure_optimizers": configure})
