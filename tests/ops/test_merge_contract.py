"""What token merging promises beside its result: memory, precision, gradients, compile, errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastagglo.ops import merge as op
from fastagglo.ops import merge_torch
from fastagglo.ops.backend import use_backend
from fastagglo.ops.layout import PackedLayout
from fastagglo.ops.merge import MergedTokens, merge_tokens, unmerge_tokens
from fastagglo.ops.partition import plan_rounds
from fastagglo.ops.reference import merge as twin

PARTITIONS = ("alternate", "strided", "random2d")
IMPLEMENTATIONS = {"op": op, "twin": twin}
# Relative error of a mean of a few numbers near 1, rounded once to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- blocks, precision and determinism


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest storage that an operator returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_similarity_matrix(dtype: torch.dtype) -> None:
    # 2,600 x 1,300 similarities are 13 MB; the largest thing held is one block of 4 MiB.
    x, size = randn(3900, 8, dtype=dtype), torch.ones(3900)
    rounds = plan_rounds(3900, 2000, "strided", (60, 65), 0, (1, 3), 0)
    with LargestTensor() as largest:
        slot = merge_torch.assign(x, size, rounds, 0)
    assert 3 << 20 < largest.bytes <= 4 << 20
    expected = twin.merge_tokens(x[None], 2000, partition="strided", grid=(60, 65), stride=(1, 3))
    assert torch.equal(slot, expected.index[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_small_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(2, 90, 10, dtype=dtype).requires_grad_()
    upstream = randn(2, 17, 10, seed=1, dtype=dtype)
    results = []
    for bytes_ in (merge_torch._BLOCK_BYTES, 1000):
        monkeypatch.setattr(merge_torch, "_BLOCK_BYTES", bytes_)
        merged = merge_tokens(x, 17, size=torch.full((2, 90), 3))
        (gradient,) = torch.autograd.grad(merged.x, x, upstream)
        results.append((merged.index, merged.x, gradient))
    for whole, blocks in zip(*results, strict=True):
        assert torch.equal(whole, blocks)


def test_deterministic() -> None:
    x = randn(2, 400, 32)
    first, second = (merge_tokens(x, 111, size=torch.ones(2, 400) / 3) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.index, second.index)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_autocast_does_not_choose(which: str) -> None:
    x = randn(2, 200, 64)
    plain = merge_tokens(x, 120)
    with torch.autocast("cpu", torch.bfloat16):
        merged = IMPLEMENTATIONS[which].merge_tokens(x, 120)
    assert torch.equal(merged.index, plain.index)
    assert merged.x.dtype == torch.float32


def test_matmul_precision_is_left_as_it_was() -> None:
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        merge_tokens(randn(1, 10, 4), 6)
        with pytest.raises(ValueError, match="NaN"):
            merge_tokens(torch.full((1, 10, 4), torch.nan), 6)
        assert [backend.fp32_precision for backend in backends] == ["tf32", "tf32"]
        with merge_torch.full_precision(torch.device("cpu")):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_default_device_does_not_matter(which: str, partition: str) -> None:
    x, tokens = randn(2, 35, 4), IMPLEMENTATIONS[which]
    arguments = {"partition": partition, "grid": (5, 7), "seed": 9}
    plan_rounds.cache_clear()
    with torch.device("meta"):
        for keep in (20, 3, [7, 30]):
            merged = tokens.merge_tokens(x, keep, **arguments)
            assert tokens.unmerge_tokens(merged.x, merged).device.type == "cpu"
    plan_rounds.cache_clear()
    assert torch.equal(merged.x, tokens.merge_tokens(x, keep, **arguments).x)


@pytest.mark.parametrize("scale", [1e-9, 1e15])
def test_magnitude_does_not_matter(scale: float) -> None:
    x = randn(1, 60, 8)
    assert torch.equal(merge_tokens(x * scale, 20).index, merge_tokens(x, 20).index)


def test_float16_sums_do_not_overflow() -> None:
    x = torch.full((1, 64, 4), 60_000.0, dtype=torch.float16, requires_grad=True)
    merged = merge_tokens(x, 1)
    assert merged.x.eq(60_000).all()
    (gradient,) = torch.autograd.grad(merged.x, x, torch.full_like(merged.x, 64))
    assert gradient.eq(1).all()


def test_nan_tokens_stay_alone_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU nothing is refused: a NaN similarity counts as minus infinity. Here on the CPU.
    x = randn(40, 8)
    x[[3, 8, 21]] = torch.nan  # two destinations, one source
    products = merge_torch._products

    def masked(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return products(a, b).nan_to_num_(nan=-torch.inf)

    monkeypatch.setattr(merge_torch, "_products", masked)
    rounds = plan_rounds(40, 25, "alternate", (0, 0), 0, (2, 2), 0)
    slot = merge_torch.assign(x, torch.ones(40), rounds, 0)
    counts = torch.bincount(slot)
    assert counts[slot[[3, 8, 21]]].tolist() == [1, 1, 1]
    assert slot.max() == 24
    # Where all sources must go, the NaN one goes too.
    rounds = plan_rounds(40, 20, "alternate", (0, 0), 0, (2, 2), 0)
    assert merge_torch.assign(x, torch.ones(40), rounds, 0).max() == 19


# --- gradients


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_gradcheck(which: str, partition: str) -> None:
    tokens = IMPLEMENTATIONS[which]
    x = randn(2, 1 + 12, 2, dtype=torch.float64).requires_grad_()
    size = torch.arange(1.0, 27).view(2, 13)
    arguments = {"partition": partition, "grid": (3, 4), "protect": 1, "size": size}
    for keep in (9, [3, 8]):
        merged = tokens.merge_tokens(x, keep, **arguments)
        assert not merged.size.requires_grad

        def forward(x: torch.Tensor, keep: int | list[int] = keep) -> torch.Tensor:
            return tokens.merge_tokens(x, keep, **arguments).x

        def back(y: torch.Tensor, merged: MergedTokens = merged) -> torch.Tensor:
            return tokens.unmerge_tokens(y, merged)

        assert torch.autograd.gradcheck(forward, (x,))
        y = randn(*merged.x.shape, seed=1, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(back, (y,))


def test_gradcheck_packed() -> None:
    layout = PackedLayout.from_lengths([7, 0, 9], capacity=18)
    x = randn(18, 3, dtype=torch.float64).requires_grad_()

    def round_trip(x: torch.Tensor) -> torch.Tensor:
        merged = merge_tokens(x, [3, 0, 5], layout=layout)
        return unmerge_tokens(merged.x, merged)

    assert torch.autograd.gradcheck(round_trip, (x,))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_match_the_twin(dtype: torch.dtype) -> None:
    x = randn(2, 40, 6, dtype=dtype).requires_grad_()
    size = torch.randint(1, 9, (2, 40), generator=torch.Generator().manual_seed(1))
    gradients = []
    for tokens in (op, twin):
        merged = tokens.merge_tokens(x, 13, size=size)
        loss = tokens.unmerge_tokens(merged.x, merged)
        gradients.extend(torch.autograd.grad(loss, x, 3 * randn(2, 40, 6, seed=2, dtype=dtype)))
    # A slot's gradient is a sum of up to 40 terms near 3, which the twin keeps in the low dtype.
    tolerance = TOLERANCE[dtype] * 12
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_gradient_only_where_asked() -> None:
    x, metric, size = randn(1, 12, 4), randn(1, 12, 3), torch.ones(1, 12)
    frozen = merge_tokens(x, 5, metric=metric.clone().requires_grad_(), size=size)
    assert not frozen.x.requires_grad
    x.requires_grad_()
    metric.requires_grad_()
    size.requires_grad_()
    merged = merge_tokens(x, 5, metric=metric, size=size)
    assert not merged.size.requires_grad
    (2 * merged.x).sum().backward()
    assert metric.grad is None
    assert size.grad is None
    share = 2 / merged.size.gather(1, merged.index)
    torch.testing.assert_close(x.grad, share[..., None].expand_as(x))
    with torch.no_grad():
        assert not merge_tokens(x, 5).x.requires_grad


# --- torch.library, torch.compile, backends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x = randn(20, 6, dtype=dtype)
    size = torch.rand(20) + 1
    images = torch.tensor([[9, 4, 3, 3], [8, 8, 2, 4]])
    ops = torch.ops.fastagglo
    for own in (size, None):
        for partition in PARTITIONS:
            arguments = (x, own, images, 12, partition, 0, 2, 2, 0, False)
            torch.library.opcheck(ops.merge_match.default, arguments)
        _, slot, order, starts = ops.merge_match(*arguments)
        torch.library.opcheck(ops.merge_fwd.default, (x, own, slot, order, starts, False))
        y, total = ops.merge_fwd(x, own, slot, order, starts, False)
        torch.library.opcheck(ops.merge_bwd.default, (y, own, total, slot, False))
    torch.library.opcheck(ops.unmerge_fwd.default, (y, slot, False))
    torch.library.opcheck(ops.unmerge_bwd.default, (x, order, starts, False))


@pytest.mark.parametrize("partition", PARTITIONS)
def test_compile(partition: str) -> None:
    def function(x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grid = (4, x.shape[1] // 4)
        merged = merge_tokens(
            x, 9, size=size, metric=x.view(*x.shape[:2], 2, 4), partition=partition, grid=grid
        )
        return unmerge_tokens(merged.x * 2, merged), merged.x, merged.size, merged.index

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (20, 32):  # the second makes the length a symbol
        x = randn(2, length, 8).requires_grad_()
        size = torch.rand(2, length) + 1
        expected, actual = function(x, size), compiled(x, size)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
        upstream = randn(2, length, 8, seed=1)
        (gradient,) = torch.autograd.grad(expected[0], x, upstream)
        assert torch.equal(torch.autograd.grad(actual[0], x, upstream)[0], gradient)
    with pytest.raises(ValueError, match="NaN"):
        compiled(x * torch.nan, size)


def test_backends() -> None:
    x = randn(1, 8, 4)
    with use_backend("torch"):
        merged = merge_tokens(x, 5)
    for backend in ("triton", "xformers"):
        with use_backend(backend):
            with pytest.raises(ValueError, match=backend):
                merge_tokens(x, 5)
            with pytest.raises(ValueError, match=backend):
                unmerge_tokens(merged.x, merged)


# --- errors


X = randn(2, 13, 4)
PACKED = PackedLayout.from_lengths([6, 7])
STRIDED = {"partition": "strided", "protect": 1}


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (TypeError, "x must be a Tensor", {"x": [[1.0]], "keep": 1}),
        (TypeError, "x must be float16.*int64", {"x": X.long(), "keep": 5}),
        (ValueError, "without a layout", {"x": X[0], "keep": 5}),
        (ValueError, r"must be \(13, C\)", {"x": X, "layout": PACKED, "keep": 5}),
        (ValueError, r"must be \(13, C\)", {"x": X[0, :12], "layout": PACKED, "keep": 5}),
        (TypeError, "layout must be a PackedLayout", {"x": X[0], "layout": [6, 7], "keep": 5}),
        (ValueError, "between 1 and its 13", {"keep": 0}),
        (ValueError, "between 1 and its 13.*got 14", {"keep": 14}),
        (ValueError, "between 3 and its 13.*got 2", {"keep": 2, "protect": 2}),
        (ValueError, "image 1 must be between 1 and its 13", {"keep": [4, -1]}),
        (
            ValueError,
            "image 0 must be between 1 and its 6",
            {"x": X[0], "layout": PACKED, "keep": 7},
        ),
        (ValueError, "got 3 for 2 images", {"keep": [4, 4, 4]}),
        (TypeError, "keep must be an int, got float", {"keep": 4.5}),
        (TypeError, "keep must be an int, got a bool", {"keep": True}),
        (TypeError, "keep must be an int", {"keep": ["a", "b"]}),
        (ValueError, "needs grid", {"keep": 5, **STRIDED}),
        (ValueError, "needs grid", {"keep": 5, "partition": "random2d"}),
        (ValueError, "3 x 5 = 15 cells.*12", {"keep": 5, "grid": (3, 5), **STRIDED}),
        (ValueError, "3 x 5 = 15 cells", {"keep": 5, "grid": (3, 5)}),
        (ValueError, "image 1 is 4 x 4", {"keep": 5, "grid": [(3, 4), (4, 4)], **STRIDED}),
        (ValueError, "3 grids for 2 images", {"keep": 5, "grid": [(3, 4)] * 3, **STRIDED}),
        (ValueError, r"image 0 must be \(h, w\)", {"keep": 5, "grid": [(3, 4, 1)] * 2, **STRIDED}),
        (ValueError, "-3 x -4", {"keep": 5, "grid": (-3, -4), **STRIDED}),
        (TypeError, "grid must be an int", {"keep": 5, "grid": (3.0, 4.0), **STRIDED}),
        (TypeError, r"grid must be \(h, w\).*got int", {"keep": 5, "grid": 12, **STRIDED}),
        (
            TypeError,
            r"image 1 must be \(h, w\), got 12",
            {"keep": 5, "grid": [(3, 4), 12], **STRIDED},
        ),
        (ValueError, "seed must fit", {"keep": 5, "seed": 2**64}),
        (ValueError, r"at least one channel.*\(2, 13, 0\)", {"x": X[..., :0], "keep": 5}),
        (ValueError, "stride must be at least", {"keep": 5, "stride": (0, 2)}),
        (ValueError, r"stride must be \(rows, columns\)", {"keep": 5, "stride": 2}),
        (
            ValueError,
            "between 4 and its 13",
            {"keep": 3, "grid": (3, 4), "stride": (1, 2), **STRIDED},
        ),
        (ValueError, "partition must be one of", {"keep": 5, "partition": "odd"}),
        (ValueError, "protect must be between 0", {"keep": 5, "protect": -1}),
        (ValueError, "protect must be between 0", {"keep": 5, "protect": 14}),
        (TypeError, "protect must be an int", {"keep": 5, "protect": 1.0}),
        (TypeError, "seed must be an int", {"keep": 5, "seed": None}),
        (ValueError, r"size must be \(2, 13\)", {"keep": 5, "size": torch.ones(2, 12)}),
        (TypeError, "size must be a real", {"keep": 5, "size": torch.ones(2, 13).bool()}),
        (TypeError, "size must be a real", {"keep": 5, "size": [1.0]}),
        (ValueError, "size is on meta", {"keep": 5, "size": torch.ones(2, 13, device="meta")}),
        (ValueError, "size must be positive", {"keep": 5, "size": torch.zeros(2, 13)}),
        (ValueError, "size must be positive", {"keep": 13, "size": -torch.ones(2, 13)}),
        (ValueError, "size must be positive", {"keep": 5, "size": torch.full((2, 13), torch.inf)}),
        (ValueError, r"metric must be \(2, 13\)", {"keep": 5, "metric": randn(2, 12, 4)}),
        (ValueError, r"metric must be \(2, 13\)", {"keep": 5, "metric": randn(2, 13)}),
        (ValueError, r"metric must be \(2, 13\)", {"keep": 5, "metric": randn(2, 13, 1, 1, 1)}),
        (ValueError, "metric is empty", {"keep": 5, "metric": randn(2, 13, 0)}),
        (TypeError, "metric must be float16", {"keep": 5, "metric": X.long()}),
        (ValueError, "NaN", {"x": X.clone().index_fill_(1, torch.tensor(3), torch.nan), "keep": 5}),
        (ValueError, "infinity", {"x": X.clone().fill_(torch.inf), "keep": 13}),
        (ValueError, "NaN", {"keep": 5, "metric": X * torch.nan}),
        (ValueError, "NaN", {"x": X * torch.nan, "keep": 5, "metric": X}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(which: str, error: type[Exception], text: str, arguments: dict) -> None:
    arguments = {"x": X, **arguments}
    with pytest.raises(error, match=text):
        IMPLEMENTATIONS[which].merge_tokens(**arguments)


def test_nan_error_names_the_token() -> None:
    x = X.clone()
    x[1, 7, 2] = torch.nan
    with pytest.raises(ValueError, match="token 7 of image 1"):
        merge_tokens(x, 5)
    size = torch.ones(2, 13)
    size[1, 4] = -2
    with pytest.raises(ValueError, match=r"got -2.0 for token 4 of image 1"):
        merge_tokens(X, 5, size=size)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_unmerge_errors(which: str) -> None:
    unmerge = IMPLEMENTATIONS[which].unmerge_tokens
    merged = merge_tokens(X, 5)
    with pytest.raises(ValueError, match=r"\(2, 5\), got \(2, 6, 4\)"):
        unmerge(randn(2, 6, 4), merged)
    with pytest.raises(ValueError, match=r"\(2, 5\), got \(10, 4\)"):
        unmerge(randn(10, 4), merged)
    with pytest.raises(TypeError, match="y must be float16"):
        unmerge(torch.ones(2, 5, 4, dtype=torch.int32), merged)
    with pytest.raises(TypeError, match="merged must be"):
        unmerge(X, X)
    with pytest.raises(ValueError, match="y is on meta"):
        unmerge(randn(2, 5, 4).to("meta"), merged)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("partition", PARTITIONS)
def test_cuda(partition: str) -> None:
    x = randn(2, 1 + 99, 32)
    arguments = {"partition": partition, "grid": (9, 11), "protect": 1, "seed": 5}
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for keep in (60, 20, [30, 70]):
            actual = merge_tokens(x.cuda().requires_grad_(), keep, **arguments)
            expected = merge_tokens(x, keep, **arguments)
            assert torch.equal(actual.index.cpu(), expected.index)
            torch.testing.assert_close(actual.x.cpu(), expected.x, rtol=1e-5, atol=1e-6)
            unmerge_tokens(actual.x, actual).sum().backward()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_keeps_nan_tokens_alone() -> None:
    x = randn(1, 40, 8)
    x[0, [3, 8, 21]] = torch.nan  # two destinations, one source
    merged = merge_tokens(x.cuda(), 25)
    alone = merged.size[0][merged.index[0, [3, 8, 21]]]
    assert alone.tolist() == [1, 1, 1]
    assert int(merged.x.isnan().any(-1).sum()) == 3
