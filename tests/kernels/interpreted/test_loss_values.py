"""The multi-teacher loss's kernels against the eager twin: dtypes, widths, numbers and mixes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_cases import (
    DTYPES,
    KINDS,
    MASKS,
    NORMALISERS,
    Case,
    affine,
    assert_right,
    make_case,
    mask_of,
    randn,
    run,
    total,
)

from fastagglo.ops import LossTerm


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Alone, and against a target of another dtype; beside terms in full precision."""
    cases = [
        make_case(kind, "equal", 16, dtype=dtype, normaliser="each_scale", mask="grid"),
        make_case(kind, "shift_each", 13, dtype=dtype, normaliser="one_scale"),
        make_case(kind, "prediction_up", 16, dtype=dtype, target_dtype=torch.float32),
        make_case(kind, "equal", 16, target_dtype=dtype, mask="images"),
    ]
    # Gradients in the range where fp16 has all its bits.
    assert_right(cases, what=lambda loss: 1024 * total(loss))
    assert_right(cases[:2])


@pytest.mark.parametrize("channels", [1, 5, 40, 257, 1000, 1280, 2049, 4096])
def test_widths(channels: int) -> None:
    """Of no block, of some, ragged and whole; whole tokens and channel by channel."""
    # One channel has no angle: its gradient is what rounding leaves of a difference.
    kinds = ("mse", "cosine_smooth_l1", "angular") if channels > 1 else ("mse", "smooth_l1")
    cases = [make_case(kind, "", channels, normaliser="each_scale", images=3) for kind in kinds]
    cases.append(make_case("mse", "target_up", channels, images=1, normaliser="one_scale"))
    assert_right(cases[:1])  # in a launch without losses of whole tokens
    assert_right(cases)


@pytest.mark.parametrize("channels", [257, 1280])
def test_widths_of_resized_predictions(channels: int) -> None:
    assert_right(
        [
            make_case(kind, "prediction_down", channels, images=1, normaliser="each_scale")
            for kind in ("smooth_l1", "cosine_smooth_l1")
        ]
    )


@pytest.mark.parametrize("grid", [(1, 1), (16, 1), (1, 17), (5, 7)])
def test_blocks_of_tokens(grid: tuple[int, int]) -> None:
    """Programs of 16 tokens: whole, ragged, and across images."""
    cases = [
        Case(
            randn(3, *grid, 8),
            randn(3, *grid, 8, seed=1),
            LossTerm(kind, shift=shift),
            mask_of(mask, 3, grid),
        )
        for kind, mask, shift in (
            ("mse", "none", None),
            ("angular", "grid", None),
            ("cosine", "none", (0.5, 0.0)),
        )
    ]
    assert_right(cases)


def test_summaries() -> None:
    """(N, C): no grid, masks for images only."""
    cases = [
        make_case(kind, "", 24, images=5, normaliser=normaliser, mask=mask)
        for kind, normaliser, mask in itertools.product(KINDS, ("none", "rotation"), MASKS[:3:2])
    ]
    results = assert_right(cases)
    assert results.image_weights[0].tolist() == [1] * 5
    assert results.image_weights[1].tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("images", [0, 1])
def test_few_images(images: int) -> None:
    cases = [
        make_case(kind, geometry, images=images, mask=mask)
        for kind, geometry, mask in (
            ("mse", "equal", "none"),
            ("angular", "", "images"),
            ("cosine", "target_down", "grid"),
            ("smooth_l1", "prediction_up", "grid"),
            ("mse", "shift_whole", "none"),
        )
    ]
    results = assert_right(cases)
    if not images:
        assert not results.per_term.any()
        assert all(x.shape[0] == 0 for x in results.grads)


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_numbers_of_terms(count: int) -> None:
    """A term without programs at the start, in the middle and at the end, where there is room."""
    empty = {0, count // 2, count - 1} if count > 1 else set()
    cases = [
        make_case(
            KINDS[i % 5],
            ("", "equal", "shift_whole")[i % 3],
            (8, 5, 24)[i % 3],
            images=0 if i in empty else 1 + i % 3,
            mask=MASKS[i % 3],
            seed=i,
        )
        for i in range(count)
    ]
    assert_right(cases)


def test_any_order_of_unlike_terms() -> None:
    """Widths, grids, numbers of images and dtypes; the same bits in any company."""
    cases = [
        make_case("mse", "equal", 24, images=2, weight=0.5),
        make_case("angular", "", 5, images=3, dtype=torch.float16, dispersion=0.4),
        make_case("cosine", "target_up", 257, images=1, dtype=torch.float16, mask="grid"),
        make_case("smooth_l1", "prediction_up", 8, target_dtype=torch.float16),
    ]
    first = assert_right(cases, what=total)
    for order in ((3, 2, 1, 0), (1, 3, 0, 2)):
        results = run([cases[i] for i in order], what=total)
        torch.testing.assert_close(results.total, first.total, rtol=3e-7, atol=0)
        for at, i in enumerate(order):
            assert torch.equal(results.per_term[at], first.per_term[i])
            assert torch.equal(results.grads[at], first.grads[i])
            assert torch.equal(results.per_image[at], first.per_image[i])


@st.composite
def some_case(draw: st.DrawFn) -> Case:
    images, channels = draw(st.integers(0, 2)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(KINDS))
    spatial = draw(st.booleans())
    resize = draw(st.sampled_from(["larger", "student", "teacher"]))
    # Of a resized prediction every cell looks through all that may read it: small ones.
    sides = st.integers(1, 6 if resize == "student" else 3)
    ours, theirs = ((draw(sides), draw(sides)) if spatial else () for _ in "xt")
    shift = None
    if spatial:
        pair = st.tuples(*2 * [st.integers(-40, 40).map(lambda i: i / 16)])
        shift = draw(st.one_of(st.none(), pair, st.lists(pair, min_size=images, max_size=images)))
        if isinstance(shift, list):
            shift = torch.tensor(shift, dtype=torch.float32).reshape(images, 2)
    seed = draw(st.integers(0, 1000))
    dtype, target_dtype = (draw(st.sampled_from(DTYPES[:2])) for _ in "xt")
    term = LossTerm(
        kind,
        draw(st.sampled_from([1.0, 0.25, 0])),
        affine(draw(st.sampled_from(NORMALISERS)), channels, seed),
        beta=draw(st.sampled_from([0, 0.3, 2.0])),
        dispersion=draw(st.sampled_from([1.0, torch.tensor(2.1)])),
        resize=resize,
        shift=shift,
        denominator=draw(st.sampled_from([None, 3.5])),
    )
    x = randn(images, *ours, channels, seed=seed + 3, dtype=dtype)
    t = randn(images, *theirs, channels, seed=seed + 4, dtype=target_dtype)
    mask = mask_of(draw(st.sampled_from(MASKS)), images, theirs, seed)
    # Without the limits of "angular", where arccos is as ill-conditioned as the twin says it is.
    if channels == 1 and kind == "angular":
        term = LossTerm("cosine", resize=resize, shift=shift)
    return Case(x, t, term, mask, draw(st.booleans()))


@given(st.lists(some_case(), min_size=1, max_size=4))
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_random_mixes(cases: list[Case]) -> None:
    assert_right(cases)
