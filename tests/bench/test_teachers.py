"""Are the teachers' benchmarks what they say, do all peers agree with us, is a wrong one seen?"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import engine
from bench.engine import OURS, Unavailable, ready
from bench.teachers import SUITE, compare
from bench.teachers_cases import GROUPS, NAME, SOURCES, Batch, Case, cases
from bench.teachers_peers import PEERS

# One of each library, small; the architectures of the real cases.
TINY = (
    *cases("cpu", quick=True),
    Case("efficientnet", "builtin", "efficientnet-lite0", 2, 64),
    Case(
        "vit",
        "timm",
        "vit_small_patch16_224.dino",
        2,
        64,
        (("depth", 2), ("embed_dim", 48), ("num_heads", 2)),
    ),
)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEVICE", "cpu")


@pytest.fixture(scope="module", params=TINY, ids=lambda case: case.id)
def batch(request: pytest.FixtureRequest) -> Batch:
    return Batch.of(request.param, "cpu")


def test_peers_agree_with_us(batch: Batch) -> None:
    case = batch.case
    ours = PEERS[OURS][1](batch)
    expected = ours.results()
    assert len(ours()) == GROUPS
    assert all(len(value) == case.images for value in expected.values())
    assert ("summary" in expected) == (not case.mosaic and case.model != "hog")
    for peer in case.peers:
        run, row, seconds = ready(SUITE, peer, batch, expected)
        weights = sum(p.nbytes for p in (batch.model or batch.teacher).parameters())
        assert row["input_bytes"] == weights + 3 * case.images * case.size**2
        assert len(run()) == (1 if peer == "batch" else case.images)
        assert seconds > 0


def test_a_wrong_peer_is_seen(batch: Batch) -> None:
    right = PEERS[OURS][1](batch).results()
    for name, value in right.items():
        wrong = {key: other.clone() for key, other in right.items()}
        # A feature of one image, by a thousandth of its norm.
        feature = wrong[name].view(-1, value.shape[-1])[-1]
        feature[0] += 1e-3 * max(feature.norm(), value.flatten(0, -2).norm(dim=-1).max())
        with pytest.raises(AssertionError, match=f"batch: {name} differs"):
            compare("batch", wrong, right, batch)
        compare("alone", wrong, right, batch)
        feature[0] = float("nan")
        with pytest.raises(AssertionError, match=f"alone: {name} is not finite"):
            compare("alone", wrong, right, batch)
        wrong[name] = value[1:]
        with pytest.raises(AssertionError, match=f"alone: {name} has shape"):
            compare("alone", wrong, right, batch)
    with pytest.raises(AssertionError, match="batch: "):
        compare("batch", {}, right, batch)


def test_the_models_share_no_weights(batch: Batch) -> None:
    """What a peer does to its own does nothing to ours."""
    if batch.model is None:
        pytest.skip("no weights")
    theirs = {p.data_ptr() for p in batch.model.parameters()}
    assert not theirs & {p.data_ptr() for p in batch.teacher.parameters()}


def test_images_are_different_photographs(batch: Batch) -> None:
    images = batch.images
    assert images.dtype == torch.uint8
    assert len(images.flatten(1).unique(dim=0)) == batch.case.images


def test_mosaics_take_more_than_one_canvas() -> None:
    """So that their order counts."""
    case = next(case for case in cases("cpu", quick=False) if case.mosaic)
    side = dict(case.options)["image_size"]
    assert case.images > (side // case.size) ** 2


def test_other_normalisation_is_seen() -> None:
    batch = Batch.of(TINY[1], "cpu")
    expected = PEERS[OURS][1](batch).results()
    spec = dataclasses.replace(batch.teacher.spec, mean=(0.5, 0.5, 0.5))
    batch.teacher.spec = spec  # the peers' alone: ours keeps its colours in buffers
    with pytest.raises(AssertionError, match="differs"):
        compare("batch", PEERS["batch"][1](batch).results(), expected, batch)


def test_images_must_fill_the_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 2, got 3"):
        Batch.of(Case("odd", "builtin", "hog", 3, 64), "cpu")


def test_hog_has_no_batch() -> None:
    with pytest.raises(Unavailable, match="one image at a time"):
        PEERS["batch"][1](Batch.of(TINY[0], "cpu"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_cases(device: str, quick: bool) -> None:
    found = cases(device, quick)
    by_id = {case.id: case for case in found}
    assert len(by_id) == len(found)
    for case in found:
        assert case.source in SOURCES
        assert set(case.peers) <= set(PEERS) - {OURS}
        assert case.images % GROUPS == 0
        assert ("alone" in case.peers) == case.mosaic
        assert case.facts["pass"] == "forward"
        assert case.half == (device == "cuda" and not quick and case.source != "builtin")
    if not quick:
        assert {case.source for case in found} == set(SOURCES)
    if device == "cpu" and not quick:
        assert all(peer in by_id[case].peers for case, peer in SUITE.goals)


def test_models_of_cuda_are_the_recipes_own() -> None:
    """Millions of parameters, on no device, as their papers have them."""
    timm, transformers = (pytest.importorskip(name) for name in ("timm", "transformers"))
    expected = {"clip-h": 632, "siglip-so400m": 428, "dinov2-g": 1136, "sam-h": 637, "mosaic": 637}
    for case in cases("cuda", quick=False):
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in case.options}
        with torch.device("meta"):
            if case.source == "timm":
                model = timm.create_model(case.model, num_classes=0, img_size=case.size)
            elif case.model == "dinov2":
                model = transformers.Dinov2Model(
                    transformers.Dinov2Config(image_size=case.size, **options)
                )
            elif case.source == "transformers":
                model = transformers.SamVisionModel(transformers.SamVisionConfig(**options))
            else:
                continue
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert millions == pytest.approx(expected.pop(case.id), abs=1)
    assert not expected


def test_name() -> None:
    assert Batch.of(TINY[0], "cpu").teacher.name == NAME
