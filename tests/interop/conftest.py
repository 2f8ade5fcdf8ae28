"""Before and after: outputs and gradients of one model, run twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn


class Run(NamedTuple):
    """Results of one forward and backward, float64, by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def tensors(value: Any, name: str = "out") -> dict[str, Tensor]:
    """Every floating-point tensor of a result, however deep."""
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() else {}
    items = value.items() if hasattr(value, "items") else enumerate(value or ())
    if isinstance(value, str | int | float | bool):
        return {}
    found: dict[str, Tensor] = {}
    for key, part in items:
        found |= tensors(part, f"{name}.{key}")
    return found


def run(call: Callable[[], Any], model: nn.Module, *inputs: Tensor) -> Run:
    """Outputs of ``call``, and the gradients of a fixed sum over them."""
    for x in inputs:
        x.grad = None
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    outputs = tensors(call())
    generator = torch.Generator().manual_seed(3)
    total = sum(
        (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
        for y in outputs.values()
    )
    total.backward()
    named = [(f"input {i}", x) for i, x in enumerate(inputs)] + list(model.named_parameters())
    return Run(
        {name: y.detach().double() for name, y in outputs.items()},
        {name: x.grad.double() for name, x in named if x.grad is not None},
    )


def same(a: Run, b: Run, tolerance: float) -> None:
    """Every tensor of both within ``tolerance`` of its largest element."""
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        assert left
        # A gradient that cancels to nothing (of a key's bias, say) is noise of the largest one.
        floor = 1e-3 * max(x.abs().max().item() for x in left.values())
        for name, x in left.items():
            error = (x - right[name]).abs().max().item()
            scale = max(x.abs().max().item(), floor)
            assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"


def randomise(model: nn.Module) -> nn.Module:
    """Weights away from their initial zeros and ones: every one of them must matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


class Before:
    """What tests need, as one fixture: a module of helpers cannot be imported from here."""

    run = staticmethod(run)
    same = staticmethod(same)
    randomise = staticmethod(randomise)


@pytest.fixture(scope="session")
def helpers() -> type[Before]:
    return Before
