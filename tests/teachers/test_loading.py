"""What every loader shares: where weights come from, what is refused, what the message says."""

from __future__ import annotations

import os
import pickle
import sys
import time

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from fastagglo.errors import UserError
from fastagglo.teachers import TeacherSettingError, TeacherSpec, load_teacher
from fastagglo.teachers.weights import hub_folder, read_weights

MISSES = [
    ("timm", "vit_small_patch14_dinov2.lvd142m", "timm/vit_small_patch14_dinov2.lvd142m"),
    ("timm", "hf-hub:org/model", "org/model"),
    ("open_clip", "hf-hub:org/model", "org/model"),
    ("transformers", "facebook/dinov2-small", "facebook/dinov2-small"),
]


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("source", "model", "repo"), MISSES)
@pytest.mark.parametrize("allow_download", [True, False])
def test_weights_not_on_this_machine(source, model, repo, allow_download):
    """HF_HUB_OFFLINE is set for all tests, as on a machine without a network."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_teacher(source, model, name="mine", allow_download=allow_download)
    text = one_line(caught)
    assert "'mine'" in text
    assert f"hf download {repo}" in text
    assert "checkpoint" in text
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("source", ["timm", "open_clip", "transformers"])
def test_missing_package_names_the_extra(source, monkeypatch):
    monkeypatch.setitem(sys.modules, source, None)
    with pytest.raises(UserError, match=r'pip install "fastagglo\[teachers\]"') as caught:
        load_teacher(source, "anything", name="mine")
    assert f"'mine' needs the package '{source}'" in one_line(caught)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("torchvision", "vit"), "source='torchvision'; expected one of builtin, timm, open_clip"),
        (("builtin", "efficientnet-lite9"), "there are efficientnet-lite0"),
        (("builtin", "hog", {"layer": "stride4"}), "layer='stride4'; expected one of stride8"),
        (("builtin", "hog", {"checkpoint": "x.pth"}), "hog has no weights"),
        (("builtin", "hog", {"input_size": 100}), "input_size=100 is not a positive multiple"),
        (("builtin", "hog", {"dtype": "int8"}), "dtype='int8'; expected fp32"),
        (("builtin", "hog", {"dtype": torch.float64}), "expected fp32, bf16 or fp16"),
        (("timm", "test_vit", {"layer": "stride8"}), "is for built-in teachers"),
    ],
)
def test_wrong_settings(arguments, text):
    source, model, *rest = arguments
    with pytest.raises(TeacherSettingError, match=text) as caught:
        load_teacher(source, model, name="mine", **(rest[0] if rest else {}))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, UserError)
    assert "'mine'" in one_line(caught)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_files_from_outside_are_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"state_dict": {"a": Bomb()}}, tmp_path / "zip.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    (tmp_path / "cut.pth").write_bytes(b"")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for file, text in (
        ("bomb.pth", "files that run code are not loaded"),
        ("zip.pth", "files that run code are not loaded"),
        ("cut.safetensors", "cannot read"),
        ("cut.pth", "cannot read"),
        ("list.pth", "holds no state dict"),
        ("none.pth", "holds no state dict"),
    ):
        with pytest.raises(UserError, match=text) as caught:
            load_teacher("timm", "test_vit", checkpoint=file)
        assert file in one_line(caught)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(UserError, match="checkpoint='nowhere' does not exist"):
        load_teacher("timm", "test_vit", checkpoint="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no weights in .*empty; looked for model.safetensors"):
        load_teacher("timm", "test_vit", checkpoint="empty")
    with pytest.raises(UserError, match=r"cannot read .*config\.json"):
        load_teacher("transformers", "dino", checkpoint="empty")


def test_wrappers_and_prefixes_are_unwrapped(tmp_path):
    torch.save({"model": {"module.a": torch.ones(2)}, "epoch": 1}, tmp_path / "x.pth")
    assert torch.equal(read_weights(tmp_path / "x.pth", "t")["a"], torch.ones(2))


def fake_hub(monkeypatch, answers):
    """Replace the hub: ``answers[local_files_only]`` is a folder or an error."""
    calls = []

    def snapshot_download(repo, *, allow_patterns, local_files_only, etag_timeout):
        calls.append((allow_patterns[0], local_files_only))
        answer = answers[local_files_only]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return calls


def test_cache_before_hub(tmp_path, monkeypatch):
    cached, fetched = tmp_path / "cached", tmp_path / "fetched"
    cached.mkdir(), fetched.mkdir()
    save_file({"a": torch.zeros(1)}, fetched / "b.bin")

    def look():
        return hub_folder("org/m", ("a.bin", "b.bin"), (), name="t", allow_download=True)

    # A cache with the configuration alone does not count.
    calls = fake_hub(monkeypatch, {True: cached, False: fetched})
    assert look() == fetched
    assert calls == [("a.bin", True), ("b.bin", True), ("a.bin", False), ("b.bin", False)]
    save_file({"a": torch.zeros(1)}, cached / "a.bin")
    calls = fake_hub(monkeypatch, {True: cached, False: fetched})
    assert look() == cached
    assert calls == [("a.bin", True)]
    # A refusal is passed on in one line, and asked for once.
    gated = OSError("Access to model org/m is restricted.\nYou must have access to it.")
    calls = fake_hub(monkeypatch, {True: FileNotFoundError("no"), False: gated})
    with pytest.raises(UserError, match="Access to model org/m is restricted") as caught:
        look()
    assert "hf download org/m" in one_line(caught)
    assert [local for _, local in calls].count(False) == 1


def test_spec_grid():
    spec = TeacherSpec("t", None, 14, 14, (0.0,) * 3, (1.0,) * 3, 8, 8)
    assert spec.grid(56) == (4, 4)
    assert spec.grid((28, 70)) == (2, 5)
    with pytest.raises(ValueError, match="'t' accepts height and width in multiples of 14"):
        spec.grid(64)
    fixed = TeacherSpec("t", 384, 14, 14, (0.0,) * 3, (1.0,) * 3, 8, 8)
    assert fixed.grid(384) == (27, 27)
    with pytest.raises(ValueError, match="accepts 384 x 384 pixels; got 384 x 378"):
        fixed.grid((384, 378))
