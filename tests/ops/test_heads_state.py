"""Heads from the names and shapes of published weights, and errors that name each wrong entry."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.ops import AdaptorHeads, AdaptorMLP, AdaptorMLPv1, HeadSpec


def linear(state: dict[str, Tensor], name: str, out: int, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(out, width), torch.randn(out)


def norm(state: dict[str, Tensor], name: str, width: int) -> None:
    state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(2, width)


def v2(prefix: str, sizes: tuple[int, int, int], blocks: int, pre_norm: bool = False) -> dict:
    """A head of version 2 as RADIO names it: in, hidden, out."""
    width, hidden, out = sizes
    state: dict[str, Tensor] = {}
    if pre_norm:
        norm(state, f"{prefix}.pre_norm.0", width)
    linear(state, f"{prefix}.fc1", hidden, width)
    for i in range(blocks):
        norm(state, f"{prefix}.blocks.{i}.0", hidden)
        linear(state, f"{prefix}.blocks.{i}.2", hidden, hidden)
    norm(state, f"{prefix}.final.0", hidden)
    linear(state, f"{prefix}.final.2", out, hidden)
    return state


def v1(prefix: str, sizes: tuple[int, int, int], inner: int) -> dict[str, Tensor]:
    width, hidden, out = sizes
    state: dict[str, Tensor] = {}
    linear(state, f"{prefix}.fc1", hidden, width)
    norm(state, f"{prefix}.norm", hidden)
    for i in range(inner):
        linear(state, f"{prefix}.inner.{3 * i}", hidden, hidden)
        norm(state, f"{prefix}.inner.{3 * i + 1}", hidden)
    linear(state, f"{prefix}.fc2", out, hidden)
    return state


def checkpoint() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "module.base_model.blocks.0.attn.qkv.weight": torch.randn(3, 3),
        **v2("module._heads.siglip2-g", (6, 8, 5), 2),
        **v2("module._feature_projections.siglip2-g", (6, 7, 12), 2),
        **v2("module._heads.sam3", (6, 9, 4), 1, pre_norm=True),
        **v2("module._feature_projections.sam3", (6, 9, 4), 1, pre_norm=True),
    }


def test_version_2() -> None:
    state = checkpoint()
    heads = AdaptorHeads.from_state_dict(state, upsample={"siglip2-g": 2})
    assert heads.specs == {
        "siglip2-g": HeadSpec(5, 3, hidden=7, summary_hidden=8, blocks=2, upsample=2),
        "sam3": HeadSpec(4, 4, hidden=9, summary_hidden=9, blocks=1, pre_norm=True),
    }
    prefix = "module._heads.siglip2-g."
    for name, value in heads.summary["siglip2-g"].state_dict().items():
        assert torch.equal(value, state[prefix + name])
        assert value.data_ptr() != state[prefix + name].data_ptr()
    x = torch.randn(3, 6)

    def step(x: Tensor, name: str) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], state[f"{name}.0.weight"], state[f"{name}.0.bias"])
        return F.linear(F.gelu(h), state[f"{name}.2.weight"], state[f"{name}.2.bias"])

    y = F.linear(x, state[prefix + "fc1.weight"], state[prefix + "fc1.bias"])
    for i in range(2):
        y = y + step(y, f"{prefix}blocks.{i}")
    expected = step(y, f"{prefix}final")
    torch.testing.assert_close(heads.summary["siglip2-g"](x), expected)
    assert all(p.requires_grad for p in heads.parameters())


@pytest.mark.parametrize("inner", [0, 2])
def test_version_1(inner: int) -> None:
    torch.manual_seed(0)
    state = {**v1("_heads.0", (6, 8, 5), inner), **v1("_feature_projections.0", (6, 8, 3), inner)}
    heads = AdaptorHeads.from_state_dict(state, {"0": "clip"})
    head = heads.spatial["clip"]
    assert isinstance(head, AdaptorMLPv1)
    assert heads.specs["clip"] == HeadSpec(
        5, 3, hidden=8, summary_hidden=8, blocks=inner, version="v1"
    )
    assert HeadSpec.from_dict(heads.specs["clip"].to_dict()) == heads.specs["clip"]
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU()]
    for _ in range(inner):
        layers += [nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()]
    plain = nn.Sequential(*layers, nn.Linear(8, 3))
    values = [v for k, v in state.items() if k.startswith("_feature_projections")]
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    x = torch.randn(4, 6, requires_grad=True)
    torch.testing.assert_close(head(x), plain(x))
    (found,), (expected,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (head, plain))
    torch.testing.assert_close(found, expected)
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    torch.testing.assert_close(head(x, rotation), plain(x) @ rotation, rtol=1e-4, atol=1e-5)
    out = heads(torch.randn(2, 1, 6), x)  # beside others it goes its own way
    torch.testing.assert_close(out["clip"][1], plain(x))


def test_teachers_are_chosen_renamed_and_ordered() -> None:
    heads = AdaptorHeads.from_state_dict(checkpoint(), {"sam3": "sam", "siglip2-g": "text"})
    assert list(heads.specs) == ["sam", "text"]
    assert list(AdaptorHeads.from_state_dict(checkpoint(), {"sam3": "a"}).specs) == ["a"]


def test_own_names_dtypes_and_single_kinds() -> None:
    own = AdaptorHeads(6, {"a": HeadSpec(summary=3), "b": HeadSpec(spatial=4, blocks=1)})
    own = own.bfloat16()
    state = {f"student.heads.{name}": value for name, value in own.state_dict().items()}
    back = AdaptorHeads.from_state_dict(state)
    assert isinstance(back.spatial["b"], AdaptorMLP)
    assert back.specs["a"].spatial is None
    assert back.specs["b"].summary is None
    for name, value in own.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
        assert back.state_dict()[name].dtype == torch.bfloat16
    named = v2("_heads.summary", (6, 7, 5), 0)  # a teacher of that name
    assert list(AdaptorHeads.from_state_dict(named).specs) == ["summary"]


class TestErrors:
    def wrong(self, state: dict[str, Tensor]) -> str:
        with pytest.raises(ValueError, match="from_state_dict: entries") as caught:
            AdaptorHeads.from_state_dict(state)
        return str(caught.value)

    @pytest.mark.parametrize(
        "name",
        [
            "module._heads.siglip2-g.fc1.bias",
            "module._heads.siglip2-g.fc1.weight",
            "module._feature_projections.siglip2-g.blocks.0.2.weight",
            "module._feature_projections.sam3.final.2.weight",
            "module._heads.sam3.pre_norm.0.bias",
        ],
    )
    def test_missing(self, name: str) -> None:
        state = checkpoint()
        del state[name]
        assert self.wrong(state).endswith(f"entries missing: {name}")

    def test_unexpected(self) -> None:
        state = checkpoint() | {"module._heads.sam3.fc1.scale": torch.ones(1)}
        assert self.wrong(state).endswith("entries unexpected: module._heads.sam3.fc1.scale")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("module._heads.siglip2-g.fc1.weight", (8, 6)),
            ("module._heads.siglip2-g.blocks.1.0.weight", (8,)),
            ("module._heads.siglip2-g.blocks.1.2.weight", (8, 8)),
            ("module._heads.siglip2-g.final.2.bias", (5,)),
            ("module._feature_projections.sam3.pre_norm.0.weight", (6,)),
        ],
    )
    def test_misshapen(self, name: str, expected: tuple[int, ...]) -> None:
        state = checkpoint()
        state[name] = torch.zeros(11, 11)
        wanted = f"of another shape: {name} (11, 11), expected {expected}"
        assert self.wrong(state).endswith(wanted)

    def test_all_at_once(self) -> None:
        state = checkpoint() | {"module._heads.sam3.extra": torch.ones(1)}
        del state["module._heads.sam3.fc1.bias"], state["module._heads.siglip2-g.final.0.bias"]
        state["module._heads.sam3.final.2.bias"] = torch.ones(7)
        message = self.wrong(state)
        assert (
            "missing: module._heads.siglip2-g.final.0.bias, module._heads.sam3.fc1.bias" in message
        )
        assert "unexpected: module._heads.sam3.extra;" in message
        assert "of another shape: module._heads.sam3.final.2.bias (7,), expected (4,)" in message

    def test_arguments(self) -> None:
        load = AdaptorHeads.from_state_dict
        with pytest.raises(TypeError, match="state must be a mapping, got list"):
            load([1])
        with pytest.raises(TypeError, match=re.escape("'_heads.a.fc1.weight' must be a tensor")):
            load({"_heads.a.fc1.weight": 3})
        with pytest.raises(ValueError, match="no heads in the state"):
            load({"base_model.norm.weight": torch.ones(3)})
        with pytest.raises(ValueError, match=r"no teacher 'sam' .*did you mean 'sam3'\?"):
            load(checkpoint(), {"sam": "sam"})
        with pytest.raises(ValueError, match="cannot both become 'a'"):
            load(checkpoint(), {"sam3": "a", "siglip2-g": "a"})
        with pytest.raises(ValueError, match="upsample: no teacher 'sam'"):
            load(checkpoint(), upsample={"sam": 2})
        with pytest.raises(ValueError, match=r"'siglip2-g' has 12 outputs, which 5\*\*2 does not"):
            load(checkpoint(), upsample={"siglip2-g": 5})
        twice = checkpoint() | {"_heads.sam3.fc1.bias": torch.ones(9)}
        with pytest.raises(ValueError, match="are the same parameter"):
            load(twice)
        unlike = {
            **v2("_heads.a", (6, 7, 5), 1, pre_norm=True),
            **v2("_feature_projections.a", (6, 7, 5), 1),
        }
        with pytest.raises(ValueError, match="'a' must have the same pre_norm, got True and False"):
            load(unlike)

    def test_blocks_may_differ(self) -> None:
        state = {**v2("_heads.a", (6, 7, 5), 1), **v2("_feature_projections.a", (6, 7, 5), 2)}
        spec = AdaptorHeads.from_state_dict(state).specs["a"]
        assert (spec.blocks, spec.summary_blocks) == (2, 1)

    def test_version(self) -> None:
        with pytest.raises(ValueError, match=r"version must be one of \('v1', 'v2'\), got 'v3'"):
            HeadSpec(summary=4, version="v3")
        with pytest.raises(ValueError, match="'v1' have no pre_norm"):
            HeadSpec(summary=4, version="v1", pre_norm=True)
        with pytest.raises(ValueError, match="AdaptorMLPv1: hidden must be at least 1"):
            AdaptorMLPv1(6, 0, 5)
