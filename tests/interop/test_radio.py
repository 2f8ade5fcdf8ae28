"""RADIO's weights in and out: names, shapes, features, files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from skimage import data
from torch import Tensor

import fastagglo
from fastagglo.errors import UserError
from fastagglo.interop import (
    RadioMismatch,
    RadioStudent,
    from_radio,
    save_radio,
    to_radio,
)
from fastagglo.model import (
    HeadSpec,
    PackedBatch,
    Student,
    StudentConfig,
    create_student,
    load_student,
    save_student,
)

_spec = importlib.util.spec_from_file_location(
    "radio_published", Path(__file__).with_name("radio_published.py")
)
published = importlib.util.module_from_spec(_spec)
sys.modules["radio_published"] = published
_spec.loader.exec_module(published)
VERSIONS, tiny, hub, folder, fill = (
    getattr(published, name) for name in ("VERSIONS", "tiny", "hub", "folder", "fill")
)


def photos(height: int, width: int) -> Tensor:
    """(2, 3, height, width) crops of two photographs, in [0, 1]."""
    crops = [data.astronaut()[40 : 40 + height, 60 : 60 + width], data.coffee()[:height, :width]]
    return torch.stack([torch.from_numpy(c.copy()).permute(2, 0, 1) for c in crops]) / 255


def same(found: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    assert set(found) == set(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("layout", ["hub", "folder"])
def test_names_and_shapes_of_the_published_models(name: str, layout: str) -> None:
    version = VERSIONS[name]
    shapes = hub(version) if layout == "hub" else folder(version)
    state = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
    student = from_radio(state)
    assert student.report.ok
    config = student.config
    assert (config.width, config.depth, config.mlp_width) == (
        *(version.width, version.depth, version.mlp),
    )
    assert (config.num_heads, config.patch_size) == (version.attention, version.patch)
    assert config.grid == 128
    assert len(config.cls_names) == version.cls
    assert config.registers == version.registers
    assert list(config.heads) == list(version.teachers)
    assert len(config.summary or config.cls_names) == version.summary
    assert (config.mlp == "swiglu") == config.patch_bias == config.final_norm == version.dino
    assert config.cls == (("backbone",) if version.cls == 1 else tuple(version.teachers))
    unused = {n for n in shapes if n.endswith(("reg_token", "mask_token"))}
    assert set(student.report.unused) == unused
    counted = [n for n in shapes if n not in unused and "norm_" not in n and "_idxs" not in n]
    want = sum(math.prod(shapes[n]) for n in counted)
    assert sum(p.numel() for p in student.parameters()) == want
    back = to_radio(student)
    assert {n: tuple(t.shape) for n, t in back.items()} == shapes


@pytest.mark.parametrize("name", VERSIONS)
def test_a_round_trip_is_bitwise(name: str) -> None:
    version = tiny(VERSIONS[name])
    attention = version.attention
    for shapes in (
        hub(version),
        hub(version, by_name=False, normalisers="layer"),
        folder(version),
        folder(version, prefix="vision_model."),
        {f"module.{n}": shape for n, shape in hub(version, normalisers="shared").items()},
    ):
        for dtype in (torch.float32, torch.float16):
            state = fill(shapes, dtype=dtype)
            student = from_radio(state, num_heads=attention)
            assert student.report.ok
            assert isinstance(student, RadioStudent)
            assert not student.training
            same(to_radio(student), state)


@pytest.mark.parametrize("name", ["radio_v2.5-b", "radio_v2.5-g", "c-radio_v3-h", "c-radio_v4-h"])
@pytest.mark.parametrize("size", [(96, 96), (64, 48)])
def test_features_are_those_of_the_published_model(name: str, size: tuple[int, int]) -> None:
    version = tiny(VERSIONS[name])
    size = tuple(side * version.patch // 16 for side in size)
    check_features(version, fill(hub(version)), photos(*size))


def check_features(version, state: dict[str, Tensor], images: Tensor, **options) -> None:
    student = from_radio(state, num_heads=version.attention, **options)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    want = published.forward(version, state, images, options.get("names"))
    with torch.inference_mode():
        out = student(images)
    assert list(out) == list(version.teachers)
    for teacher, (summary, spatial) in want.items():
        got = out.backbone if teacher == "backbone" else out[teacher]
        # fp32 sums over at most a few hundred terms against fp64 of values of order one.
        torch.testing.assert_close(got.summary.double(), summary, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(got.spatial[0].double(), spatial, atol=2e-5, rtol=2e-5)


def test_the_first_heads_and_normalisers() -> None:
    version = replace(tiny(VERSIONS["radio_v2.5-h"]), head="v1")
    state = fill(hub(version, normalisers="layer"))
    check_features(version, state, photos(64, 96))
    student = from_radio(state, num_heads=version.attention)
    # Intermediate features: alpha_i R_i (x - mean_i) of the patches, the prefix as it is.
    plain = {n: t for n, t in state.items() if not n.startswith("_intermediate")}
    bare = from_radio(plain, num_heads=version.attention)
    images = photos(64, 96)
    got = student.forward_intermediates(images, [0, 1], True, output_fmt="NLC")[1]
    raw = bare.forward_intermediates(images, [0, 1], True, output_fmt="NLC")[1]
    start = "_intermediate_feature_normalizer."
    for i in range(2):
        assert torch.equal(got[i][1], raw[i][1])
        want = (raw[i][0] - state[f"{start}means"][i]) @ state[f"{start}rotation"][i].T
        torch.testing.assert_close(got[i][0], state[f"{start}alphas"][i] * want)


def test_attention_heads_of_spatial_heads_are_timms() -> None:
    from timm.models.vision_transformer import Block

    version = tiny(VERSIONS["c-radio_v4-so400m"])
    state = fill(hub(version))
    student = from_radio(state, num_heads=version.attention)
    x = torch.randn(1, 9, version.width)
    batch = PackedBatch.from_images([torch.rand(1, 3, 48, 48)])
    place = student._geometry(*student._mix(batch, None))
    got = student._head_tokens("dino_v3", x[0], place)
    for i in range(2):
        timm_block = Block(version.width, num_heads=16, init_values=1e-5)
        start = f"_feature_projections.dino_v3.blocks.{i}."
        own = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
        timm_block.load_state_dict(own)
        x = timm_block(x)
    torch.testing.assert_close(got, x[0], atol=1e-5, rtol=1e-5)


class TestTransformers:
    """transformers' own RadioModel, an implementation that shares no line with this one."""

    @staticmethod
    def model(**overrides):
        from transformers import RadioConfig, RadioModel

        torch.manual_seed(3)
        settings = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        settings |= {"max_img_size": 128, "layerscale_value": 0.7, "summary_idxs": [0, 2]}
        model = RadioModel(RadioConfig(**(settings | overrides))).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.normal_(parameter, 0.5)
        return model

    @staticmethod
    def compare(model, student: Student, sizes=((64, 64), (96, 48), (128, 128))) -> None:
        for size in sizes:
            images = photos(*size)
            with torch.inference_mode():
                want, got = model(images), student(images).backbone
            torch.testing.assert_close(got.summary, want.summary, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(
                got.spatial[0].flatten(1, 2), want.features, atol=2e-5, rtol=2e-5
            )
            tokens = student.forward_features(images)
            torch.testing.assert_close(tokens, want.last_hidden_state, atol=2e-5, rtol=2e-5)

    @pytest.mark.parametrize("swiglu", [False, True])
    def test_a_folder(self, swiglu: bool, tmp_path: Path) -> None:
        model = self.model(use_swiglu_ffn=swiglu)
        model.save_pretrained(tmp_path)
        student = fastagglo.load(tmp_path)
        assert student.config.cls_names[0] == "0"
        self.compare(model, student)
        # The weights alone do not say how many attention heads there are; config.json does.
        (tmp_path / "config.json").unlink()
        with pytest.raises(UserError, match="width 48 does not say how many attention heads"):
            fastagglo.load(tmp_path)
        self.compare(model, fastagglo.load(tmp_path / "model.safetensors", num_heads=4))

    def test_shards(self, tmp_path: Path) -> None:
        model = self.model()
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        self.compare(model, fastagglo.load(tmp_path))

    def test_its_state_dict_both_ways(self, tmp_path: Path) -> None:
        model = self.model(use_swiglu_ffn=True, num_cls_tokens=2, num_registers=3, summary_idxs=[1])
        state = model.state_dict()
        student = from_radio(state, model.config.to_dict())
        self.compare(model, student)
        same(to_radio(student), state)
        save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "radio.safetensors")
        options = {"num_heads": 4, "cls_tokens": 2}
        self.compare(model, fastagglo.load(tmp_path / "radio.safetensors", **options))

    def test_a_student_becomes_one(self) -> None:
        settings = {"width": 48, "depth": 3, "num_heads": 4, "mlp_width": 192, "layer_scale": 0.3}
        settings |= {"patch_bias": False, "final_norm": False, "cls": ("a", "b", "c")}
        student = create_student("tiny", max_resolution=128, registers=7, **settings).eval()
        model = self.model(summary_idxs=[0, 1, 2])
        model.load_state_dict(to_radio(student, "native"))
        self.compare(model, student)

    @pytest.mark.parametrize(
        "change", [{}, {"mlp": "swiglu", "layer_scale": None, "mlp_width": 88}]
    )
    def test_a_folder_that_it_reads_by_itself(self, change: dict, tmp_path: Path) -> None:
        from transformers import AutoModel

        settings = {"width": 48, "depth": 2, "num_heads": 4, "mlp_width": 100, "layer_scale": 0.3}
        settings |= {"patch_bias": False, "final_norm": False, "cls": ("a", "b", "c")}
        settings |= {"summary": ("b",), "max_resolution": 128, "pixel_std": (0.2, 0.3, 0.4)}
        student = create_student("tiny", registers=7, **(settings | change)).eval()
        save_radio(student, tmp_path)
        model = AutoModel.from_pretrained(tmp_path, trust_remote_code=False)
        assert type(model).__name__ == "RadioModel"
        self.compare(model, student)
        back = fastagglo.load(tmp_path)
        assert back.config == student.config
        same(back.state_dict(), student.state_dict())
        # One that came from a torch.hub file too; its heads stay behind.
        version = tiny(VERSIONS["c-radio_v4-h"])
        radio = from_radio(fill(hub(version)), num_heads=version.attention)
        save_radio(radio, tmp_path / "v4")
        self.compare(AutoModel.from_pretrained(tmp_path / "v4"), radio, ((64, 64), (48, 96)))
        same(fastagglo.load(tmp_path / "v4").state_dict(), radio.state_dict())

    def test_what_it_cannot_be(self, tmp_path: Path) -> None:
        student = create_student("tiny", depth=1, final_norm=False, max_resolution=64)
        with pytest.raises(UserError, match="has no patch_bias; write a"):
            save_radio(student, tmp_path / "folder")
        settings = {"mlp": "swiglu", "mlp_width": 60, "patch_bias": False, "final_norm": False}
        with pytest.raises(UserError, match="multiples of 8, got 60"):
            save_radio(create_student("tiny", depth=1, **settings), tmp_path / "folder")
        with pytest.raises(ValueError, match="layout of a folder must be 'transformers'"):
            save_radio(student, tmp_path / "folder", "hub")
        assert not (tmp_path / "folder").exists()


class TestReport:
    version = tiny(VERSIONS["c-radio_v3-b"])

    def test_every_difference_is_named(self) -> None:
        state = fill(hub(self.version))
        del state["base_model.blocks.1.mlp.fc2.bias"], state["_heads.clip.fc1.weight"]
        del state["input_conditioner.norm_std"], state["base_model.patch_generator.pos_embed"]
        state["base_model.blocks.0.attn.q_norm.weight"] = torch.zeros(3)
        state["_teacher_state"] = torch.zeros(1)
        state["base_model.blocks.0.norm1.weight"] = torch.zeros(9)
        state["_feature_projections.sam.final.2.bias"] = torch.zeros(1)
        with pytest.raises(RadioMismatch) as caught:
            from_radio(state, num_heads=12)
        found = caught.value.report
        assert not found.ok
        assert set(found.missing) == {
            "base_model.blocks.1.mlp.fc2.bias",
            "_heads.clip.fc1.weight",
            "input_conditioner.norm_std",
            "base_model.patch_generator.pos_embed",
        }
        assert set(found.unexpected) == {"base_model.blocks.0.attn.q_norm.weight", "_teacher_state"}
        width = self.version.width
        assert found.misshapen == {
            "base_model.blocks.0.norm1.weight": ((9,), (width,)),
            "_feature_projections.sam.final.2.bias": ((1,), (10,)),
        }
        text = str(caught.value)
        for name in (*found.missing, *found.unexpected, *found.misshapen):
            assert name in text
        assert all(kind in text for kind in ("missing:", "unexpected:", "of another shape:"))
        lenient = from_radio(state, num_heads=12, strict=False)
        assert lenient.report == found
        kept = lenient.state_dict()
        value = state["base_model.blocks.1.mlp.fc1.bias"]
        assert torch.equal(kept["blocks.1.mlp.fc1.bias"], value)
        assert lenient(torch.rand(1, 3, 32, 32))["sam"].spatial[0].isfinite().all()

    def test_a_missing_token_table(self) -> None:
        state = fill(hub(self.version))
        del state["base_model.patch_generator.cls_token.token"]
        with pytest.raises(RadioMismatch, match=r"missing: base_model\.patch_generator\.cls_token"):
            from_radio(state, num_heads=12)

    def test_other_models_beside_it_are_left_alone(self) -> None:
        state = fill(folder(self.version, "vision_model."))
        student = from_radio(state | {"language_model.layer.weight": torch.zeros(2)}, num_heads=12)
        assert student.report.ok
        with pytest.raises(RadioMismatch, match=r"unexpected: vision_model\.radio_model\.extra"):
            from_radio(state | {"vision_model.radio_model.extra": torch.zeros(2)}, num_heads=12)

    def test_what_is_no_radio(self) -> None:
        with pytest.raises(UserError, match=r"no RADIO trunk.*base_model\.patch_generator"):
            from_radio({"blocks.0.norm1.weight": torch.zeros(3)})
        with pytest.raises(UserError, match="no transformer blocks"):
            from_radio({"base_model.patch_generator.embedder.weight": torch.zeros(4, 48)})
        with pytest.raises(TypeError, match="must be a mapping, got list"):
            from_radio([1])
        with pytest.raises(TypeError, match="'args' must be a tensor, got dict"):
            from_radio({"args": {}})
        state = fill(hub(self.version))
        with pytest.raises(UserError, match="several RADIO trunks"):
            from_radio(state | {f"module.{n}": t for n, t in state.items()}, num_heads=12)


class TestWhatTheFileSays:
    version = tiny(VERSIONS["radio_v2.5-h"])

    def test_counted_teachers_get_their_names(self) -> None:
        state = fill(hub(self.version, by_name=False))
        plain = from_radio(state, num_heads=16)
        assert list(plain.config.heads) == ["0", "1", "2", "3"]
        given = from_radio(state, num_heads=16, teachers=list(self.version.teachers))
        told = from_radio(state, published.arguments(self.version), num_heads=16)
        for student in (given, told):
            assert list(student.config.heads) == list(self.version.teachers)
            same(to_radio(student), state)
            assert student.config.summary == ("clip", "siglip", "dino_v2")

    def test_unknown_teachers_need_an_order(self) -> None:
        version = replace(self.version, teachers={"x": (5, 6), "a": (7, 8)}, cls=2, summary=2)
        state = fill(hub(version))
        with pytest.raises(UserError, match=r"heads a, x read.*give teachers="):
            from_radio(state, num_heads=16)
        check_features(version, state, photos(64, 64), teachers=["x", "a"])

    def test_a_subset_of_the_heads(self) -> None:
        state = fill(hub(self.version))
        state = {n: t for n, t in state.items() if ".siglip." not in n and ".clip." not in n}
        student = from_radio(state, num_heads=16)
        assert list(student.config.heads) == ["dino_v2", "sam"]
        assert len(student.config.cls_names) == 4
        images = photos(64, 64)
        want = published.forward(replace(self.version, teachers={}), state, images)
        out = student(images)
        torch.testing.assert_close(
            out.backbone.summary.double(), want["backbone"][0], atol=2e-5, rtol=2e-5
        )
        cls = student.forward_features(images)[:, 2]
        summary = student.heads.summary["dino_v2"](cls)
        torch.testing.assert_close(out["dino_v2"].summary, summary)
        same(to_radio(student), state)

    def test_tokens(self) -> None:
        state = fill(hub(replace(self.version, registers=5)))
        no_heads = {n: t for n, t in state.items() if not n.startswith(("_heads", "_feature"))}
        with pytest.raises(UserError, match=r"9 rows of tokens.*give cls_tokens"):
            from_radio(no_heads, num_heads=16)
        assert from_radio(no_heads, num_heads=16, cls_tokens=4).config.registers == 5
        with pytest.raises(UserError, match="cls_tokens must be 1 to the 9 rows"):
            from_radio(no_heads, num_heads=16, cls_tokens=10)
        args = published.arguments(self.version)
        args["teachers"][1]["token_slot"] = 0
        with pytest.raises(UserError, match="read one CLS token"):
            from_radio(fill(hub(self.version)), args, num_heads=16)

    def test_cells_per_patch(self) -> None:
        teachers = self.version.teachers | {"dino_v2": (8, 12)}
        state = fill(hub(replace(self.version, teachers=teachers)))
        args = published.arguments(self.version)
        args["teachers"][2]["fd_upsample_factor"] = 2
        for options in ({"args": args}, {"upsample": {"dino_v2": 2}}):
            student = from_radio(state, num_heads=16, **options)
            assert student(photos(64, 32))["dino_v2"].spatial[0].shape == (2, 8, 4, 3)
            same(to_radio(student), state)


class TestFiles:
    version = tiny(VERSIONS["c-radio_v4-h"])
    state = fill(hub(version))

    def want(self) -> Tensor:
        student = from_radio(self.state, published.arguments(self.version), num_heads=16)
        return student(photos(48, 64))["dino_v3"].spatial[0]

    def test_safetensors(self, tmp_path: Path) -> None:
        save_file(self.state, tmp_path / "radio.safetensors")
        student = fastagglo.load(tmp_path / "radio.safetensors", num_heads=16)
        assert torch.equal(student(photos(48, 64))["dino_v3"].spatial[0], self.want())
        half = fastagglo.load(
            str(tmp_path / "radio.safetensors"), dtype=torch.bfloat16, num_heads=16
        )
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        got = half(photos(48, 64))["dino_v3"].spatial[0].float()
        assert torch.nn.functional.cosine_similarity(got, self.want(), dim=-1).min() > 0.99

    @pytest.mark.parametrize("key", ["state_dict", "state_dict_ema"])
    def test_a_hub_file(self, key: str, tmp_path: Path) -> None:
        args = argparse.Namespace(**published.arguments(self.version), dtype=torch.float32)
        content = {key: self.state, "args": args, "epoch": 3}
        if key == "state_dict_ema":
            content["state_dict"] = {}
        torch.save(content, tmp_path / "radio.pth.tar")
        student = fastagglo.load(tmp_path / "radio.pth.tar", num_heads=16)
        assert student.config.summary == ("siglip2-g", "dino_v3")
        assert torch.equal(student(photos(48, 64))["dino_v3"].spatial[0], self.want())
        student.train()(photos(48, 64))["sam3"].spatial[0].sum().backward()
        assert student.positions.table.grad.isfinite().all()

    def test_a_hub_file_of_before_zip(self, tmp_path: Path) -> None:
        content = {"state_dict": self.state, "args": published.arguments(self.version)}
        torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        student = fastagglo.load(tmp_path / "old.pth", num_heads=16)
        assert torch.equal(student(photos(48, 64))["dino_v3"].spatial[0], self.want())

    def test_tensors_in_the_memory_of_others(self, tmp_path: Path) -> None:
        state = dict(self.state)
        state["input_conditioner.norm_mean"] = state["input_conditioner.norm_std"]
        student = from_radio(state, published.arguments(self.version), num_heads=16)
        save_radio(student, tmp_path / "radio.safetensors")
        again = to_radio(fastagglo.load(tmp_path / "radio.safetensors"))
        for name in ("input_conditioner.norm_mean", "input_conditioner.norm_std"):
            assert torch.equal(again[name], state["input_conditioner.norm_std"])

    def test_a_broken_index(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map"')
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json cannot be read"):
            fastagglo.load(tmp_path)

    def test_what_is_left_out_has_the_dtype_of_the_rest(self) -> None:
        state = {name: value.bfloat16() for name, value in self.state.items()}
        del state["base_model.blocks.0.attn.proj.weight"]
        arguments = published.arguments(self.version)
        student = from_radio(state, arguments, num_heads=16, strict=False)
        assert {p.dtype for p in student.parameters()} == {torch.bfloat16}

    def test_a_folder_of_remote_code(self, tmp_path: Path) -> None:
        state = fill(folder(self.version))
        config = {"args": published.arguments(self.version), "auto_map": {"AutoModel": "x--y.Z"}}
        config |= {"model_type": "x", "adaptor_configs": {}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "modeling.py").write_text("raise SystemExit('remote code ran')")
        save_file(state, tmp_path / "model.safetensors")
        student = fastagglo.load(tmp_path, num_heads=16)
        assert list(student.config.heads) == list(self.version.teachers)
        same(to_radio(student), state)

    def test_pickles_that_run_code_are_refused(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self):
                return (print, ("ran",))

        torch.save({"state_dict": self.state, "args": Evil()}, tmp_path / "radio.pth")
        with pytest.raises(UserError, match="cannot be read with weights_only"):
            fastagglo.load(tmp_path / "radio.pth")

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="does not exist"):
            fastagglo.load(tmp_path / "none.safetensors")
        with pytest.raises(UserError, match=r"has none of model\.safetensors"):
            fastagglo.load(tmp_path)
        (tmp_path / "bad.safetensors").write_bytes(b"no")
        with pytest.raises(UserError, match="cannot be read as safetensors"):
            fastagglo.load(tmp_path / "bad.safetensors")
        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match=r"other\.safetensors: no RADIO trunk"):
            fastagglo.load(tmp_path / "other.safetensors")


class TestOwnStudents:
    heads = {  # noqa: RUF012
        "z": HeadSpec(summary=10, spatial=12, blocks=2, summary_blocks=1),
        "a": HeadSpec(spatial=8, upsample=2, spatial_blocks=1),
    }

    def student(self, **overrides) -> Student:
        settings = {"width": 48, "depth": 2, "mlp_width": 64, "max_resolution": 128}
        return create_student("tiny", heads=self.heads, **(settings | overrides)).eval()

    @pytest.mark.parametrize("layout", [None, "hub", "transformers"])
    def test_written_under_radios_names_and_read_back(
        self, layout: str | None, tmp_path: Path
    ) -> None:
        for overrides in ({}, {"mlp": "swiglu", "layer_scale": 0.1, "window": 2}):
            student = self.student(**overrides)
            save_radio(student, tmp_path / "radio.safetensors", layout)
            back = fastagglo.load(tmp_path / "radio.safetensors")
            assert back.config == student.config
            same(back.state_dict(), student.state_dict())
            save_student(back, tmp_path / "saved")
            same(load_student(tmp_path / "saved").state_dict(), student.state_dict())
        with pytest.raises(UserError, match="leave out num_heads"):
            fastagglo.load(tmp_path / "radio.safetensors", num_heads=3)

    def test_a_trained_radio_student_goes_back(self, tmp_path: Path) -> None:
        version = tiny(VERSIONS["radio_v2.5-b"])
        state = fill(hub(version, by_name=False))
        copy = {name: value.clone() for name, value in state.items()}
        student = from_radio(copy, published.arguments(version), num_heads=12)
        with torch.no_grad():
            student.blocks[0].norm1.weight += 1
        save_radio(student, tmp_path / "radio.safetensors")
        back = fastagglo.load(tmp_path / "radio.safetensors")
        assert back.config == student.config
        changed = dict(to_radio(back))
        assert set(changed) == set(state)
        name = "base_model.blocks.0.norm1.weight"
        assert torch.equal(changed.pop(name), state[name] + 1)
        same(changed, {n: t for n, t in state.items() if n != name})

    def test_saved_students(self, tmp_path: Path) -> None:
        student = self.student()
        save_student(student, tmp_path)
        for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
            back = fastagglo.load(path)
            assert not back.training
            same(back.state_dict(), student.state_dict())
        with pytest.raises(UserError, match="num_heads, strict only apply to RADIO"):
            fastagglo.load(tmp_path, num_heads=3, strict=False)

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="expected a Student, got int"):
            to_radio(3)
        with pytest.raises(ValueError, match="layout must be one of hub, transformers, native"):
            to_radio(self.student(), "timm")
        with pytest.raises(ValueError, match="'native' has no names for heads"):
            to_radio(self.student(), "native")
        with pytest.raises(UserError, match=r"must end in \.safetensors, or be a folder"):
            save_radio(self.student(), tmp_path / "radio.pth")


def test_configurations_of_before_still_load() -> None:
    values = create_student("tiny", depth=1).config.to_dict()
    new = ("patch_bias", "final_norm", "cls", "summary", "pixel_mean", "pixel_std")
    for name in (*new, "feature_normaliser", "block_normaliser"):
        del values[name]
    assert StudentConfig.from_dict(values) == create_student("tiny", depth=1).config
