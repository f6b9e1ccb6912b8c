"""The arithmetic and the bookkeeping of the benchmarks, on made-up timings."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import _peers, _setup, peers
from benchmarks._float16 import Float16Unscaled
from benchmarks._measure import clock_for, interleave, threads
from benchmarks._report import Report, Row, add_common_arguments
from benchmarks._stats import Spread, ratio, spread


def test_ratio_compares_each_round_with_itself() -> None:
    slow_minute = ratio([1.0, 30.0, 1.0], [2.0, 60.0, 2.0])  # the second round was slow for both
    assert slow_minute == Spread(0.5, 0.5, 0.5)
    assert ratio([1.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == Spread(3.0, 1.0, 4.0)


def test_ratio_of_unequal_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_spread_of_an_even_number_is_the_middle() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0]) == Spread(2.5, 1.0, 4.0)


def test_interleave_takes_turns_and_rotates() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleave(steps, rounds=3, inner={"a": 2, "b": 1, "c": 1}, clock="wall", warmup=1)
    assert "".join(order) == "abc" + "aabc" + "bcaa" + "caab"
    assert [len(values) for values in times.values()] == [3, 3, 3]


def test_clock_follows_device_and_threads() -> None:
    assert [clock_for("cpu", 1), clock_for("cpu", 2), clock_for("cuda", 1)] == ["process_time", "wall", "cuda_event"]


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    return parser.parse_args(["--check", "--results", str(tmp_path)])


def test_check_fails_on_a_missed_target_alone(options: argparse.Namespace, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("made_up", ("model",))
    report.add(Row({"model": "m"}, "ours / theirs", Spread(0.5, 0.4, 0.7), target=0.5))
    report.add(Row({"model": "m"}, "no target", Spread(9.0, 9.0, 9.0)))
    assert report.finish(options) == 0
    report.add(Row({"model": "m"}, "too slow", Spread(0.51, 0.4, 0.7), target=0.5))
    assert report.finish(options) == 1
    options.check = False
    assert report.finish(options) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["ok"] for line in lines] == [True, None, False]


def test_the_file_names_the_machine(options: argparse.Namespace) -> None:
    report = Report("made_up", ())
    report.add(Row({}, "pair", Spread(1.0, 1.0, 1.0)))
    content = json.loads(report.save(options).read_text())
    assert {"cpu", "flags", "cores", "packages", "date", "command"} <= content["machine"].keys()
    assert "torch" in content["machine"]["packages"]
    assert content["rows"][0]["pair"] == "pair"


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "ENVIRONMENT", tmp_path / "nowhere")
    monkeypatch.setitem(peers.MODULES, "made-up", "a_module_nobody_has")
    with pytest.raises(SystemExit, match=r"made-up: not installed.*benchmarks\.peers setup"):
        peers.enter("benchmarks.step", ["fp32", "made-up"])
    peers.enter("benchmarks.step", ["fp32", "luq4"])


def test_workloads_know_their_layers() -> None:
    from benchmarks._workloads import workload

    assert workload("mlp", tiny=True).converted_names() == ["0", "2", "4"]
    names = workload("gpt", tiny=True).converted_names()
    assert names == [f"blocks.0.{name}" for name in ("qkv", "proj", "fc", "out")]
    names = workload("resnet", tiny=True).converted_names()
    assert len(names) == 19
    assert not {"stem", "head"} & set(names)


@pytest.mark.parametrize("variant", _setup.FORMATS)
@pytest.mark.parametrize("model", ["mlp", "gpt", "resnet"])
def test_the_library_converts_the_same_layers(model: str, variant: str) -> None:
    from benchmarks._workloads import workload

    work = workload(model, tiny=True)
    names = work.converted_names()
    conversion = _setup.convert(work, variant)
    assert list(conversion.states) == names
    conversion.undo()


def test_the_family_holds_every_method_and_peer() -> None:
    from lightning_eff.methods import METHODS

    assert {name for name, info in METHODS.items() if info.kind == "precision"} <= set(_setup.FAMILY)
    assert set(peers.MODULES) == set(_peers.PEERS) <= set(_setup.FAMILY) <= set(_setup.VARIANTS)
    assert _setup.expand("family,luq4") == list(_setup.FAMILY)


def test_unknown_variants_have_no_step() -> None:
    from benchmarks._workloads import workload

    with pytest.raises(KeyError, match="luq5"):
        _setup.training_step("luq5", workload("mlp", tiny=True))


def test_the_float16_control_loses_what_float16_loses() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    weight, x = net[0].weight.detach().clone(), torch.randn(8, 4)
    plain = net(x)
    Float16Unscaled().setup(None, net, "fit")  # type: ignore[arg-type]
    y = net(x)
    assert torch.equal(y, y.half().float())
    assert 0 < (y - plain).abs().max() < 1e-2
    (y.sum() * 1e-9).backward()
    assert [bool((p.grad == 0).all()) for p in net.parameters()] == [True] * 3, "below float16's smallest number"
    net(x).sum().backward()
    grads = [p.grad for p in net.parameters()]
    assert all(torch.equal(g, g.half().float()) and bool((g != 0).any()) for g in grads)
    assert not net(x * 1e6).isfinite().any()
    assert torch.equal(net[0].parametrizations.weight.original, weight)


def test_held_by_graph_finds_what_hooks_do_not_see() -> None:
    from benchmarks.tasks.saved import held_by_graph, record_all

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.secret = [torch.zeros(100)]
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    layer = nn.Linear(4, 4)
    with record_all(layer) as saved:
        y = Keeps.apply(layer(torch.ones(3, 4))).sum()
    assert sorted(saved.activations.values()) == [48, 48]  # input and output of the layer; its parameters not
    assert sorted(held_by_graph(y).values()) == [400]
