"""Steps replayed from a graph: every number that changes reaches it, and none is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastagglo.errors import UserError
from fastagglo.model import HeadSpec, PackedBatch, Student, create_student, run_budget
from fastagglo.ops import attention
from fastagglo.train import graphs
from fastagglo.train.graphs import GraphedRun, check_graphs, own_gradients
from tests.train.test_budget import MIXED

HEADS = {"a": HeadSpec(summary=5, spatial=6, upsample=2), "b": HeadSpec(spatial=8)}
ROWS, IMAGES = 90, 11


class Captures:
    """torch.cuda.make_graphed_callables for a CPU.

    As on a GPU, arguments, outputs and gradients live in memory that each replay overwrites, and
    whatever is no tensor is what it was at the capture.
    """

    def __init__(self) -> None:
        self.count = 0
        self.options: list[dict[str, object]] = []

    def __call__(
        self,
        module: torch.nn.Module,
        own: tuple[Tensor, ...],
        *,
        pool: object = None,
        allow_unused_input: bool = False,
        capture_error_mode: str = "global",
    ) -> Callable[..., object]:
        assert not torch.is_autocast_enabled("cpu")
        assert isinstance(own, tuple)
        assert all(isinstance(x, Tensor) and not x.requires_grad for x in own)
        self.count += 1
        self.options.append({"pool": pool, "mode": capture_error_mode})
        forward, parameters = module.forward, tuple(module.parameters())
        leaves = tuple(p for p in parameters if p.requires_grad)
        static: dict[str, Any] = {}

        def put(name: str, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            if name not in static:
                static[name] = [None if v is None else v.detach().clone() for v in values]
            for kept, value in zip(static[name], values, strict=True):
                assert (kept is None) == (value is None)
                if kept is not None:
                    kept.copy_(value.detach())
            return tuple(None if v is None else v.detach() for v in static[name])

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
                for mine, new in zip(own, inputs[: len(own)], strict=True):
                    mine.copy_(new)
                with torch.set_grad_enabled(bool(leaves) and grad):
                    outputs = forward(*own)
                flat, static["spec"] = torch.utils._pytree.tree_flatten(outputs)
                static["live"] = flat
                return put("outputs", flat)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
                pairs = [
                    (o, g) for o, g in zip(static["live"], grads, strict=True) if o.requires_grad
                ]
                found = torch.autograd.grad(
                    [o for o, _ in pairs],
                    leaves,
                    [g.clone() for _, g in pairs],
                    allow_unused=allow_unused_input,
                )
                found = iter(put("grads", found))
                return *(None for _ in own), *(
                    next(found) if p.requires_grad else None for p in parameters
                )

        grad = torch.is_grad_enabled()

        def replay(*given: Tensor) -> object:
            out = Graphed.apply(*given, *parameters)
            return torch.utils._pytree.tree_unflatten(out, static["spec"])

        return replay


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", found)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return found


def student(**changes: Any) -> Student:
    torch.manual_seed(0)
    model = create_student(
        "tiny",
        heads=HEADS,
        **{"depth": 2, "global_layers": 1, "registers": 2, "max_resolution": 128} | changes,
    )
    return model.double()


def batches() -> Iterator[PackedBatch]:
    generator = torch.Generator().manual_seed(3)
    for mix in (((1, 96), (4, 32)), ((2, 64), (3, 32)), ((9, 32),), ((1, 64),), ((1, 32), (2, 64))):
        groups = [
            torch.randint(0, 256, (n, 3, s, s), dtype=torch.uint8, generator=generator)
            for n, s in mix
        ]
        yield PackedBatch.from_images(groups, ROWS, IMAGES)


def results(
    model: Student, batch: PackedBatch, seed: int, **options: Any
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Copies of all outputs, and the gradients of a loss of them."""
    torch.manual_seed(seed)
    output = model(batch, **options)
    values = [output.backbone.summary, *output.backbone.spatial]
    values += [x for f in output.values() for x in (f.summary, *(f.spatial or ())) if x is not None]
    kept = [x.detach().clone() for x in values]
    model.zero_grad(set_to_none=True)
    if values[-1].requires_grad:
        sum(x.square().sum() for x in values if x.requires_grad).backward()
    return kept, {
        n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("window", [None, 2])
def test_replays_equal_the_step_itself(captures: Captures, window: int | None) -> None:
    model = student(drop_path=0.2)
    rotation = torch.eye(6, dtype=torch.float64)
    run = GraphedRun(run_budget)
    for seed, batch in enumerate([*batches(), *batches()]):
        options = {"window": window, "rotations": {"a": rotation}}
        expected = results(model, batch, seed, **options)
        found = results(model, batch, seed, run=run, **options)
        # The very same operators.
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        if seed == 4:
            rotation.copy_(torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0])
            with torch.no_grad():
                model.blocks[0].mlp.fc1.weight.mul_(1.5)
    assert captures.count == 1
    assert captures.options == [{"pool": (0, 1), "mode": "thread_local"}]


def test_kinds_of_steps_have_graphs_of_their_own(captures: Captures) -> None:
    model, run = student(), GraphedRun(run_budget)
    average = student().eval().requires_grad_(False)
    (first, second, *_) = batches()

    def once() -> None:
        for batch in (first, second):
            for window in (None, 2):
                a, b = (results(model, batch, 0, window=window, run=r) for r in (run_budget, run))
                torch.testing.assert_close(b, a, rtol=0, atol=0)
            with torch.no_grad():
                a, b = (results(average, batch, 0, only=(), run=r) for r in (run_budget, run))
            torch.testing.assert_close(b, a, rtol=0, atol=0)

    once()
    assert captures.count == 3
    for parameter in model.trunk_parameters():
        parameter.requires_grad_(False)
    once()
    assert captures.count == 5
    a, b = (results(model, first, 0, only=("a",), run=r) for r in (run_budget, run))
    torch.testing.assert_close(b, a, rtol=0, atol=0)
    model.eval()
    a, b = (results(model, first, 0, run=r) for r in (run_budget, run))
    torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert captures.count == 7
    assert {option["pool"] for option in captures.options} == {(0, 1)}


def test_autocast_is_captured_with_the_step(captures: Captures) -> None:
    model, run = student().float(), GraphedRun(run_budget)
    for seed, batch in enumerate(batches()):
        with torch.autocast("cpu", torch.bfloat16):
            a, b = (results(model, batch, seed, run=r) for r in (run_budget, run))
        torch.testing.assert_close(b[0], a[0], rtol=0, atol=0)
        assert b[0][-1].dtype == torch.bfloat16
    assert captures.count == 1
    results(model, batch, 0, run=run)
    assert captures.count == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_graphs_equals_one_without(
    tiny: Any, captures: Captures, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """Micro-steps add up, though each overwrites the gradients that the last one gave."""
    monkeypatch.setattr("fastagglo.train.loop.check_graphs", lambda device, world: None)
    settings = tiny.settings(
        MIXED,
        {
            "optimiser": {"accumulate": accumulate},
            "distill": {"ema_decay": 0.9, "mesa_weight": 0.1},
        },
    )
    plain, _ = tiny.trained(settings, "plain")
    assert captures.count == 0
    graphed, _ = tiny.trained(tiny.settings(settings, {"student": {"graphs": True}}), "graphed")
    assert captures.count == 3  # the frozen trunk, the student, its average
    for name, value in plain.distiller.state_dict().items():
        if isinstance(value, Tensor):
            # Sums of micro-steps begin with a zero.
            torch.testing.assert_close(graphed.distiller.state_dict()[name], value)


def test_own_gradients() -> None:
    model = student()
    frozen, kept, new = list(model.parameters())[:3]
    frozen.grad, kept.grad = torch.ones_like(frozen), torch.ones_like(kept)
    frozen.requires_grad_(False)
    before = kept.grad
    own_gradients([frozen, kept, new])
    assert frozen.grad is None
    assert kept.grad is before
    assert not kept.grad.any()
    assert torch.equal(new.grad, torch.zeros_like(new))


def test_refuses(tiny: Any) -> None:
    with pytest.raises(UserError, match=r"student\.graphs is true: .* needs a GPU.* is on cpu"):
        tiny.trainer(tiny.settings(MIXED, {"student": {"graphs": True}}))
    with pytest.raises(UserError, match=r"student\.graphs is true: .*over the 2 ranks"):
        check_graphs(torch.device("cuda"), 2)
    check_graphs(torch.device("cuda"), 1)
    with pytest.raises(UserError, match=r"stages\.0\.tokens is 0: student\.graphs needs"):
        tiny.config(tiny.settings({"student": {"graphs": True}}))


def test_a_graph_does_not_keep_the_layout_of_its_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch path of attention reads it on the host."""
    q = SimpleNamespace(is_cuda=True, dtype=torch.float64, shape=(4, 2, 16))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    attention._refuse_capture(q)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"'torch' reads the layout on the host.*float64"):
        attention._refuse_capture(q)


def test_every_tensor_of_a_step_is_an_argument() -> None:
    """What is left behind would be that of the capture for ever."""
    seen: list[Any] = []

    def spy(model: Student, inputs: Any, rotations: Any, names: Any) -> Any:
        seen.append(inputs)
        return run_budget(model, inputs, rotations, names)

    model = student(drop_path=0.1)
    model(next(batches()), window=2, run=spy)
    _ = seen[0].slots.layout.tiles  # as on a GPU
    tensors = list(graphs.tensors_of(seen[0]))
    again = graphs.with_tensors(seen[0], iter([x + 1 for x in tensors]))
    assert len(list(graphs.tensors_of(again))) == len(tensors)
    for mine, other in zip(graphs.tensors_of(again), tensors, strict=True):
        assert torch.equal(mine, other + 1)
    assert torch.equal(again.slots.layout.tiles, seen[0].slots.layout.tiles + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 8])
def test_on_a_gpu(window: int | None) -> None:
    model = student(max_resolution=256).float().cuda()
    run = GraphedRun(run_budget)
    generator = torch.Generator().manual_seed(3)
    for seed, mix in enumerate((((2, 128), (1, 256)), ((5, 128),), ((1, 256), (3, 128))) * 2):
        groups = [
            torch.randint(0, 256, (n, 3, s, s), dtype=torch.uint8, generator=generator).cuda()
            for n, s in mix
        ]
        batch = PackedBatch.from_images(groups, 512, 8)
        with torch.autocast("cuda", torch.bfloat16):
            a, b = (results(model, batch, seed, window=window, run=r) for r in (run_budget, run))
        # The same kernels; scatter-adds on a GPU may add in another order.
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)
