from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.distill import make_ema, mesa_loss


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def set_to(net: Net, value: float) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
        net.table.fill_(value)
        net.steps.fill_(int(value))


def test_average_by_hand() -> None:
    net = Net()
    ema = make_ema(net, decay=0.9)
    expected = None
    for value in (10.0, 20.0, -5.0, 7.0):
        set_to(net, value)
        ema.update_parameters(net)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
        average = ema.module.layer.weight
        torch.testing.assert_close(average, torch.full_like(average, expected))
        # Buffers follow; a counter has no average.
        assert ema.module.steps.item() == int(value)
        assert ema.module.table.eq(value).all()
    assert net.layer.weight.eq(7.0).all()


def test_default_decay_is_that_of_c_radio_v4() -> None:
    net = Net()
    set_to(net, 0.0)
    ema = make_ema(net)
    ema.update_parameters(net)
    set_to(net, 1.0)
    ema.update_parameters(net)
    torch.testing.assert_close(
        ema.module.layer.bias, torch.full((2,), 1 - 0.9996), rtol=1e-4, atol=0
    )


def test_average_is_for_evaluation_only() -> None:
    net = nn.Sequential(Net(), nn.Dropout(0.5))
    net[0].layer.weight.requires_grad_(False)
    ema = make_ema(net)
    ema.update_parameters(net)
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert not any(module.training for module in ema.modules())
    assert net.training
    assert net[0].layer.bias.requires_grad
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ema(x), net[0](x))
    assert not ema(x).requires_grad


def test_resume_gives_the_same_average() -> None:
    a_net = Net()
    a, b = make_ema(a_net), make_ema(Net())
    values = [3.0, 1.0, 8.0, 2.0]
    for value in values[:2]:
        set_to(a_net, value)
        a.update_parameters(a_net)
    b.load_state_dict(a.state_dict())
    for value in values[2:]:
        set_to(a_net, value)
        a.update_parameters(a_net)
        b.update_parameters(a_net)
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key


def test_wrong_averages() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1\.5"):
        make_ema(Net(), decay=1.5)
    with pytest.raises(ValueError, match=r"'layer\.weight' is torch\.bfloat16"):
        make_ema(Net().to(torch.bfloat16))


def features(n: int, h: int, w: int, seed: int, c: int = 6) -> Tensor:
    return torch.randn(n, h, w, c, generator=torch.Generator().manual_seed(seed)).double()


def normalised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def test_mesa_of_one_group() -> None:
    s, e = features(3, 4, 5, 0), features(3, 4, 5, 1)
    loss = mesa_loss([s], [e])
    assert loss.dim() == 0
    expected = (normalised(s) - normalised(e)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_mesa_weighs_groups_by_their_images() -> None:
    """Images count with the square root of their valid tokens, over all groups together."""
    groups = [(3, 4, 4), (2, 8, 8)]
    s = [features(*shape, seed) for seed, shape in enumerate(groups)]
    e = [features(*shape, 10 + seed) for seed, shape in enumerate(groups)]
    loss = mesa_loss(s, e, [None, (0.0, 0.0)])
    per_image = [
        (normalised(a) - normalised(b)).square().mean((1, 2, 3)) for a, b in zip(s, e, strict=True)
    ]
    expected = (4 * per_image[0].sum() + 8 * per_image[1].sum()) / (3 * 4 + 2 * 8)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_mesa_compares_the_overlap() -> None:
    """Two crops of one feature map agree where they overlap."""
    world = features(2, 9, 9, 0)
    s, e = world[:, :6, :6], world[:, 2:8, 1:7]
    right = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    assert mesa_loss([s], [e], [right]).item() == pytest.approx(0, abs=1e-12)
    assert mesa_loss([s], [e], [(2.0, 1.0)]).item() == pytest.approx(0, abs=1e-12)
    assert mesa_loss([s], [e], [-right]).item() > 0.5
    assert mesa_loss([s], [e]).item() > 0.5
    # Features beyond the overlap do not matter.
    changed = s.clone()
    changed[:, :2] = 100.0 * features(2, 2, 6, 5)
    assert mesa_loss([changed], [e], [right]).item() == pytest.approx(0, abs=1e-12)


def test_mesa_ignores_affine_changes_of_a_token() -> None:
    s, e = features(1, 3, 3, 0), features(1, 3, 3, 1)
    torch.testing.assert_close(
        mesa_loss([s * 1e3 + 50], [e]), mesa_loss([s], [e]), rtol=1e-4, atol=0
    )


def test_mesa_gradient_reaches_the_student_alone() -> None:
    s, e = features(2, 3, 3, 0).requires_grad_(), features(2, 3, 3, 1).requires_grad_()
    (2 * mesa_loss([s], [e], [(1.0, 0.0)])).backward()
    assert e.grad is None
    assert s.grad[:, 0].abs().max() == 0  # the first row lies outside the overlap
    assert s.grad[:, 1:].abs().min() > 0
    x = s.detach().clone().requires_grad_()
    a, b = F.layer_norm(x, (6,))[:, 1:], F.layer_norm(e.detach(), (6,))[:, :-1]
    (2 * (a - b).square().mean()).backward()
    torch.testing.assert_close(s.grad, x.grad, rtol=1e-6, atol=1e-9)


def test_mesa_edge_cases() -> None:
    assert mesa_loss([], []).item() == 0
    s = features(2, 3, 3, 0)
    far = mesa_loss([s.requires_grad_()], [s], [(50.0, 0.0)])
    assert far.item() == 0
    far.backward()
    assert s.grad.abs().max() == 0
    with pytest.raises(ValueError, match="1 student_spatial, 2 ema_spatial, 1 shifts"):
        mesa_loss([s], [s, s])
    with pytest.raises(ValueError, match="0 shifts"):
        mesa_loss([s], [s], [])
