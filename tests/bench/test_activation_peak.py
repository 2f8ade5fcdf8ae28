"""The planner's count of activations against a measured peak."""

from __future__ import annotations

import pytest
import torch

from bench.measure import peak_memory
from fastagglo.model import create_student
from fastagglo.model.cost import activation_bytes
from fastagglo.model.packing import PackedBatch
from fastagglo.ops.heads import HeadSpec


def test_peak_of_a_forward_whose_graph_is_kept():
    """Within 15 %: beside what is kept stands what one operator holds for a moment."""
    student = create_student("B", depth=3, heads={"t": HeadSpec(spatial=256, hidden=512)}).train()
    images = torch.rand(4, 3, 224, 224)

    def forward():
        output = student(PackedBatch.from_images([images]))
        return output["t"].spatial[0].sum()

    forward()
    found, _ = peak_memory(forward, "cpu")
    want = 4 * activation_bytes(student.config, 224, 224, bf16=False)
    assert found == pytest.approx(want, rel=0.15)
