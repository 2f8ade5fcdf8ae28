"""The multi-teacher loss's kernels against the eager twin: every kind on every geometry."""

from __future__ import annotations

import pytest
from loss_cases import (
    GEOMETRIES,
    KINDS,
    MASKS,
    NORMALISERS,
    assert_right,
    make_case,
)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_geometry(kind: str, geometry: str) -> None:
    """With two masks and two normalisers; over all of them, each with each many times."""
    turn = KINDS.index(kind) * len(GEOMETRIES) + list(GEOMETRIES).index(geometry)
    cases = [
        make_case(
            kind,
            geometry,
            normaliser=NORMALISERS[(turn + 2 * i) % 4],
            mask=MASKS[(turn // 4 + i) % 4],
            weight=0.25 + i,
            seed=10 * i,
        )
        for i in range(2)
    ]
    results = assert_right(cases)
    assert any(x.any() for x in results.grads) == (geometry != "shift_away")
