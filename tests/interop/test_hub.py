"""Students in other people's hands: the Hub's mixin, transformers' Auto classes, plain modules."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

import fastagglo
from fastagglo.errors import UserError
from fastagglo.interop import (
    FastaggloConfig,
    FastaggloImageProcessor,
    FastaggloModel,
    PretrainedStudent,
    register_transformers,
)
from fastagglo.interop.images import fit_size, prepare
from fastagglo.model import (
    HeadSpec,
    PackedBatch,
    Student,
    create_student,
    load_student,
    save_student,
)

HEADS = {"z": HeadSpec(summary=10, spatial=12), "a": HeadSpec(spatial=8, spatial_blocks=1)}


def student(**overrides) -> Student:
    settings = {"heads": HEADS, "width": 48, "depth": 3, "mlp_width": 64, "max_resolution": 128}
    return create_student("tiny", **(settings | overrides)).eval()


def photo(height: int = 96, width: int = 64) -> Tensor:
    pixels = torch.from_numpy(data.astronaut()[20 : 20 + height, 120 : 120 + width].copy())
    return pixels.permute(2, 0, 1)[None] / 255


def same(a: nn.Module, b: nn.Module) -> None:
    assert a.config == b.config
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


class TestPretrainedStudent:
    def test_save_and_load(self, tmp_path: Path) -> None:
        made = PretrainedStudent(student().config)
        made.save_pretrained(tmp_path)
        files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
        assert {path.name for path in tmp_path.iterdir()} == files
        back = PretrainedStudent.from_pretrained(tmp_path)
        assert type(back) is PretrainedStudent
        assert not back.training
        same(back, made)
        assert all(p.requires_grad for p in back.parameters())
        # The folder is save_student's, both ways.
        same(load_student(tmp_path), made)
        same(fastagglo.load(tmp_path), made)
        save_student(student(), tmp_path / "plain")
        same(PretrainedStudent.from_pretrained(str(tmp_path / "plain")), student_of(tmp_path))

    def test_of_shares_the_parameters(self) -> None:
        plain = student().train()
        made = PretrainedStudent.of(plain)
        assert made.training
        for name, parameter in plain.named_parameters():
            assert made.get_parameter(name) is parameter
        with pytest.raises(TypeError, match="expected a Student, got int"):
            PretrainedStudent.of(3)

    def test_copies_and_pickles(self) -> None:
        made = PretrainedStudent.of(student())
        for back in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert type(back) is PretrainedStudent
            same(back, made)

    def test_nothing_is_asked_of_a_network(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"has none of model\.safetensors"):
            PretrainedStudent.from_pretrained(tmp_path)


def student_of(folder: Path) -> Student:
    return load_student(folder / "plain")


class TestTransformers:
    def test_every_folder_is_read_without_remote_code(self, tmp_path: Path) -> None:
        register_transformers()
        register_transformers()  # again is harmless
        plain = student(registers=2, layer_scale=0.1)
        save_student(plain, tmp_path / "saved")
        PretrainedStudent.of(plain).save_pretrained(tmp_path / "hub")
        FastaggloModel.of(plain).save_pretrained(tmp_path / "model")
        for folder in ("saved", "hub", "model"):
            config = AutoConfig.from_pretrained(tmp_path / folder)
            assert type(config) is FastaggloConfig
            assert config.student_config == plain.config
            assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == (48, 3, 16)
            model = AutoModel.from_pretrained(tmp_path / folder, trust_remote_code=False)
            assert type(model) is FastaggloModel
            assert not model.training
            same(model.student, plain)
            same(fastagglo.load(tmp_path / folder), plain)
        fresh = AutoModel.from_config(config)
        assert fresh.student.config == plain.config
        assert fresh.student.blocks[0].ls1.gamma.eq(0.1).all()

    def test_outputs(self) -> None:
        plain = student(cls=("z", "a", "b"), summary=("a", "z"), feature_normaliser=True)
        plain.feature_normaliser.mean.normal_()
        model = FastaggloModel.of(plain)
        x = photo()
        want, tokens = plain(x).backbone, plain.forward_features(x)
        out = model(x, output_hidden_states=True)
        assert torch.equal(out.last_hidden_state, tokens)
        assert torch.equal(out[0], tokens)
        torch.testing.assert_close(out.pooler_output, want.summary)
        torch.testing.assert_close(out.features, want.spatial[0].flatten(1, 2))
        assert len(out.hidden_states) == 4
        torch.testing.assert_close(plain.norm(out.hidden_states[-1]), tokens)
        # Before the first block: what it reads.
        place = plain._geometry(*plain._mix(PackedBatch.from_images([x]), None))
        after = plain.blocks[0](out.hidden_states[0][0], place.layout)
        torch.testing.assert_close(after, out.hidden_states[1][0])
        assert model(x).hidden_states is None
        assert isinstance(model(x, return_dict=False), tuple)
        model.train()(x).pooler_output.sum().backward()
        assert plain.positions.table.grad.isfinite().all()

    def test_weights_that_do_not_fit(self, tmp_path: Path) -> None:
        register_transformers()
        FastaggloModel.of(student()).save_pretrained(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        values["student"]["depth"] = 4
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"missing_keys: student\.blocks\.3"):
            AutoModel.from_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"does not fit its config\.json"):
            fastagglo.load(tmp_path)

    def test_image_processor_and_pipeline(self, tmp_path: Path) -> None:
        register_transformers()
        plain = student()
        FastaggloModel.of(plain).save_pretrained(tmp_path)
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        assert type(processor) is FastaggloImageProcessor
        assert (processor.patch_size, processor.max_resolution) == (16, 128)
        image = Image.fromarray(data.astronaut())
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 128, 128)
        want = plain(pixels).backbone.summary
        found = pipeline("image-feature-extraction", model=str(tmp_path), pool=True, device="cpu")(
            image
        )
        np.testing.assert_allclose(found, want.detach(), rtol=1e-4, atol=1e-5)
        processor.size = {"shortest_edge": 40}
        processor.save_pretrained(tmp_path)
        back = AutoImageProcessor.from_pretrained(tmp_path)
        assert back.size == {"shortest_edge": 40}
        processor.size = "native"
        processor.save_pretrained(tmp_path)
        assert AutoImageProcessor.from_pretrained(tmp_path).size == "native"

    def test_a_fresh_process(self, tmp_path: Path) -> None:
        """What a user types, nothing imported before it."""
        save_student(student(), tmp_path)
        code = (
            "import torch, transformers, fastagglo.interop as i; i.register_transformers();"
            f"m = transformers.AutoModel.from_pretrained({str(tmp_path)!r});"
            "assert m(torch.rand(1, 3, 32, 64)).last_hidden_state.shape == (1, 14, 48)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class TestImages:
    def test_kinds(self) -> None:
        array = data.astronaut()[:64, :96]
        want = torch.from_numpy(array).permute(2, 0, 1) / 255
        tensor = torch.from_numpy(array)
        kinds = [Image.fromarray(array), array, tensor, tensor.permute(2, 0, 1), want]
        for image in (*kinds, np.stack([array])):
            (got,) = prepare(image, "native", 16, 2048)
            torch.testing.assert_close(got, want)
        grey, pale = prepare(
            [array[..., 0], Image.fromarray(array).convert("RGBA")], "native", 16, 512
        )
        assert grey.shape == pale.shape == (3, 64, 96)
        torch.testing.assert_close(pale, want)
        assert [len(prepare(kinds, {"height": 32, "width": 48}, 16, 2048))] == [5]
        for image, error in (("x", TypeError), (array[:0], ValueError), (tensor.long(), TypeError)):
            with pytest.raises(error, match="images must be"):
                prepare(image, "native", 16, 512)

    def test_sizes(self) -> None:
        assert fit_size(100, 50, "native", 16, 2048) == (96, 48)
        assert fit_size(4000, 3000, "native", 16, 2048) == (2048, 1536)
        assert fit_size(5, 3000, "native", 14, 1792) == (14, 1792)
        assert fit_size(480, 640, {"shortest_edge": 224}, 14, 1792) == (224, 294)
        assert fit_size(
            480, 640, {"height": 512, "width": 256, "longest_edge": None}, 14, 1792
        ) == (*(518, 252),)
        with pytest.raises(ValueError, match="size must be"):
            fit_size(4, 4, {"longest_edge": 3}, 16, 512)

    def test_photographs_of_several_sizes(self) -> None:
        processor = FastaggloImageProcessor(patch_size=16, max_resolution=128, size="native")
        images = [data.astronaut(), data.coffee()]
        found = processor(images)["pixel_values"]
        assert [tuple(x.shape) for x in found] == [(3, 128, 128), (3, 80, 128)]
        with pytest.raises(ValueError, match="make no one batch"):
            processor(images, return_tensors="pt")
        batch = processor(images, size={"height": 64, "width": 64}, return_tensors="pt")
        assert batch["pixel_values"].shape == (2, 3, 64, 64)


class TestPlainModule:
    class Classifier(nn.Module):
        def __init__(self, backbone: Student) -> None:
            super().__init__()
            self.backbone = backbone
            self.head = nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x).backbone.spatial[0].mean(dim=(1, 2)))

    def test_trains_moves_copies_and_compiles(self) -> None:
        model = self.Classifier(student(heads={})).train()
        x, y = photo().repeat(3, 1, 1, 1), torch.tensor([0, 1, 2])
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss = nn.functional.cross_entropy(model(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert model.backbone.patch_embed.weight.grad.abs().sum() > 0
        model.eval()
        twin = copy.deepcopy(model)
        twin.load_state_dict(model.state_dict())
        with torch.inference_mode():
            want = model(x)
            assert torch.equal(twin(x), want)
            assert model.to(torch.float64)(x.double()).dtype == torch.float64
            again = torch.compile(twin, backend="aot_eager")(x)
        torch.testing.assert_close(again, want)
        stack = nn.Sequential(nn.Identity(), twin, nn.Softmax(dim=1))
        assert stack(x).shape == (3, 3)
