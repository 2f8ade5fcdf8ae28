"""The student's tokens and inner layers, as timm's models give them."""

from __future__ import annotations

import pytest
import torch

from fastagglo.model import HeadSpec, create_student


@pytest.mark.parametrize("window", [None, 2])
def test_each_block_and_the_last_tokens(window: int | None) -> None:
    torch.manual_seed(0)
    heads = {"a": HeadSpec(summary=4, spatial=4), "b": HeadSpec(spatial=4)}
    model = create_student("tiny", heads=heads, depth=4, window=window, global_layers=(1, 3))
    model.eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        out = model(x).backbone
        final, found = model.forward_intermediates(x, return_prefix_tokens=True)
        assert len(found) == 4
        assert torch.equal(final, model.forward_features(x))
        torch.testing.assert_close(final[:, :2].flatten(1), out.summary)
        torch.testing.assert_close(final[:, 6:].unflatten(1, (4, 6)), out.spatial[0])
        # A student cut after a block gives that block's output; its last layer is global.
        for depth in (2, 4):
            short = create_student(
                "tiny", heads=heads, depth=depth, window=window, global_layers=(1, 3)[: depth // 2]
            ).eval()
            own = short.state_dict()
            short.load_state_dict({n: v for n, v in model.state_dict().items() if n in own})
            patches, prefix = model.forward_intermediates(
                x, [depth - 1], return_prefix_tokens=True, norm=True, intermediates_only=True
            )[0]
            tokens = torch.cat([prefix, patches.flatten(2).mT], dim=1)
            torch.testing.assert_close(tokens, short.forward_features(x))
        # From a windowed layer, the next global block and the norm lead to the final tokens.
        patches, prefix = found[2]
        rows = torch.cat([prefix, patches.flatten(2).mT], dim=1)
        from fastagglo.ops import PackedLayout

        rows = model.blocks[3](rows.flatten(0, 1), PackedLayout.from_lengths([30, 30]))
        torch.testing.assert_close(model.norm(rows).view_as(final), final)
        two = model.forward_intermediates(x, 2, output_fmt="NLC", intermediates_only=True)
    assert [tuple(t.shape) for t in two] == [(2, 24, 192)] * 2
    torch.testing.assert_close(two[0], found[2][0].flatten(2).mT)


def test_errors() -> None:
    model = create_student("tiny", depth=2)
    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="indices must be 1 to 2 blocks, got 3"):
        model.forward_intermediates(x, 3)
    with pytest.raises(ValueError, match=r"blocks 0 to 1, got \[2\]"):
        model.forward_intermediates(x, [0, 2])
    with pytest.raises(ValueError, match="'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(TypeError, match="got list"):
        model.forward_features([x])
    with pytest.raises(ValueError, match="multiples of the patch"):
        model.forward_features(torch.rand(1, 3, 30, 32))
