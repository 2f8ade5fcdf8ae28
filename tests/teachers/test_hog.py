"""Histograms of oriented gradients against scikit-image, and as a teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data, feature

from fastagglo.teachers import hog, load_teacher


def skimage_blocks(image: np.ndarray, patch: int) -> np.ndarray:
    """scikit-image's blocks of 2 x 2 cells; they overlap by one cell: every second is ours."""
    blocks = feature.hog(
        image,
        orientations=9,
        pixels_per_cell=(patch // 2,) * 2,
        cells_per_block=(2, 2),
        block_norm="L2-Hys",
        channel_axis=-1,
        feature_vector=False,
    )
    blocks = blocks[::2, ::2]
    return blocks.reshape(*blocks.shape[:2], -1)


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_equals_skimage_on_photographs(patch):
    crops = [data.astronaut()[64:256, 96:352], data.coffee()[:192, :256]]
    images = np.stack(crops).astype(np.float64) / 255
    found = hog(torch.from_numpy(images).permute(0, 3, 1, 2), patch).numpy()
    expected = np.stack([skimage_blocks(image, patch) for image in images])
    assert found.shape == (2, 192 // patch, 256 // patch, 36)
    # scikit-image adds the votes in float32. A pixel whose orientation is exactly on a bin's edge
    # may fall on either side: one vote of the 16 to 256 of a cell, in few blocks.
    wrong = np.abs(found - expected).max(-1) > 1e-6
    assert wrong.mean() < 0.03
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_stripes_vote_for_one_orientation():
    """Vertical stripes: gradients run across, orientation 0; horizontal ones: 90 degrees."""
    stripes = (torch.arange(64) // 4 % 2).float().expand(1, 3, 64, 64)
    block = hog(stripes)[0, 1, 1].view(4, 9)
    torch.testing.assert_close(block[:, 0], torch.full((4,), 0.5))
    assert block[:, 1:].abs().max() == 0
    turned = hog(stripes.transpose(2, 3))[0, 1, 1].view(4, 9)
    torch.testing.assert_close(turned[:, 4], torch.full((4,), 0.5))


def test_strongest_channel_decides():
    images = torch.zeros(1, 3, 32, 32)
    images[:, 0] = torch.arange(32) * 0.001  # weak, along x
    images[:, 2] = (torch.arange(32) * 0.01)[:, None]  # strong, along y
    inner = hog(images, 8)[0, 1, 1].view(4, 9)
    torch.testing.assert_close(inner[:, 4], torch.full((4,), 0.5))


def test_as_a_teacher():
    teacher = load_teacher("builtin", "hog", name="edges")
    images = torch.randint(0, 256, (2, 3, 96, 48), dtype=torch.uint8)
    features = teacher(images)
    assert features.summary is None
    assert (teacher.spec.summary, teacher.spec.spatial) == (None, 36)
    assert features.spatial.shape == (2, *teacher.spec.grid((96, 48)), 36) == (2, 6, 3, 36)
    torch.testing.assert_close(features.spatial, hog(images.float() / 255))
    assert torch.equal(features.spatial, teacher(images).spatial)
    # One image at a time gives the same: nothing mixes images.
    assert torch.equal(features.spatial[1:], teacher(images[1:]).spatial)
    assert teacher(images[:0]).spatial.shape == (0, 6, 3, 36)


def test_finer_cells_and_half_precision_request():
    images = torch.rand(1, 3, 32, 40)
    teacher = load_teacher("builtin", "hog", layer="stride8", dtype="bf16")
    assert torch.equal(teacher(images).spatial, hog(images, 8))
    with pytest.raises(ValueError, match="multiples of 8 pixels; got 32 x 44"):
        teacher(torch.rand(1, 3, 32, 44))


def test_flat_image_is_zero():
    assert hog(torch.full((1, 3, 32, 32), 0.3)).abs().max() == 0
