"""Token merging on the backend "triton": memory, addresses, the company of the rest of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from huge_tensors import untouched
from merge_cases import (
    DEVICE,
    DTYPES,
    NAN,
    PARTITIONS,
    Case,
    assert_right,
    assert_same,
    packed_case,
    randn,
    run,
    set_blocks,
)
from torch._dynamo.testing import CompileCounterWithBackend

from fastagglo.kernels import merge as kernel
from fastagglo.kernels import merge_move as move
from fastagglo.kernels.merge_plan import Image, Plan, make_plan
from fastagglo.ops import (
    MergedTokens,
    PackedLayout,
    merge,
    merge_tokens,
    merge_torch,
    unmerge_tokens,
    use_backend,
)
from fastagglo.ops.partition import plan_rounds
from fastagglo.ops.reference import merge as twin


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch)


@pytest.fixture
def _kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("match", "merge", "merge_backward", "unmerge", "unmerge_backward", "group"):
        monkeypatch.setattr(merge_torch, name, None)


# --- how tokens lie in memory


def _gaps(x: torch.Tensor) -> torch.Tensor:
    """Channels of NaN on both sides, at odd addresses."""
    memory = x.new_full((*x.shape[:-1], x.shape[-1] + 5), NAN)
    memory[..., 3:-2] = x
    return memory[..., 3:-2]


def _units_of_eight(x: torch.Tensor) -> torch.Tensor:
    memory = x.new_full((*x.shape[:-1], x.shape[-1] // 8 * 8 + 16), NAN)
    memory[..., : x.shape[-1]] = x
    return memory[..., : x.shape[-1]]


def _every_other_row(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, torch.full_like(x, NAN)], -2).flatten(-3, -2)[..., ::2, :]


@pytest.mark.parametrize("place", [_gaps, _units_of_eight, _every_other_row])
def test_strides_are_read_in_place(place: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Tokens, what is compared, and both kinds of gradient."""
    x = randn(45, 20, dtype=torch.float16).to(DEVICE)
    layout = PackedLayout.from_lengths([36, 9], device=DEVICE)
    with use_backend("triton"):
        expected = merge_tokens(x, [20, 5], layout=layout)
    slot, order, starts = expected.slot, expected.order, expected.starts
    y = randn(25, 20, seed=1, dtype=torch.float16).to(DEVICE)
    ops = torch.ops.fastagglo
    for rows in (x, y):
        view = place(rows)
        assert not view.is_contiguous()
        assert merge._readable(view) is view
    with use_backend("triton"):
        merged = merge_tokens(place(x), [20, 5], layout=layout)
    assert torch.equal(merged.slot, slot)
    assert torch.equal(merged.x, expected.x)
    assert torch.equal(ops.unmerge_fwd(place(y), slot, True), ops.unmerge_fwd(y, slot, True))
    for call in (
        lambda x, y: ops.merge_bwd(y, None, expected.size, slot, True),
        lambda x, y: ops.unmerge_bwd(x, order, starts, True),
    ):
        assert torch.equal(call(place(x), place(y)), call(x, y))


def test_other_strides_are_copied() -> None:
    x = randn(2, 6, 30).mT  # (2, 30, 6), as from a convolution
    wide = randn(2, 30, 12)
    size = torch.randint(1, 4, (30, 2), generator=torch.Generator().manual_seed(1)).mT
    for view in (x, wide[..., ::2], wide[:, :, 6:]):
        case = Case(view, 19, {"size": size})
        assert_same(run(case, "triton"), run(Case(view.contiguous(), 19, case.options), "triton"))


def test_repeated_tokens() -> None:
    x = randn(1, 1, 16).expand(2, 12, 16)
    assert_right(Case(x, 8))


# --- addresses


@pytest.mark.parametrize("odd", [0, 1])
def test_rows_beyond_2_31_elements(odd: int) -> None:
    """Tokens so far apart that most begin beyond 2**31, with a stride in units of 8 and without."""
    torch.use_deterministic_algorithms(False)  # which would fill huge tensors with NaN
    stride = 2**27 + odd
    x = randn(36, 20, dtype=torch.float16).to(DEVICE)
    far = (
        untouched(36 * stride, dtype=torch.float16, device=DEVICE)
        .as_strided((36, 20), (stride, 1))
        .copy_(x)
    )
    assert merge._readable(far) is far
    rounds = plan_rounds(36, 9, "alternate", (0, 0), 0, (2, 2), 0)
    plan = make_plan([Image(36, 0, rounds)], (16, 16))
    buffer = plan.buffer.to(DEVICE)
    expected = kernel.match(x, None, buffer, plan)
    found = kernel.match(far, None, buffer, plan)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    _, slot, order, starts = found
    for mean in (False, True):
        sums = (move.segment_sum(rows, order, starts, mean=mean)[0] for rows in (far, x))
        assert torch.equal(*sums)
    slots = slot[:9] * 4 + slot[9:18]  # rows near and far
    assert torch.equal(move.gather(far, slots), move.gather(x, slots))


def test_results_beyond_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' own last rows of a result that is larger."""
    torch.use_deterministic_algorithms(False)
    channels = 2**28 if DEVICE == "cpu" else 2**24
    count = 2**31 // channels + 3  # rows
    # Only a few channels of each row, the first program's, are looked at.
    monkeypatch.setattr(move, "_columns", lambda channels: 16)
    usual = torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, **options):
        if options or shape == (0,):  # the interpreter's own, and one without pages
            return usual(self, *shape, dtype=dtype, **options)
        return untouched(*shape, dtype=dtype or self.dtype, device=DEVICE)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    for name in ("gather_kernel", "segment_kernel"):
        monkeypatch.setattr(move, name, OneColumn(getattr(move, name)))
    x = untouched(count, channels, dtype=torch.float16, device=DEVICE)
    x[:, :16] = randn(count, 16).to(x)
    slots = torch.arange(count, device=DEVICE).flip(0)
    out = move.gather(x, slots)
    assert torch.equal(out[:, :16], x[:, :16].flip(0))
    starts = torch.arange(count + 1, device=DEVICE, dtype=torch.int32)
    out, _ = move.segment_sum(x, slots.int(), starts)
    assert torch.equal(out[:, :16], x[:, :16].flip(0))


class OneColumn:
    """A kernel of whose grid only the first program in the second dimension runs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return self.kernel[(grid[0], 1)]


# --- the op


@pytest.mark.usefixtures("_kernels_alone")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    """The schema, and that shapes, dtypes and strides are as the fake kernels tell a compiler."""
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, and NaN is not NaN
    x = randn(20, 6, dtype=dtype).to(DEVICE)
    images = torch.tensor([[9, 4, 3, 3], [8, 8, 2, 4]])
    ops = torch.ops.fastagglo
    for size in (torch.rand(20, device=DEVICE) + 1, None):
        arguments = (x, size, images, 12, "alternate", 0, 2, 2, 0, True)
        torch.library.opcheck(ops.merge_match.default, arguments)
        _, slot, order, starts = ops.merge_match(*arguments)
        torch.library.opcheck(ops.merge_fwd.default, (x, size, slot, order, starts, True))
        y, total = ops.merge_fwd(x, size, slot, order, starts, True)
        torch.library.opcheck(ops.merge_bwd.default, (y, size, total, slot, True))
    torch.library.opcheck(ops.unmerge_fwd.default, (y, slot, True))
    torch.library.opcheck(ops.unmerge_bwd.default, (x, order, starts, True))


@pytest.mark.usefixtures("_kernels_alone")
def test_one_compiled_graph_serves_every_length() -> None:
    torch._dynamo.reset()

    def function(x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        merged = merge_tokens(x, 9, size=size, metric=x.view(*x.shape[:2], 2, 4))
        return unmerge_tokens(merged.x * 2, merged), merged.x, merged.size, merged.index

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    with use_backend("triton"):
        for length in (16, 20, 24):  # the second makes the length a symbol
            x = randn(2, length, 8).to(DEVICE).requires_grad_()
            size = torch.rand(2, length, device=DEVICE) + 1
            upstream = randn(2, length, 8, seed=1).to(DEVICE)
            results = []
            for call in (compiled, function):
                out = call(x, size)
                results.append((*out, *torch.autograd.grad(out[0], x, upstream)))
            torch.testing.assert_close(*results, rtol=0, atol=0)
    assert counter.frame_count == 2


@pytest.mark.usefixtures("_kernels_alone")
def test_gradient_only_where_asked() -> None:
    x, metric, size = (t.to(DEVICE) for t in (randn(1, 12, 4), randn(1, 12, 3), torch.ones(1, 12)))
    with use_backend("triton"):
        frozen = merge_tokens(x, 7, metric=metric.clone().requires_grad_(), size=size)
        assert not frozen.x.requires_grad
        x.requires_grad_()
        metric.requires_grad_()
        size.requires_grad_()
        merged = merge_tokens(x, 7, metric=metric, size=size)
        assert not merged.size.requires_grad
        (2 * merged.x).sum().backward()
        y = merged.x.detach()
        assert not unmerge_tokens(y, merged).requires_grad
    assert metric.grad is None
    assert size.grad is None
    share = 2 / merged.size.gather(1, merged.index)
    torch.testing.assert_close(x.grad, share[..., None].expand_as(x))


def test_unmerge_takes_any_trailing_shape() -> None:
    merged = run(Case(randn(2, 10, 4), 6), "triton").merged
    with use_backend("triton"):
        for trail in ((), (1,), (3, 5), (0,)):
            y = randn(2, 6, *trail).to(DEVICE).requires_grad_()
            back = unmerge_tokens(y, merged)
            assert torch.equal(back, twin.unmerge_tokens(y, merged))
            (grad,) = torch.autograd.grad(back, y, torch.ones_like(back))
            assert torch.equal(grad, merged.size.view(2, 6, *(1 for _ in trail)).expand_as(y))


def test_tokens_that_the_twin_merged() -> None:
    """They come without the order of the tokens."""
    x = randn(2, 14, 4)
    theirs, ours = twin.merge_tokens(x, 9), run(Case(x, 9), "triton").merged
    assert theirs.order is None
    moved = MergedTokens(
        theirs.x.to(DEVICE), theirs.size.to(DEVICE), *(None, None), theirs.slot.to(DEVICE)
    )
    upstream = randn(2, 14, 3, seed=1).to(DEVICE)
    grads = []
    for merged in (moved, ours):
        y = torch.zeros(2, 9, 3, device=DEVICE, requires_grad=True)
        with use_backend("triton"):
            grads.append(torch.autograd.grad(unmerge_tokens(y, merged), y, upstream)[0])
    assert torch.equal(*grads)


def test_the_backend_of_a_backward_is_that_of_its_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = randn(1, 12, 4).to(DEVICE).requires_grad_()
    with use_backend("triton"):
        merged = merge_tokens(x, 7)
        back = unmerge_tokens(merged.x, merged)
    monkeypatch.setattr(merge_torch, "merge_backward", None)
    monkeypatch.setattr(merge_torch, "unmerge_backward", None)
    with use_backend("torch"):
        back.sum().backward()
    assert x.grad.isfinite().all()


def test_float64_is_pytorchs() -> None:
    x = randn(1, 12, 4, dtype=torch.float64).to(DEVICE)
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"merge_tokens: .*take bfloat16.*float64.*'torch'"):
            merge_tokens(x, 7)
        with pytest.raises(ValueError, match=r"got torch\.float64"):
            merge_tokens(x.float(), 7, metric=x)
        merged = merge_tokens(x.float(), 7)
        with pytest.raises(ValueError, match=r"unmerge_tokens: .*float64"):
            unmerge_tokens(x[:, :7], merged)
    assert merge_tokens(x, 7).x.dtype == torch.float64  # by default what can do it


def test_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Plan] = []

    def recorded(*arguments: object) -> Plan:
        made.append(make_plan(*arguments))
        return made[-1]

    merge._plan.cache_clear()
    monkeypatch.setattr(merge, "make_plan", recorded)
    with use_backend("triton"):
        for seed in (1, 2):
            merge_tokens(randn(2, 12, 4, seed=seed).to(DEVICE), 7)
        merge_tokens(randn(2, 12, 4).to(DEVICE), 8)
    assert len(made) == 2


def test_equal_images_share_their_lists() -> None:
    rounds = plan_rounds(36, 9, "strided", (6, 6), 0, (2, 2), 0)
    sizes = [len(make_plan([Image(36, 0, rounds)] * n, (16, 16)).buffer) for n in (1, 2, 3)]
    # A row of the table and the work alone: two tiles of sources, one of destinations.
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 15 + 2 * (2 + 1)


# --- on a GPU alone

on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_call_never_waits_for_the_device(partition: str) -> None:
    case = packed_case([(9, 9), (4, 5)], [30, 10], 24, partition=partition)
    run(case, "triton")  # compiles
    torch.use_deterministic_algorithms(False)
    x = case.x.cuda().requires_grad_()
    layout = case.options["layout"].to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        merged = merge_tokens(x, [30, 10], layout=layout, grid=[(9, 9), (4, 5)])
        unmerge_tokens(merged.x, merged).sum().backward()  # a wait would raise
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.gpu
@on_a_gpu
def test_a_cuda_graph() -> None:
    torch.use_deterministic_algorithms(False)
    x = randn(2, 81, 24, dtype=torch.bfloat16).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        merge_tokens(x, 30)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = merge_tokens(x, 30)
    merge._plan.cache_clear()
    for seed in (1, 2):
        x.copy_(randn(2, 81, 24, seed=seed))
        graph.replay()
        expected = merge_tokens(x, 30)
        assert torch.equal(captured.x, expected.x)
        assert torch.equal(captured.index, expected.index)
