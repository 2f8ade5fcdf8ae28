"""Are the data benchmarks what they say, do all peers agree with us, and is a wrong one seen?"""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from PIL import Image

from bench import data_peers, engine
from bench.data import SUITE, compare
from bench.data_cases import IMAGES, MEAN, STD, Batch, Case, cases, photos
from bench.data_peers import PEERS, Run
from bench.engine import OURS, Unavailable, ready

SMALL = Case("small", 150, 112, 4, 32)
LARGE = Case("large", 320, 240, 4, 32)
SHARD = Case("shard", 150, 112, 4, 32, shard=True)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEVICE", "cpu")


@pytest.mark.parametrize("case", [SMALL, LARGE, SHARD], ids=lambda case: case.id)
def test_peers_agree_with_us(case: Case) -> None:
    batch = Batch.of(case, "cpu")
    expected = PEERS[OURS][1](batch).results()
    assert expected["pixels"].shape == (4, 3, 32, 32)
    assert expected["pixels"].dtype == torch.float32
    present = 0
    for peer in (*IMAGES, "webdataset"):
        if peer == "webdataset" and not case.shard:
            continue
        try:
            run, row, _ = ready(SUITE, peer, batch, expected)
        except Unavailable:
            assert peer in ("turbojpeg", "kornia")
            continue
        present += 1
        if peer == "decode":  # whole photographs, of which no crop is made
            assert len(run()) == 4
        else:
            assert run().shape == (4, 3, 32, 32)
        assert row["input_bytes"] == sum(map(len, photos(case.width, case.height, 4)))
    assert present >= 3


def test_large_photos_are_decoded_small() -> None:
    """Else the case measures nothing of its own."""
    crops = Batch.of(LARGE, "cpu").crops
    assert any(min(crop.width, crop.height) >= 4 * 32 for crop in crops)


def test_the_floor_decodes_at_the_scale_of_the_crops() -> None:
    """Whole where crops are small, else at a part: what is compared are crops made of it."""
    for case, scales in ((SMALL, {1, 2}), (LARGE, {2, 4})):
        images = PEERS["decode"][1](Batch.of(case, "cpu"))()
        assert {round(case.height / len(image)) for image in images} <= scales
    batch = Batch.of(LARGE, "cpu")
    floor = PEERS["decode"][1](batch)
    right = floor.results()
    floor.decoded = lambda: [image[:, ::-1].copy() for image in floor.images()]  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="decode: "):
        compare("decode", floor.results(), right, batch)


def test_every_kind_of_crop_is_there() -> None:
    batch = Batch.of(dataclasses.replace(SMALL, count=16), "cpu")
    assert {crop.flip for crop in batch.crops} == {False, True}
    assert len({crop.key for crop in batch.crops}) == 16
    for crop in batch.crops:
        assert crop.left + crop.width <= 150
        assert crop.top + crop.height <= 112


@pytest.mark.parametrize("case", [SMALL, LARGE], ids=lambda case: case.id)
def test_a_wrong_peer_is_seen(case: Case) -> None:
    batch = Batch.of(case, "cpu")
    right = PEERS[OURS][1](batch).results()

    def changed(**fields: object) -> torch.Tensor:
        """Pillow's crops, the first of them another one."""
        first = dataclasses.replace(batch.crops[0], **fields)
        crops = (first, *batch.crops[1:])
        return PEERS["PIL"][1](dataclasses.replace(batch, crops=crops)).results()["pixels"]

    crop = batch.crops[0]
    for pixels in (
        changed(flip=not crop.flip),
        # A pixel of the crop, or of the file where a crop's are smaller.
        changed(width=crop.width - max(1, crop.width // 32)),
        changed(height=crop.height - max(1, crop.height // 32)),
        changed(data=batch.crops[1].data),
        right["pixels"] * torch.tensor(STD).view(1, 3, 1, 1),
        right["pixels"] + torch.tensor(MEAN).view(1, 3, 1, 1),
        right["pixels"].flip(1),
        right["pixels"].roll(1, 0),
    ):
        with pytest.raises(AssertionError, match="PIL: "):
            compare("PIL", {"pixels": pixels}, right, batch)
    for pixels in (right["pixels"][1:], right["pixels"].double()):
        with pytest.raises(AssertionError, match="PIL: "):
            compare("PIL", {"pixels": pixels}, right, batch)


def test_all_of_the_work_has_one_thread() -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        run = Run(Batch.of(SMALL, "cpu"), lambda: seen.append(torch.get_num_threads()))  # type: ignore[arg-type, func-returns-value]
        run()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_what_is_not_there_says_so() -> None:
    batch = Batch.of(SMALL, "cpu")
    with pytest.raises(Unavailable, match="no-such is not installed: pip install no-such"):
        data_peers.library("nosuch", "no-such")
    with pytest.raises(Unavailable, match="needs CUDA"):
        PEERS["nvjpeg"][1](batch)
    with pytest.raises(Unavailable, match="tar shards only"):
        PEERS["webdataset"][1](batch)


def test_photos_are_jpegs_of_the_size() -> None:
    files = photos(150, 112, 20)
    assert len(files) == 20
    assert len(set(files)) == 16  # all of the built-in ones, some of them twice
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (150, 112))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_cases(device: str, quick: bool) -> None:
    found = cases(device, quick)
    assert len({case.id for case in found}) == len(found)
    for case in found:
        assert set(case.peers) <= set(PEERS) - {OURS}
        assert case.shard == ("webdataset" in case.peers)
        assert device == "cuda" or "nvjpeg" not in case.peers
    if not quick:
        by_id = {case.id: case for case in found}
        assert (by_id["small"].width, by_id["small"].height, by_id["small"].size) == (500, 375, 224)
        assert (by_id["large"].width, by_id["large"].height, by_id["large"].size) == (
            2000,
            1500,
            224,
        )
        for case, peer in SUITE.goals:
            assert peer in by_id[case].peers


def test_facts() -> None:
    facts = SMALL.facts
    assert facts["label"] == "150×112 bytes -> 32"
    assert facts["images"] == 4
    assert facts["file_kb"] == pytest.approx(sum(map(len, photos(150, 112, 4))) / 4e3, abs=0.06)
    assert set(facts) >= {"label", "pass"}
