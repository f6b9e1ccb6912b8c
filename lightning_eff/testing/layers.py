"""The battery of precision plugins that convert layers: what a converted layer computes, keeps and lets through."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_eff.testing.battery import require
from lightning_eff.testing.precision import PrecisionBattery, net_options, new_plugin
from lightning_eff.testing.runs import Outcome, differences
from lightning_eff.testing.tasks import net

__all__ = ["QuantizedPrecisionBattery"]

_WIDE, _CHANNELS = 72, 24
"""Layers of this size are converted on any hardware."""


@contextlib.contextmanager
def _converted(case: Any, module: nn.Module) -> Iterator[Any]:
    """Convert ``module``, and yield the plugin."""
    plugin = new_plugin(case)
    with contextlib.redirect_stdout(io.StringIO()):
        plugin.convert_module(module)
        try:
            yield plugin
        finally:
            plugin.teardown()


def _mixed() -> nn.Sequential:
    """Return a convolution and a linear layer, drawn from torch's generator."""
    return nn.Sequential(nn.Conv2d(_CHANNELS, _CHANNELS, 3), nn.ReLU(), nn.Flatten(), nn.Linear(_CHANNELS * 16, _WIDE))


class QuantizedPrecisionBattery(PrecisionBattery):
    """Tests that every precision plugin with converted layers has to pass, beside those of all."""

    def test_compiled_without_a_graph_break_to_the_same_numbers(self, case: Any) -> None:
        """``torch.compile(fullgraph=True)`` traces converted layers whole."""
        compiled, eager = (_pass(case, compiled=compiled) for compiled in (True, False))
        torch._dynamo.reset()
        for ours, theirs in zip(compiled, eager, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)

    def test_the_default_dtype_changes_no_number(self, case: Any) -> None:
        """Lightning makes bfloat16 the default in bf16-true; scales and maxima stay float32."""
        found, wanted = (_two_steps(case, default) for default in (torch.bfloat16, torch.float32))
        told = differences(found, wanted, "numbers")
        require(not told, f"{case.id}: with bfloat16 as the default dtype {told}")

    def test_bytes_kept_for_backward_are_counted_truly(self, case: Any) -> None:
        """A layer keeps its input in the bits of the format, scales beside it, and says so."""
        rows = 32
        layer = nn.Sequential(nn.Linear(_WIDE, _WIDE))
        kept: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with _converted(case, layer) as plugin:
            with torch.autograd.graph.saved_tensors_hooks(pack, _unpacked):
                layer(_normal(rows, _WIDE))
            told = plugin.saved_bytes()
        elements = rows * _WIDE
        require(told == (sum(kept), 4 * elements), f"{case.id} counts {told}, kept are {sum(kept)}")
        scales = sum(kept) - elements * case.saved_bits // 8
        require(0 <= scales <= 4 * _WIDE, f"{case.id}: {sum(kept)} bytes are kept of {elements} elements")

    def test_a_broken_element_of_an_input_or_gradient_stays_visible(self, case: Any) -> None:
        """NaN and Inf are not rounded away."""
        for bad in (math.nan, math.inf):
            layer = nn.Linear(_WIDE, _WIDE)
            with _converted(case, nn.Sequential(layer)):
                x = _normal(4, _WIDE)
                layer(x).sum().backward()  # what is predicted has been seen once
                x[1, 1] = bad
                require(not layer(x)[1].isfinite().any(), f"{case.id}: {bad} in an input is lost")
                layer.weight.grad = None
                y = layer(_normal(4, _WIDE))
                gradient = torch.ones_like(y)
                gradient[1, 1] = bad
                y.backward(gradient)
                found = layer.weight.grad
                require(found is not None and not found[1].isfinite().any(), f"{case.id}: {bad} in a gradient is lost")

    # ------------------------------------------------------------------------------------------ broken gradients

    def spoilt(self, case: Any, spoil: str, **options: Any) -> Outcome:
        """Return what is left of a run whose gradients are broken."""
        given = {**case.task_options, **options, "spoil": spoil}
        (outcome,) = self.run(case.string_plan(task_options=given, may_fail=True))
        refused = outcome.refusal
        require(refused, f"{case.id}: a broken gradient goes through")
        require(
            refused is not None and "NonFiniteGradientError" in refused.kinds,
            f"{case.id}: a broken gradient ends in {refused}",
        )
        start = {f"net.{name}": value for name, value in net(**net_options(given)).state_dict().items()}
        told = differences(outcome.weights, start, "weights")
        require(not told, f"{case.id}: a broken gradient reached the parameters: {told[:4]}")
        return outcome

    def test_a_broken_gradient_stops_before_the_parameters(self, case: Any) -> None:
        """A loss of NaN is an error that names the method."""
        refused = self.spoilt(case, "loss").refusal
        told = f"{case.info.name}: the gradient is NaN or Inf"
        require(refused and told in refused.message, f"{case.id}: {refused}")

    def test_one_broken_element_of_a_gradient_is_found(self, case: Any) -> None:
        """In layers without bias, by their weights alone."""
        refused = self.spoilt(case, "net.3", bias=False).refusal
        require(refused and "net.3.weight" in refused.message, f"{case.id}: {refused}")

    def test_fabric_takes_the_string(self, case: Any) -> None:
        """And trains, in both packages."""
        for root in case.paths:
            package = "lightning_fabric" if root == "pytorch_lightning" else "lightning.fabric"
            fabric: Any = importlib.import_module(package).Fabric(
                accelerator="cpu", devices=1, precision=case.info.name
            )
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(12, _WIDE), nn.ReLU(), nn.Linear(_WIDE, _WIDE), nn.ReLU(),
                                   nn.Linear(_WIDE, 3))  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
            x, losses = _normal(32, 12), []
            for _ in range(8):
                loss = F.cross_entropy(model(x), torch.arange(32, dtype=torch.int64, device="cpu") % 3)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            require(losses[-1] < losses[0], f"{case.id} in {package}: losses do not fall: {losses}")


def _unpacked(tensor: Tensor) -> Tensor:
    return tensor


def _pass(case: Any, *, compiled: bool) -> list[Tensor]:
    """Return output and gradients of one pass."""
    torch.manual_seed(0)
    model = _mixed()
    with _converted(case, model):
        call: Any = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        x = _normal(4, _CHANNELS, 6, 6).requires_grad_()
        out = call(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in (x, *model.parameters()) if p.grad is not None)]


def _two_steps(case: Any, default: torch.dtype) -> list[Tensor]:
    """Return output, gradients and weights after two steps of bfloat16 weights."""
    torch.manual_seed(0)
    model = _mixed().bfloat16()
    x = _normal(4, _CHANNELS, 6, 6).bfloat16().requires_grad_()
    with _converted(case, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        torch.set_default_dtype(default)
        try:
            for _ in range(2):
                optimizer.zero_grad()
                out = model(x)
                out.square().mean().backward()
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        return [out.detach(), *(p.grad for p in (x, *model.parameters()) if p.grad is not None),
                *(p.detach().clone() for p in model.parameters())]  # fmt: skip


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device="cpu")
