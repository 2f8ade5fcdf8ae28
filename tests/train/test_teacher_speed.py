"""Faster teachers: the same features, or an error that is said before the run; never stale ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils
from safetensors.torch import save_file
from torch import nn

from fastagglo.errors import UserError
from fastagglo.features import Features
from fastagglo.interop import patching
from fastagglo.teachers import Teacher, TeacherSpec
from fastagglo.teachers.base import TeacherSettingError
from fastagglo.teachers.precision import set_precision
from fastagglo.train.cache import FeatureCache, LazyTeacher
from fastagglo.train.config import TeacherSettings
from fastagglo.train.targets import load_one_teacher
from fastagglo.train.teacher_speed import sample_of, speed_up

CPU = torch.device("cpu")
GREY = (0.5, 0.5, 0.5)


def enlivened(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def timm_vit(folder: Path) -> dict[str, str]:
    timm = pytest.importorskip("timm")
    name = "vit_base_patch16_clip_224"
    shape = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64}
    timm.models.save_for_hf(
        enlivened(timm.create_model(name, **shape)), folder, safe_serialization=True
    )
    return {"source": "timm", "model": name}


def clip_of_open_clip(folder: Path) -> dict[str, str]:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    model = enlivened(open_clip.CLIP(**config))
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    described = {"model_cfg": config, "preprocess_cfg": {"mean": GREY, "std": GREY}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return {"source": "open_clip", "model": "ViT-tiny"}


def dinov2_of_transformers(folder: Path) -> dict[str, str]:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=16,
        image_size=64,
    )
    enlivened(transformers.Dinov2Model(config)).save_pretrained(folder)
    return {"source": "transformers", "model": str(folder)}


MAKERS = {
    "timm": timm_vit,
    "open_clip": clip_of_open_clip,
    "transformers": dinov2_of_transformers,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Settings of a tiny saved teacher of each library."""
    found = {}
    for name, make in MAKERS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        found[name] = {**make(folder), "checkpoint": str(folder), "sizes": (64,)}
    return found


@pytest.fixture(scope="module")
def pictures():
    """Smooth pictures: what a teacher sees is no noise."""
    coarse = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    large = nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)
    return (255 * large).to(torch.uint8)


def load(place: dict, pictures: torch.Tensor | None = None, **changes: object) -> Teacher:
    settings = TeacherSettings(**{**place, **changes})
    sample = None if pictures is None else lambda spec, settings: pictures
    return load_one_teacher("vit", settings, CPU, sample)


def off_by(found: Features, right: Features) -> float:
    """By hand: root mean square of the difference of each view, the largest, over the deviation."""
    errors = []
    for a, b in ((found.summary, right.summary), (found.spatial, right.spatial)):
        if b is None:
            continue
        flat = b.flatten(0, -2)
        spread = (flat - flat.mean(0)).square().mean().sqrt()
        errors += [
            ((x - y).square().mean().sqrt() / spread).item() for x, y in zip(a, b, strict=True)
        ]
    return max(errors)


# What each setting does.


@pytest.mark.parametrize("library", MAKERS)
def test_patched_teachers_say_the_same(library, places, pictures):
    """fp32 sums of some dozen keys in another order: 1e-5 of the features' size."""
    plain, patched = load(places[library]), load(places[library], pictures, patch=True)
    right, found = plain(pictures), patched(pictures)
    for a, b in ((found.summary, right.summary), (found.spatial, right.spatial)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    assert patched.feature_errors == {"patch": pytest.approx(off_by(found, right), rel=1e-3)}
    report = patching.patch(patched.tower, mlp=False)
    assert len([x for x in report.patched if x.what == "packed attention"]) == 2


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 1e-4, 0.1), ("fp8", 1e-3, 0.3)])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_quantised_weights_and_their_error(library, kind, least, most, places, pictures):
    """int8 rounds at 1/254 of a row's range, FP8 (e4m3) each weight at 1/16 of itself."""
    pytest.importorskip("torchao")
    plain = load(places[library])
    quantised = load(places[library], pictures, quantise=kind)
    found, right = quantised(pictures), plain(pictures)
    (error,) = quantised.feature_errors.values()
    assert list(quantised.feature_errors) == [kind]
    assert error == pytest.approx(off_by(found, right), rel=1e-3)
    assert least < error < most
    wide = {"int8": "Int8Tensor", "fp8": "Float8Tensor"}[kind]
    linears = [m for m in quantised.tower.modules() if isinstance(m, nn.Linear)]
    assert linears
    assert all(type(m.weight).__name__ == wide for m in linears)
    assert found.spatial.dtype == torch.float32


def test_every_step_is_measured_against_float32(places, pictures):
    pytest.importorskip("torchao")
    plain = load(places["timm"])
    fast = load(places["timm"], pictures, dtype="bfloat16", patch=True, quantise="int8")
    assert list(fast.feature_errors) == ["bfloat16", "patch", "int8"]
    assert fast.feature_errors["int8"] == pytest.approx(off_by(fast(pictures), plain(pictures)))
    assert 1e-4 < fast.feature_errors["bfloat16"] < 0.1
    # As a teacher that was loaded in bfloat16, which is what a run without a sample does.
    assert torch.equal(
        load(places["timm"], pictures, dtype="bfloat16")(pictures).spatial,
        load(places["timm"], dtype="bfloat16")(pictures).spatial,
    )


def test_compiled_teachers_say_the_same(pictures):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    teacher = with_neck()
    right, flops = teacher(pictures).spatial, teacher.flops(64, 64)
    errors = speed_up("sam", teacher, TeacherSettings(model="sam", compile=True), pictures)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    found = teacher(pictures).spatial
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())
    assert errors == {"compile": pytest.approx(0, abs=1e-4)}
    assert teacher.flops(64, 64) == flops


def test_flops_are_those_of_the_plain_model(places, pictures):
    pytest.importorskip("torchao")
    plain = load(places["timm"])
    fast = load(places["timm"], pictures, patch=True, quantise="int8", dtype="bfloat16")
    assert fast.flops(64, 64) == plain.flops(64, 64) > 0


# Islands of float32.


class Overflows(nn.Module):
    """Squares that float16 cannot hold: the norm of a channel that is as large as 3,000."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1e-4))

    def forward(self, x, *, by):
        seen.append((x.dtype, by.dtype, self.gain.dtype))
        return {"x": (x * 3000 / by).square() * self.gain}


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, 16)
        self.neck = Overflows()
        self.register_buffer("ones", torch.ones(1))

    def forward(self, x):
        x = self.embed(x)
        x = self.neck(x, by=self.ones)["x"]
        assert x.dtype == self.embed.weight.dtype
        return None, x.permute(0, 2, 3, 1)


seen: list[tuple[torch.dtype, ...]] = []


def with_neck() -> Teacher:
    torch.manual_seed(0)
    return Teacher(TeacherSpec("sam", None, 16, 16, GREY, GREY, None, 8), Tower())


def test_an_island_computes_in_float32(pictures):
    right = with_neck()(pictures).spatial
    assert right.abs().amax() < 65504  # the result is no problem for float16, its squares are
    half, island = with_neck(), with_neck()
    set_precision(half, torch.float16)
    set_precision(island, torch.float16, ["ne*"])
    assert not half(pictures).spatial.isfinite().all()
    seen.clear()
    found = island(pictures).spatial
    assert seen == [(torch.float32, torch.float32, torch.float32)]
    assert island.tower.embed.weight.dtype == island.dtype == torch.float16
    # Rounding to float16 before and after, doubled by the square.
    assert off_by(Features(None, found), Features(None, right)) < 4e-3


def test_features_that_are_not_finite_are_refused(pictures):
    settings = TeacherSettings(model="sam", dtype="float16")
    with pytest.raises(UserError, match=r"teachers\.sam\.dtype is 'float16'.*keep_float32"):
        speed_up("sam", with_neck(), settings, pictures)
    settings = TeacherSettings(model="sam", dtype="float16", keep_float32=("neck",))
    assert speed_up("sam", with_neck(), settings, pictures)["float16"] < 4e-3


def test_patterns_choose_modules(places):
    teacher = load(places["timm"], dtype="bfloat16", keep_float32=("*.norm?", "*blocks.1.mlp"))
    kinds = {n: p.dtype for n, p in teacher.tower.named_parameters()}
    whole = {n for n, kind in kinds.items() if kind == torch.float32}
    assert whole == {n for n in kinds if ".norm1." in n or ".norm2." in n or "blocks.1.mlp" in n}
    assert teacher.dtype == torch.bfloat16
    assert teacher(torch.rand(1, 3, 64, 64)).spatial.isfinite().all()


# What is impossible.


def test_what_makes_no_sense_is_refused_by_name(places, pictures, tiny, monkeypatch):
    teacher = with_neck()
    with pytest.raises(TeacherSettingError, match=r"'nek', .*did you mean 'neck'"):
        set_precision(teacher, torch.bfloat16, ["nek"])
    with pytest.raises(UserError, match=r"teachers\.vit\.keep_float32: .*'nothing'"):
        load(places["timm"], dtype="bfloat16", keep_float32=("nothing",))
    lite0 = {"model": "efficientnet-lite0"}
    with pytest.raises(UserError, match=r"teachers\.vit\.patch is true, but efficientnet-lite0"):
        load(lite0, patch=True)
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match=r"teachers\.vit\.quantise is 'int8', .*no linear layers"):
        load(lite0, quantise="int8")

    def refuse(*arguments, **named):
        raise RuntimeError("no compiler\nat all")

    teacher = with_neck()
    monkeypatch.setattr(
        teacher.tower, "compile", lambda: setattr(teacher.tower, "_compiled_call_impl", refuse)
    )
    with pytest.raises(UserError, match=r"teachers\.sam\.compile is True, .*no compiler\); leave"):
        speed_up("sam", teacher, TeacherSettings(model="sam", compile=True), pictures)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantise": "int4"}, ("quantise", "int8", "int4")),
        ({"keep_float32": ["norm"]}, ("keep_float32", "float32")),
        ({"compiled": True}, ("compiled", "compile")),
    ],
)
def test_bad_settings_are_named(tiny, change, words):
    settings = tiny.settings({"teachers": {"hog": change}})
    with pytest.raises(UserError) as caught:
        tiny.config(settings)
    for word in words:
        assert word in str(caught.value)


def test_without_torchao_its_extra_is_named(places, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"teachers\.vit\.quantise needs .*fastagglo\[quantise\]"):
        load(places["timm"], quantise="int8")


# In a run.


def run_settings(tiny, places, *changes):
    vit = {**places["timm"], "sizes": [64]}
    return tiny.settings({"teachers": {"vit": vit, "hog": None}}, *changes)


def test_a_run_says_the_error_before_it_trains(tiny, places):
    pytest.importorskip("torchao")
    fast = {"teachers": {"vit": {"patch": True, "quantise": "int8"}}}
    trainer, folder = tiny.trained(run_settings(tiny, places, fast))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = [row["kind"] for row in rows]
    assert kinds.index("teacher_error") < kinds.index("train")
    row = rows[kinds.index("teacher_error")]
    assert (row["teacher"], row["step"]) == ("vit", 0)
    assert row["patch"] < 1e-4 < row["int8"] < 0.1
    assert {"patch", "int8"} == set(trainer.teachers["vit"].feature_errors)


def test_the_sample_is_training_photos_in_the_teachers_size(tiny, places):
    config = tiny.config(run_settings(tiny, places))
    trainer = tiny.trainer(run_settings(tiny, places))
    sample = sample_of(config, lambda: trainer.data.train)
    spec = trainer.teachers["vit"].spec
    found = sample(spec, config.teachers["vit"])
    assert found.shape == (4, 3, 64, 64)
    assert found.dtype == torch.uint8
    assert torch.equal(found, sample(spec, config.teachers["vit"]))
    free = TeacherSpec("x", None, 14, 14, GREY, GREY, None, 8)
    settings = TeacherSettings(model="x", scale=1.75)
    assert sample(free, settings).shape == (4, 3, 56, 56)  # 32 pixels x 1.75


CHANGES = {
    "dtype": {"dtype": "bfloat16"},
    "islands": {"dtype": "bfloat16", "keep_float32": ["*.norm1"]},
    "other islands": {"dtype": "bfloat16", "keep_float32": ["*.norm2"]},
    "patch": {"patch": True},
    "int8": {"quantise": "int8"},
    "fp8": {"quantise": "fp8"},
    "compile": {"compile": True},
}


def test_stored_features_of_another_form_are_not_served(tiny, places, tmp_path):
    """Each form has a folder of its own, found again by its settings, loaded or not."""
    pytest.importorskip("torchao")
    cached = {"cache": {"folder": str(tmp_path / "c")}, "data": {"crops_per_photo": 2}}
    folders = {}
    for what, change in {"plain": {}, **CHANGES}.items():
        settings = run_settings(tiny, places, cached, {"teachers": {"vit": change}})
        first = FeatureCache(tiny.config(settings), CPU)
        again = FeatureCache(tiny.config(settings), CPU)
        assert isinstance(first.teachers["vit"], Teacher), what
        assert isinstance(again.teachers["vit"], LazyTeacher)
        assert first.stores["vit"].folder == again.stores["vit"].folder
        folders[what] = first.stores["vit"].folder
    assert len(set(folders.values())) == len(folders)


def test_the_cache_says_the_error_and_keeps_it(tiny, places, tmp_path):
    pytest.importorskip("torchao")
    cached = {"cache": {"folder": str(tmp_path / "c")}, "data": {"crops_per_photo": 1}}
    fast = {"teachers": {"vit": {"quantise": "int8"}}}
    settings = run_settings(tiny, places, cached, fast)
    recipe = tiny.recipe(settings)
    built = tiny.cli("cache", "--recipe", recipe)
    assert (built.status, built.err) == (0, "")
    assert "vit: features are off by int8 0." in built.out
    checked = tiny.cli("cache", "--recipe", recipe, "--verify", "--sample", "2")
    assert checked.status == 0, checked.err
    # A run that never loads the teacher says it all the same, before it trains.
    trainer, folder = tiny.trained(settings)
    assert isinstance(trainer.teachers["vit"], LazyTeacher)
    assert trainer.teachers["vit"].teacher is None
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["kind"] == "teacher_error")
    assert 1e-4 < row["int8"] < 0.1
