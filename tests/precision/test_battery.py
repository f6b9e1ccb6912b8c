"""What every method with converted layers must do, asked of each of them alike."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_eff.precision
from lightning_eff.errors import ConfigurationError, EffWarning, NonFiniteGradientError, UnsupportedCombinationError
from lightning_eff.methods import METHODS, MethodInfo
from lightning_eff.precision.formats import fp8
from lightning_eff.precision.formats.base import LayerOptions
from lightning_eff.precision.formats.history import advance
from lightning_eff.precision.layers.convert import convert
from lightning_eff.precision.plugin import QuantizedPrecisionMixin
from tests.harness import run_ranks
from tests.precision.models import NAMESPACES, ResumableLoader, parameters_of, task, trainer
from tests.precision.ranks import fit_on_rank

ROWS = [
    info
    for info in METHODS.values()
    if info.kind == "precision" and issubclass(info.load_mixin(), QuantizedPrecisionMixin)
]
every_method = pytest.mark.parametrize("info", ROWS, ids=lambda info: info.name)


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "SLOW_FEATURES", 0)
    monkeypatch.setattr(fp8, "SLOW_CHANNELS", 0)


def plugin(info: MethodInfo, **options: Any) -> Any:
    return getattr(lightning_eff.precision, info.class_name)(**info.options, **options)


def layer_options(info: MethodInfo, **options: Any) -> LayerOptions:
    """The options of the method, every layer converted."""
    return plugin(info).options_class(**info.options, **{"exempt_first_last": False, **options})


def fitted(root: str = NAMESPACES[0], **options: Any) -> Any:
    model = task(root)
    torch.manual_seed(3)
    trainer(root, **options).fit(model)
    return model


def test_the_battery_is_not_empty() -> None:
    assert {info.name for info in ROWS} >= {"luq4", "fp8", "fp8-delayed", "flexpoint16", "dfp16", "bf16-emulated"}


@every_method
@pytest.mark.parametrize("root", NAMESPACES)
def test_the_string_trains_repeatably_and_gives_the_types_back(info: MethodInfo, root: str) -> None:
    model = fitted(root, precision=info.name)
    assert all(type(layer).__module__.startswith("torch.nn") for layer in model.net)
    assert parameters_of(model).isfinite().all()
    assert torch.equal(parameters_of(model), parameters_of(fitted(root, precision=info.name)))
    assert not torch.equal(parameters_of(model), parameters_of(fitted(root)))


@every_method
def test_the_class_is_the_string(info: MethodInfo) -> None:
    assert torch.equal(parameters_of(fitted(plugins=[plugin(info)])), parameters_of(fitted(precision=info.name)))
    assert plugin(info).info is info


@every_method
def test_every_composition_trains(info: MethodInfo) -> None:
    for base in info.composes_with:
        model = fitted(precision=f"{info.name}+{base}", max_epochs=6)
        assert parameters_of(model).isfinite().all()
        assert sum(model.losses[-8:]) < sum(model.losses[:8])
    for base in ("16-mixed", "16-true"):
        with pytest.raises(UnsupportedCombinationError, match=info.name):
            trainer(precision=f"{info.name}+{base}")


@every_method
def test_training_stays_close_to_float32(info: MethodInfo) -> None:
    """Closer than the noise of four bits, which is measured beside it."""
    start, plain = parameters_of(task()), parameters_of(fitted())
    four_bits = (parameters_of(fitted(precision="luq4")) - plain).norm()
    ours = (parameters_of(fitted(precision=info.name)) - plain).norm()
    assert 0 < ours <= four_bits < (plain - start).norm()


def run(folder: Path, info: MethodInfo, *, cut: int | None = None, resume: bool = False, **options: Any) -> Any:
    """Sixteen steps in two epochs, or up to ``cut`` with a checkpoint after it, or on from that checkpoint."""
    from lightning.pytorch.callbacks import Callback

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == cut:
                trainer.save_checkpoint(folder / "cut.ckpt")

    model = task()
    torch.manual_seed(4 if resume else 3)  # a resumed run starts from another seed
    options = options or {"precision": info.name}
    runner = trainer(max_epochs=2, max_steps=cut or -1, callbacks=[Save()], **options)
    runner.fit(model, ResumableLoader(), ckpt_path=folder / "cut.ckpt" if resume else None, weights_only=resume or None)
    return model


@every_method
def test_a_run_cut_anywhere_continues_to_the_same_bits(info: MethodInfo, tmp_path: Path) -> None:
    whole = run(tmp_path, info)
    for cut in (1, 5, 8):
        run(tmp_path, info, cut=cut)
        continued = run(tmp_path, info, resume=True)
        assert continued.losses == whole.losses[cut:]
        assert torch.equal(parameters_of(continued), parameters_of(whole))
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)[info.class_name]
    assert set(saved) == set(info.state_keys)
    run(tmp_path, info, resume=True, precision="32-true")  # plain Lightning reads the file


@every_method
def test_what_is_remembered_is_needed(info: MethodInfo, tmp_path: Path) -> None:
    """Negative control of the test above: without the memory, the continued run differs."""
    if "memory" not in info.state_keys or info.name == "luq4":  # luq4 remembers only when asked to
        pytest.skip("remembers nothing by default")
    options = {"scale": "mean"} if info.mixin.endswith("FittedMixin") else {}  # where the place is remembered too
    whole = run(tmp_path, info, plugins=[plugin(info, **options)])
    run(tmp_path, info, cut=5, plugins=[plugin(info, **options)])
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert set(checkpoint[info.class_name]["memory"]) >= {"net.2", "net.4"}
    checkpoint[info.class_name]["memory"] = {}
    torch.save(checkpoint, tmp_path / "cut.ckpt")
    with pytest.warns(EffWarning, match="the resume is not exact"):
        continued = run(tmp_path, info, resume=True, plugins=[plugin(info, **options)])
    assert not torch.equal(parameters_of(continued), parameters_of(whole))


@every_method
def test_compiled_without_a_graph_break_to_the_same_numbers(info: MethodInfo) -> None:
    def once(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
        convert(model, layer_options(info))
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        x = torch.randn(4, 3, 6, 6, requires_grad=True)
        out = call(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in model.parameters())]

    for ours, theirs in zip(once(True), once(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


@every_method
def test_the_default_dtype_changes_no_number(info: MethodInfo) -> None:
    """Lightning makes bfloat16 the default in bf16-true; scales and maxima stay float32."""

    def once(default: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).bfloat16()
        states = convert(model, layer_options(info)).states.values()
        x = torch.randn(4, 3, 6, 6).bfloat16().requires_grad_()
        torch.set_default_dtype(default)
        try:
            for _ in range(2):
                out = model(x)
                out.square().sum().backward()
                advance([history for state in states for history in state.histories.values()], torch.device("cpu"))
        finally:
            torch.set_default_dtype(torch.float32)
        return [out.detach(), x.grad, *(p.grad for p in model.parameters())]

    for ours, theirs in zip(once(torch.bfloat16), once(torch.float32), strict=True):
        assert torch.equal(ours, theirs)


@every_method
def test_bytes_kept_for_backward_are_counted_truly(info: MethodInfo) -> None:
    layer = nn.Sequential(nn.Linear(64, 64))
    conversion = convert(layer, layer_options(info))
    (state,) = conversion.states.values()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        layer(torch.randn(32, 64))
    scales = state.format.saved_scales(64)
    assert sum(kept) == 32 * 64 * state.format.nibbles // 2 + 4 * scales
    assert conversion.saved_bytes() == (sum(kept), 32 * 64 * 4)


@every_method
def test_a_broken_gradient_stops_before_the_parameters(info: MethodInfo) -> None:
    model = task(training_step=lambda self, batch, _: self.loss(batch) * math.nan)
    before = parameters_of(model)
    with pytest.raises(NonFiniteGradientError, match=f"{info.name}: the gradient is NaN or Inf"):
        trainer(precision=info.name).fit(model)
    assert torch.equal(parameters_of(model), before)


@every_method
def test_one_broken_element_of_a_gradient_is_found(info: MethodInfo) -> None:
    """In layers without bias, by their weights alone."""
    model = task()
    model.net = nn.Sequential(*(nn.Linear(12 if i == 0 else 24, 24, bias=False) for i in range(4)))

    def poison(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        def spoil(grad: torch.Tensor) -> torch.Tensor:
            grad = grad.clone()
            grad[5, 7] = math.nan
            return grad

        output.register_hook(spoil)

    model.net[1].register_forward_hook(poison)
    with pytest.raises(NonFiniteGradientError, match=r"net\.1\.weight"):
        trainer(precision=info.name).fit(model)


@every_method
def test_a_broken_element_of_an_input_or_gradient_stays_visible(info: MethodInfo) -> None:
    for bad in (math.nan, math.inf):
        layer = nn.Linear(8, 8)
        convert(nn.Sequential(layer), layer_options(info))
        x = torch.randn(4, 8)
        layer(x).sum().backward()  # what is predicted has been seen once
        x[1, 1] = bad
        assert not layer(x)[1].isfinite().any()
        layer.weight.grad = None
        y = layer(torch.randn(4, 8))
        grad = torch.ones_like(y)
        grad[1, 1] = bad
        y.backward(grad)
        assert layer.weight.grad is not None
        assert not layer.weight.grad[1].isfinite().any()


@every_method
def test_the_logged_figures_are_those_of_the_row(info: MethodInfo) -> None:
    ours = plugin(info, measure_every_n_steps=2)
    fitted(plugins=[ours], max_epochs=1)
    assert set(ours.metrics) == set(info.metrics)
    assert all(math.isfinite(value) for value in ours.metrics.values())


@every_method
def test_evaluation_leaves_no_trace(info: MethodInfo) -> None:
    """Validation between the steps, over other data, changes neither the weights nor what is remembered."""
    states = []
    for limit in (0, 3):
        ours = plugin(info)
        kept: list[Any] = []
        model = task(on_train_end=lambda self, ours=ours, kept=kept: kept.append(ours.state_dict()))
        torch.manual_seed(3)
        trainer(plugins=[ours], limit_val_batches=limit, val_check_interval=2, num_sanity_val_steps=0).fit(model)
        states.append((parameters_of(model), kept[0]))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


@every_method
def test_fabric_takes_the_string(info: MethodInfo) -> None:
    for root in ("lightning.fabric", "lightning_fabric"):
        fabric = importlib.import_module(root).Fabric(accelerator="cpu", devices=1, precision=info.name)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        x, losses = torch.randn(32, 12), []
        for _ in range(8):
            loss = nn.functional.cross_entropy(model(x), torch.arange(32) % 3)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


@every_method
def test_the_command_line_and_yaml_take_it(info: MethodInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["app.py"])
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    arguments = "".join(f"\n        {key}: {value}" for key, value in info.options.items())
    plugins = f"plugins:\n    - class_path: lightning_eff.precision.{info.class_name}\n      init_args:{arguments}\n"
    for text in (f"trainer:\n  precision: {info.name}\n", f"trainer:\n  {plugins}        exempt_first_last: false\n"):
        (tmp_path / "config.yaml").write_text(text)
        app = LightningCLI(
            type(task()), run=False, args=[f"--config={tmp_path / 'config.yaml'}"], trainer_defaults=quiet
        )
        assert app.trainer.precision_plugin.eff_method == info.name


@every_method
def test_wrong_options_are_named(info: MethodInfo) -> None:
    for option, value in (("exempt", "head"), ("on_nonfinite", "skip"), ("measure_every_n_steps", -1)):
        with pytest.raises(ConfigurationError, match=option):
            plugin(info, **{option: value})


def _replicas(rank: int, world_size: int, name: str, folder: str) -> dict[str, Any]:
    from lightning.pytorch.callbacks import Callback

    fp8.SLOW_FEATURES = 0
    path, seen = Path(folder) / "cut.ckpt", {}

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)
            seen["state"] = trainer.precision_plugin.state_dict()

    whole, continued = task(), task()
    fit_on_rank(rank, whole, precision=name, max_epochs=2, callbacks=[Save()], accumulate_grad_batches=2)
    fit_on_rank(rank, continued, precision=name, max_epochs=2, seed=4, resume=str(path), accumulate_grad_batches=2)
    return {"whole": parameters_of(whole), "continued": parameters_of(continued), "state": seen["state"]}


@pytest.mark.parametrize("name", [info.name for info in ROWS])
def test_two_ranks_stay_replicas_and_resume(name: str, tmp_path: Path) -> None:
    first, second = run_ranks(_replicas, 2, name, str(tmp_path), init_group=False)
    assert torch.equal(first["whole"], second["whole"])
    assert first["state"] == second["state"]
    for rank in (first, second):
        assert torch.equal(rank["whole"], rank["continued"])
