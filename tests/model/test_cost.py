"""Arithmetic of costs against what real models do: FLOPs, parameters, memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastagglo.model import create_student, vit
from fastagglo.model.cost import activation_bytes, block_flops, student_flops
from fastagglo.model.packing import PackedBatch
from fastagglo.ops.heads import HeadSpec

HEADS = {
    "a": HeadSpec(summary=96, spatial=80, hidden=64, blocks=2, upsample=2),
    "b": HeadSpec(summary=None, spatial=48, hidden=72, spatial_blocks=1),
    "c": HeadSpec(summary=40, spatial=None, hidden=56, summary_hidden=88),
    "d": HeadSpec(
        *(24, 36, 60), blocks=1, summary_blocks=3, spatial_blocks=2, spatial_block="timm"
    ),
}


def counted(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.fixture
def plain_attention(monkeypatch):
    """Packed attention is one operator, which FlopCounterMode cannot look into."""

    def attend(qkv, layout):
        outputs = []
        for segment in qkv.split(layout.lengths):
            q, k, v = segment.permute(1, 2, 0, 3)  # products that the counter sees on a CPU too
            weights = (q @ k.transpose(1, 2)).div(q.shape[-1] ** 0.5).softmax(-1)
            outputs.append((weights @ v).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr(vit, "packed_attention_qkv", attend)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(
    "changes", [{"feature_normaliser": True}, {"mlp": "swiglu", "patch_size": 8}]
)
def test_flops_of_the_trunk(changes, window, plain_attention):
    student = create_student("tiny", registers=3, **changes).eval().requires_grad_(False)
    found = counted(lambda: student(torch.rand(2, 3, 96, 64), window=window))
    want = 2 * student_flops(student.config, 96, 64, window)[0]
    # Positions are resampled by a product or two, which the count leaves out.
    assert found == pytest.approx(want, rel=0.02)


def test_flops_of_the_heads():
    """The same layers as nn.Sequential; residual adds and norms count nothing."""
    config = create_student("tiny", heads=HEADS).config
    rows, width, want = 6 * 4, config.width, 0

    def head(hidden, blocks, out, n):
        layers = [nn.Linear(width, hidden), *(nn.Linear(hidden, hidden) for _ in range(blocks))]
        return counted(
            lambda: nn.Sequential(*layers, nn.Linear(hidden, out))(torch.zeros(n, width))
        )

    for spec in HEADS.values():
        if spec.summary:
            blocks = spec.blocks if spec.summary_blocks is None else spec.summary_blocks
            want += head(spec.summary_hidden or spec.hidden, blocks, spec.summary, 1)
        if spec.spatial:
            want += head(spec.hidden, spec.blocks, spec.spatial * spec.upsample**2, rows)
            hidden = 4 * width if spec.spatial_block == "timm" else config.mlp_width
            block = block_flops(width, hidden, rows, rows**2)
            want += spec.spatial_blocks * block
    assert student_flops(config, 96, 64)[1] == want


def saved_bytes(student, images, bf16):
    """What autograd keeps, each block of memory once, without parameters and their bf16 copies."""
    given = {t.untyped_storage().data_ptr() for t in (*student.parameters(), *student.buffers())}
    weights = {tuple(w.shape) for p in student.parameters() if p.dim() == 2 for w in (p, p.t())}
    total = 0

    def pack(t):
        nonlocal total
        storage = t.untyped_storage()
        if storage.data_ptr() not in given and tuple(t.shape) not in weights:
            given.add(storage.data_ptr())
            total += storage.nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        output = student(PackedBatch.from_images(images))
    del output
    return total


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"heads": HEADS}, {"mlp": "swiglu", "layer_scale": 1e-5}], ids=str
)
def test_activations(changes, bf16):
    """Within 5 % of what autograd keeps: index tables and statistics are the rest."""
    student = create_student("tiny", **{"depth": 4} | changes).train()
    found = saved_bytes(student, [torch.rand(3, 3, 160, 128)], bf16)
    want = 3 * activation_bytes(student.config, 160, 128, bf16=bf16)
    assert found == pytest.approx(want, rel=0.05)


def test_activations_of_checkpointed_blocks():
    """A block leaves its input alone; by the difference of two depths."""
    kept, counted_bytes = [], []
    for depth in (2, 5):
        student = create_student("tiny", depth=depth, global_layers=2).train()
        student.checkpoint_blocks = True
        kept.append(saved_bytes(student, [torch.rand(3, 3, 160, 128)], False))
        counted_bytes.append(
            3 * activation_bytes(student.config, 160, 128, bf16=False, checkpoint_blocks=True)
        )
    assert kept[1] - kept[0] == pytest.approx(counted_bytes[1] - counted_bytes[0], rel=0.02)
