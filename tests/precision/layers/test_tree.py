"""The module tree belongs to the user and changes: what is converted, what is not, and that all is plain again."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_eff.errors import EffWarning
from lightning_eff.precision.formats.luq import LUQOptions
from lightning_eff.precision.layers.convert import convert
from lightning_eff.precision.layers.twins import STATE, Twin
from tests.precision.exact import exactly_converted
from tests.precision.models import DATA, NAMESPACES, body, fit, parameters_of, task, trainer

PRECISIONS = ("luq4", "fp8-fit", "flexpoint16", "bf16-emulated")


def is_plain(module: nn.Module) -> bool:
    return not any(isinstance(part, Twin) or STATE in part.__dict__ for part in module.modules())


# --------------------------------------------------------------------------------------- what belongs to the model


class Perceptual(torchmetrics.Metric):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = body().requires_grad_(False)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        self.total = self.total + self.net(x).square().mean()

    def compute(self) -> Tensor:
        return self.total


@pytest.mark.parametrize("nested", [False, True])
def test_networks_inside_metrics_are_left_alone_and_named(nested: bool) -> None:
    metric: nn.Module = torchmetrics.MetricCollection({"perceptual": Perceptual()}) if nested else Perceptual()
    model = nn.ModuleDict({"metric": metric, "net": body()})
    conversion = convert(model, LUQOptions(exempt_first_last=False))
    assert is_plain(metric)
    assert {row.name.split(".")[0] for row in conversion.rows if not row.reason} == {"net"}
    inside = [row.reason for row in conversion.rows if row.name.startswith("metric")]
    assert len(inside) == 4
    assert set(inside) == {"inside a metric, which would report other numbers"}


def test_a_network_that_a_metric_shares_with_the_model_is_the_models() -> None:
    metric = Perceptual()
    model = nn.ModuleDict({"metric": metric, "net": metric.net})
    assert convert(model, LUQOptions()).layers == 2
    first = convert(nn.ModuleDict({"metric": Perceptual(), "net": body()}), LUQOptions())
    assert "first layer" in next(row.reason for row in first.rows if row.name == "net.0")  # not the metric's


def test_a_frozen_layer_is_plain_until_a_gradient_passes_it() -> None:
    teacher, student = body().requires_grad_(False), body()
    x = torch.randn(5, 12)
    expected = teacher(x)
    model = nn.ModuleDict({"teacher": teacher, "student": student})
    conversion = convert(model, LUQOptions(exempt_first_last=False))
    notes = {row.name: row.note for row in conversion.rows}
    assert notes["teacher.0"] == "frozen: plain until a gradient passes"
    assert notes["student.0"] == ""
    assert torch.equal(teacher(x), expected)  # a target
    with torch.no_grad():
        assert torch.equal(teacher(x), expected)
    below = teacher(x.clone().requires_grad_())  # a loss through frozen layers, as in a perceptual loss
    assert not torch.equal(below, expected)
    with torch.no_grad():
        assert torch.equal(teacher(x), below)  # and the same in evaluation from then on
    frozen = body().requires_grad_(False)
    expected = frozen(x)
    convert(frozen, LUQOptions(exempt_first_last=False))
    assert torch.equal(frozen(x), expected)
    frozen.requires_grad_(True)
    assert not torch.equal(frozen(x), expected)  # unfrozen


def test_a_layer_frozen_during_the_run_goes_on_as_it_was() -> None:
    model, x = body(), torch.randn(5, 12)
    convert(model, LUQOptions(exempt_first_last=False))
    expected = model(x)
    model.requires_grad_(False)  # toggle_optimizer does so with the other optimizer's parameters
    assert torch.equal(model(x), expected)


# ----------------------------------------------------------------------------------------------- a tree that changes


def _parametrised(net: nn.Sequential) -> None:
    parametrizations.weight_norm(net[2])


CHANGES: dict[str, tuple[Callable[[Any], None], str, int]] = {
    "layer removed": (lambda net: net.pop(2), "2 (Linear) gone", 1),
    "layer replaced": (lambda net: net.__setitem__(2, nn.Linear(24, 24)), "2 (Linear) converted", 2),
    "made of a converted layer's class": (
        lambda net: net.__setitem__(2, type(net[2])(24, 24)),
        "2 (Linear) converted",
        2,
    ),
    "head replaced": (lambda net: net.__setitem__(6, nn.Linear(24, 3)), "6 (Linear) left alone: exempt: the last", 2),
    "layer inserted": (lambda net: net.insert(2, nn.Linear(24, 24)), "2 (Linear) converted", 3),
    "subtree added": (lambda net: net.insert(2, nn.Sequential(nn.Linear(24, 24), nn.ReLU())), "2.0 (Linear) conv", 3),
    "unsupported added": (lambda net: net.insert(2, nn.Bilinear(24, 24, 24)), "2 (Bilinear) left alone", 2),
    "activation replaced": (lambda net: net.__setitem__(3, nn.ReLU()), "", 2),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_changes_are_noticed_named_and_undone(change: str) -> None:
    act, said, layers = CHANGES[change]
    model = body()
    before = list(model.modules())
    conversion = convert(model, LUQOptions())
    assert not conversion.update().came
    act(model)
    found = conversion.update()
    told = [
        f"{row.name} ({row.kind}) left alone: {row.reason}" if row.reason else f"{row.name} ({row.kind}) converted"
        for row in found.came
    ]
    told += [f"{row.name} ({row.kind}) gone" for row in found.went]
    assert any(said in line for line in told) or not said
    assert len(conversion.states) == layers == conversion.layers
    assert not conversion.update().came
    present = {id(part) for part in model.modules()}
    assert all(is_plain(part) for part in before if id(part) not in present)
    if change != "unsupported added":
        model(torch.randn(5, 12)).sum().backward()
    conversion.undo()
    assert all(is_plain(part) for part in (*before, *model.modules()))


def test_the_last_layer_is_the_last_of_all_converted_or_not() -> None:
    model = body()
    conversion = convert(model, LUQOptions())
    del model[6]  # the exempt one: 4 is the last now, and stays converted
    model.insert(1, nn.Linear(24, 24))
    conversion.update()
    assert list(conversion.states) == ["1", "3", "5"]


def test_a_layer_that_is_taken_out_and_put_back_is_converted_once() -> None:
    model = body()
    conversion, layer = convert(model, LUQOptions()), model[2]
    model[2] = nn.Identity()
    conversion.update()
    assert is_plain(layer)
    model[2] = layer
    conversion.update()
    assert isinstance(layer, Twin)
    conversion.undo()
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("before_undo", [False, True])
def test_a_layer_parametrised_during_the_run(before_undo: bool) -> None:
    """Parametrisation derives a class from the twin; whatever is taken off first, the layer ends plain."""
    model, plain = body(), body()
    plain.load_state_dict(model.state_dict())
    conversion = exactly_converted(model)
    for net in (model, plain):
        _parametrised(net)
        with torch.no_grad():
            net[2].parametrizations.weight.original0.mul_(2)
    x = torch.randn(5, 12)
    conversion.update()
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), plain(x))
    if before_undo:
        parametrize.remove_parametrizations(model[2], "weight")
    conversion.undo()
    assert is_plain(model)
    torch.testing.assert_close(model(x), plain(x))
    if not before_undo:
        parametrize.remove_parametrizations(model[2], "weight")
    assert type(model[2]) is nn.Linear


def test_a_forward_that_was_replaced_on_the_object() -> None:
    model = body()
    inner = model[2].forward
    model[2].forward = lambda x: inner(x) * 2  # accelerate, hand-made hooks
    rows = convert(model, LUQOptions()).rows
    assert "its forward has been replaced on the object" in rows[1].reason
    model = body()
    conversion = exactly_converted(model)
    x = torch.randn(5, 12)
    expected, inner = model[2](torch.ones(5, 24)), model[2].forward
    model[2].forward = lambda x: inner(x) * 2
    torch.testing.assert_close(model[2](torch.ones(5, 24)), 2 * expected)
    conversion.undo()
    torch.testing.assert_close(model[2](torch.ones(5, 24)), 2 * expected)  # the wrapper outlives the run
    model(x)


@pytest.mark.parametrize("root", NAMESPACES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_head_that_is_removed_and_one_that_is_added_in_a_run(root: str, precision: str, capsys: Any) -> None:
    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 3:
            self.net[2] = nn.Linear(24, 24)
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[2].parameters())})
        if self.global_step == 5:
            self.extra = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        if self.global_step == 6:
            assert any(isinstance(part, Twin) for part in self.extra.modules())
            del self.extra

    model, _ = fit(root, precision=precision, hooks={"on_train_batch_start": on_train_batch_start})
    assert is_plain(model)
    said = " ".join(capsys.readouterr().out.split())
    assert "the model has changed at step 3: net.2 (Linear) converted; net.2 (Linear) gone." in said
    assert "extra.0 (Linear) converted; extra.2 (Linear) " in said


# ----------------------------------------------------------------------------------------------- copies and exports


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "copy"])
def test_copies_taken_during_a_run_are_plain(way: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MultiheadAttention(4, 2), nn.Linear(4, 3))
    model[3].register_buffer("extra", torch.ones(1))
    model[3].note = {"a": 1}
    types = [type(part) for part in model.modules()]
    state = model.state_dict()
    exactly_converted(model)
    take = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
    copied = nn.Sequential(*map(copy.copy, model)) if way == "copy" else take[way](model)
    assert [type(part) for part in copied] == [nn.Conv2d, nn.ReLU, nn.MultiheadAttention, nn.Linear]
    if way != "copy":  # a shallow copy shares what is inside
        assert [type(part) for part in copied.modules()] == types
        assert is_plain(copied)
    assert is_plain(copied[0])
    assert is_plain(copied[3])
    assert copied[3].note == {"a": 1}
    assert all(torch.equal(value, state[key]) for key, value in copied.state_dict().items())
    assert not is_plain(model)


def test_a_copy_taken_during_a_run_may_be_left_alone_in_the_next() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4), nn.Linear(4, 4))
    exactly_converted(model)
    parametrizations.weight_norm(model[1])
    copied = copy.deepcopy(model)
    conversion = convert(copied, LUQOptions(exempt=["0"], exempt_first_last=False))
    assert list(conversion.states) == ["2"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_everything_taken_out_of_a_run_is_plain(precision: str) -> None:
    taken: dict[str, Any] = {}

    def on_train_epoch_end(self: Any) -> None:
        self.net.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing compares with the converted model, and says so
            taken["trace"] = torch.jit.trace(self.net, DATA[:4])
            taken["script"] = torch.jit.script(self.net)
        taken["export"] = torch.export.export(self.net, (DATA[:4],)).module()
        taken["copy"] = copy.deepcopy(self.net)
        taken["pickle"] = pickle.dumps(self.net)
        self.net.train()

    model, _ = fit(precision=precision, limit_train_batches=3, hooks={"on_train_epoch_end": on_train_epoch_end})
    taken["pickle"] = pickle.loads(taken["pickle"])
    expected = model.net.eval()(DATA[:4])
    for way, program in taken.items():
        torch.testing.assert_close(program(DATA[:4]), expected, msg=way)


def test_a_copy_of_the_plugin_has_converted_nothing() -> None:
    plugins: list[Any] = []

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> None:
        plugins.append(copy.deepcopy(self.trainer.precision_plugin))

    first, _ = fit(precision="luq4", hooks={"on_train_batch_start": on_train_batch_start}, limit_train_batches=1)
    assert not plugins[0].states()
    assert is_plain(first)
    model, runner = task(), trainer(plugins=plugins)
    torch.manual_seed(3)
    runner.fit(model)
    again, _ = fit(precision="luq4")
    assert torch.equal(parameters_of(model), parameters_of(again))


def test_what_cannot_be_quantised_is_said_once() -> None:
    model = body()
    convert(model, LUQOptions())
    model.double()
    with pytest.warns(EffWarning, match=r"Layer '[24]' computes in high precision here: it multiplies torch\.float64"):
        model(torch.randn(4, 12, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 12, dtype=torch.float64))


NESTED = [torch.strided, torch.jagged]


@pytest.mark.parametrize("layout", NESTED, ids=str)
def test_nested_tensors(layout: torch.layout) -> None:
    parts = [torch.randn(3, 12), torch.randn(5, 12)]
    results = []
    for convert_it in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 7))
        if convert_it:
            exactly_converted(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
            y = model(torch.nested.as_nested_tensor(parts, layout=layout))
            rows = torch.cat([part.flatten() for part in y.unbind()])
        rows.square().sum().backward()
        results += [rows.detach(), model[0].weight.grad]
        assert y.is_nested
        assert y.layout is layout
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[3])


def test_nested_tensors_in_attention_as_torch_takes_them() -> None:
    parts, results = [torch.randn(3, 12), torch.randn(5, 12)], []
    for convert_it in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.MultiheadAttention(12, 2, batch_first=True)]).eval()
        if convert_it:
            exactly_converted(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.nested.as_nested_tensor(parts)
            with torch.no_grad():
                y, _ = model[0](x, x, x, need_weights=False)
            results.append(torch.cat([part.flatten() for part in y.unbind()]))
            with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
                model.train()[0](x, x, x)
    torch.testing.assert_close(*results)
