"""Presets, parameter counts and the configuration's checks."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastagglo.model import HeadSpec, Student, StudentConfig, create_student
from fastagglo.model.config import PRESETS

HEADS = {"clip": HeadSpec(summary=10, spatial=12), "sam": HeadSpec(spatial=8, upsample=2)}


def on_meta(name: str, **options) -> Student:
    with torch.device("meta"):
        return create_student(name, **options)


def count(student: Student) -> int:
    return sum(p.numel() for p in student.trunk_parameters()) - student.positions.table.numel()


def closed_form(c: StudentConfig) -> int:
    """Weights and biases, from the definition of a ViT."""
    w, m = c.width, c.mlp_width
    attention = w * 3 * w + 3 * w + w * w + w
    mlp = w * 2 * m + 2 * m + m * w + w if c.mlp == "swiglu" else w * m + m + m * w + w
    block = 2 * 2 * w + attention + mlp + (0 if c.layer_scale is None else 2 * w)
    embedding = 3 * c.patch_size**2 * w + w + (max(len(c.heads), 1) + c.registers) * w
    return c.depth * block + embedding + 2 * w


@pytest.mark.parametrize("name", PRESETS)
def test_counts_in_closed_form_on_meta(name: str) -> None:
    student = on_meta(name)
    assert all(p.is_meta for p in student.parameters())
    assert count(student) == closed_form(student.config)
    grid = student.config.max_resolution // student.config.patch_size
    assert student.positions.table.shape == (1, grid * grid, student.config.width)
    student = on_meta(name, heads=HEADS, registers=7, layer_scale=0.1)
    assert count(student) == closed_form(student.config)


# Published sizes of the trunks in millions, to the digits that are published.
@pytest.mark.parametrize(("name", "millions"), [("B", 86), ("L", 303), ("SO400M", 412), ("H", 631)])
def test_published_counts(name: str, millions: int) -> None:
    assert round(count(on_meta(name)) / 1e6) == millions


def test_g_has_the_parameters_of_dinov2_g() -> None:
    # DINOv2's ViT-g/14: 1,136,480,768 with one CLS and one mask token and 37 x 37 + 1 positions.
    student = on_meta("g", registers=0)
    assert count(student) + 1536 + (37 * 37 + 1) * 1536 == 1_136_480_768


def test_presets_follow_the_recipe() -> None:
    shapes = {n: (c.width, c.depth, c.num_heads, c.patch_size) for n, c in PRESETS.items()}
    assert shapes == {
        "tiny": (192, 6, 3, 16),
        "B": (768, 12, 12, 16),
        "L": (1024, 24, 16, 16),
        "SO400M": (1152, 27, 16, 16),
        "H": (1280, 32, 16, 16),
        "g": (1536, 40, 24, 14),
    }
    assert [n for n, c in PRESETS.items() if c.layer_scale is not None] == ["B", "L", "g"]
    assert {c.layer_scale for c in PRESETS.values()} == {None, 1e-5}
    assert PRESETS["g"].grid == 128
    assert PRESETS["B"].grid == 128


def test_the_other_g() -> None:
    student = on_meta("g", patch_size=16, mlp="gelu", mlp_width=6144, max_resolution=2048)
    assert student.blocks[0].mlp.fc1.weight.shape == (6144, 1536)
    assert student.positions.grid == 128


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("tiny", {2, 5}),
        ("B", {2, 5, 8, 11}),
        ("L", {5, 11, 17, 23}),
        ("SO400M", {5, 11, 17, 23, 26}),
        ("H", {7, 15, 23, 31}),
        ("g", {4, 9, 14, 19, 24, 29, 34, 39}),
    ],
)
def test_global_layers(name: str, layers: set[int]) -> None:
    assert PRESETS[name].global_layer_set == layers


def test_more_global_layers_than_layers() -> None:
    config = dataclasses.replace(PRESETS["tiny"], depth=3, global_layers=4)
    assert config.global_layer_set == {0, 1, 2}


def test_explicit_global_layers_and_always_the_last() -> None:
    config = dataclasses.replace(PRESETS["tiny"], global_layers=[4, 1])
    assert config.global_layers == (1, 4)
    assert config.global_layer_set == {1, 4, 5}
    assert dataclasses.replace(config, global_layers=()).global_layer_set == {5}


def test_a_plain_backbone_has_one_cls_token() -> None:
    student = on_meta("tiny")
    assert list(student.cls_tokens) == ["backbone"]
    assert not list(student.head_parameters())
    assert list(on_meta("tiny", heads=HEADS).cls_tokens) == ["clip", "sam"]
    heads = {"siglip": HeadSpec(summary=4), "dino": HeadSpec(summary=4)}
    with torch.device("meta"):
        student = Student(dataclasses.replace(PRESETS["tiny"], heads=heads))
    assert list(student.cls_tokens) == ["siglip", "dino"]  # a head reads the token of its name


def test_round_trip_through_json() -> None:
    heads = {"z": HeadSpec(summary=3), "a": HeadSpec(spatial=4, spatial_blocks=1)}
    config = dataclasses.replace(
        PRESETS["g"],
        heads=heads,
        window=8,
        global_layers=(3, 39),
        drop_path=0.1,
        cls=("a", "z"),
        summary=("z",),
        pixel_std=(0.1, 0.2, 0.3),
        block_normaliser="layer",
    )
    back = StudentConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert list(back.heads) == ["z", "a"]  # the order of the CLS slots
    assert hash(back) == hash(config)


def test_the_mapping_of_heads_is_copied() -> None:
    heads = dict(HEADS)
    config = dataclasses.replace(PRESETS["tiny"], heads=heads)
    heads.clear()
    assert list(config.heads) == ["clip", "sam"]


def test_layer_ids_and_groups() -> None:
    student = on_meta(
        "tiny", layer_scale=1e-5, heads={"v": HeadSpec(summary=3, spatial=4, spatial_blocks=1)}
    )
    ids = student.layer_ids()
    assert list(ids) == [name for name, _ in student.named_parameters()]
    assert ids["patch_embed.weight"] == ids["positions.table"] == ids["registers"] == 0
    assert ids["cls_tokens.v"] == 0
    assert ids["blocks.0.attn.qkv.weight"] == 1
    assert ids["blocks.5.mlp.fc2.bias"] == 6
    assert ids["norm.weight"] == ids["heads.summary.v.fc1.weight"] == 7
    assert ids["head_blocks.v.0.attn.qkv.weight"] == 7

    exempt = student.no_weight_decay()
    assert {"positions.table", "registers", "cls_tokens.v", "patch_embed.bias"} <= exempt
    assert {"norm.weight", "blocks.0.ls1.gamma", "blocks.0.norm1.bias"} <= exempt
    decayed = set(ids) - exempt
    assert decayed == {n for n, p in student.named_parameters() if n in decayed and p.dim() == 2}
    assert {"patch_embed.weight", "heads.spatial.v.final.2.weight"} <= decayed

    trunk, heads = set(student.trunk_parameters()), set(student.head_parameters())
    assert trunk.isdisjoint(heads)
    assert trunk | heads == set(student.parameters())
    assert set(student.heads.parameters()) | set(student.head_blocks.parameters()) == heads


class TestErrors:
    def test_names(self) -> None:
        with pytest.raises(ValueError, match=r"unknown student 'SO400'; did you mean 'SO400M'\?"):
            create_student("SO400")
        with pytest.raises(ValueError, match="unknown student 'x'; known: 'tiny', 'B'"):
            create_student("x")
        with pytest.raises(TypeError, match=r"'windows' of a student; did you mean 'window'\?"):
            create_student("tiny", windows=4)
        with pytest.raises(ValueError, match=r"'widht'; did you mean 'width'\?"):
            StudentConfig.from_dict({"widht": 4})
        with pytest.raises(ValueError, match="missing name, depth, num_heads, mlp_width"):
            StudentConfig.from_dict({"width": 4})

    @pytest.mark.parametrize(
        ("override", "error", "match"),
        [
            ({"width": 0}, ValueError, "width must be at least 1, got 0"),
            ({"depth": 2.0}, TypeError, r"depth must be an int, got 2\.0"),
            ({"registers": -1}, ValueError, "registers must be at least 0"),
            ({"registers": True}, TypeError, "registers must be an int, got True"),
            ({"num_heads": 5}, ValueError, "num_heads=5 and width=192"),
            ({"mlp": "relu"}, ValueError, "'gelu' or 'swiglu', got 'relu'"),
            ({"max_resolution": 8}, ValueError, "at least patch_size=16, got 8"),
            ({"layer_scale": "x"}, TypeError, "layer_scale must be a number"),
            ({"layer_scale": float("nan")}, ValueError, "layer_scale must be finite, got nan"),
            ({"drop_path": 1.0}, ValueError, r"drop_path must be in \[0, 1\), got 1.0"),
            ({"norm_eps": 0.0}, ValueError, "norm_eps must be positive"),
            ({"window": 0}, ValueError, "window must be at least 1"),
            ({"global_layers": 0}, ValueError, "at least 1"),
            ({"global_layers": (1, 6)}, ValueError, r"distinct layers of 0\.\.5"),
            ({"global_layers": (1, 1)}, ValueError, "distinct layers"),
            ({"global_layers": "all"}, TypeError, "global_layers must be an int"),
            ({"heads": ["clip"]}, TypeError, "heads must map teacher names"),
            ({"heads": {"clip": 3}}, TypeError, r"heads\['clip'\] must be a HeadSpec, got 3"),
            ({"heads": {"a.b": HeadSpec(summary=1)}}, ValueError, "without dots"),
            ({"patch_bias": 1}, TypeError, "patch_bias must be a bool, got 1"),
            ({"block_normaliser": "all"}, ValueError, "'shared', 'layer' or None, got 'all'"),
            ({"pixel_mean": (0.5, 0.5)}, TypeError, "pixel_mean must be three numbers"),
            ({"pixel_std": (0.5, 0.0, 1)}, ValueError, "pixel_std must be positive"),
            ({"cls": "clip"}, TypeError, "cls must be a tuple of names"),
            ({"cls": ("a", "a")}, ValueError, "cls must be distinct"),
            ({"summary": ("clp",), "heads": HEADS}, ValueError, "no CLS token 'clp'; did you mean"),
            ({"cls": ("a", "b"), "heads": HEADS}, ValueError, "it lacks 'clip'"),
        ],
    )
    def test_values(self, override: dict, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            on_meta("tiny", **override)
