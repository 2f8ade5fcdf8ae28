"""One door to every teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from fastagglo.teachers.base import DTYPES, Teacher, TeacherSettingError
from fastagglo.teachers.builtin import EFFICIENTNET_BLOCKS, efficientnet_file, load_builtin
from fastagglo.teachers.open_clip_models import load_open_clip
from fastagglo.teachers.timm_models import load_timm
from fastagglo.teachers.transformers_models import load_transformers

LIBRARIES = {"timm": load_timm, "open_clip": load_open_clip, "transformers": load_transformers}
SOURCES = ("builtin", *LIBRARIES)

_BUILT_FROM = (".safetensors", ".bin", ".pth", ".pt", ".json")


def load_teacher(
    source: str,
    model: str,
    *,
    name: str | None = None,
    checkpoint: str | Path | None = None,
    input_size: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    layer: str | None = None,
    device: torch.device | str = "cpu",
    summary: bool = True,
    allow_download: bool = True,
) -> Teacher:
    """Load a frozen teacher.

    ============  ======================================  =========================================
    source        model                                   summary, spatial
    ============  ======================================  =========================================
    builtin       efficientnet-lite0, -lite1, -lite2      pooled 1280; the map of ``layer``
    builtin       hog                                     none; 36 orientation channels
    timm          vision transformers, e.g.               class token after the norm, else the
                  ``vit_base_patch16_siglip_256.webli``   model's pooled output (SigLIP); last patch
                  or ``hf-hub:ORG/NAME``                  tokens. SAM: no summary, 256 channels
    open_clip     ``ViT-H-14-378-quickgelu``, ...         projected image embedding; last patch
                  or ``hf-hub:ORG/NAME``                  tokens
    transformers  hub name or folder of a CLIP, SigLIP,   projected or pooled embedding or class
                  SigLIP 2, DINOv2, DINOv3, ViT or SAM    token; last patch tokens. SAM: no summary
    ============  ======================================  =========================================

    Args:
        source: ``"builtin"``, ``"timm"``, ``"open_clip"`` or ``"transformers"``.
        model: the library's name of the model.
        name: the teacher's name in the run; default ``model``.
        checkpoint: weights on this machine: a folder as the library saves it, or a
            ``.safetensors`` or ``.pth`` file (read without running code). For open_clip also one of
            its weight names, e.g. ``"dfn5b"``. Default: the local cache, then the hub.
        input_size: pin the only accepted input size, in pixels. Default: the model's own, which is
            any multiple of the patch where it can resize its positions.
        dtype: of the weights and the computation: a torch dtype or ``"fp32"``, ``"bf16"``,
            ``"fp16"``. Features come back in float32. ``hog`` always computes in float32.
        layer: built-in teachers only: ``"stride8"``, ``"stride16"`` (default) or ``"stride32"``,
            the spatial map's pixels per cell.
        device: where the teacher lives.
        summary: False leaves the summary out (and, for built-in teachers, its cost).
        allow_download: ask the hub for weights that are not on this machine. ``HF_HUB_OFFLINE=1``
            forbids it too.

    Raises:
        TeacherSettingError: a value that this teacher cannot have (a ``ValueError`` and a
            ``UserError``).
        UserError: weights or a package are missing or unfit; the message says how to get them.
    """
    teacher_name = model if name is None else name
    if source not in SOURCES:
        raise TeacherSettingError(
            f"teacher {teacher_name!r}: source={source!r}; expected one of {', '.join(SOURCES)}"
        )
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise TeacherSettingError(
            f"teacher {teacher_name!r}: dtype={dtype!r}; expected fp32, bf16 or fp16"
        )
    if source == "builtin":
        teacher = load_builtin(
            model,
            name=teacher_name,
            checkpoint=checkpoint,
            input_size=input_size,
            dtype=chosen,
            layer=layer,
            summary=summary,
        )
    else:
        if layer is not None:
            raise TeacherSettingError(
                f"teacher {teacher_name!r}: layer={layer!r} is for built-in teachers; "
                f"{source} teachers give their last layer"
            )
        teacher = LIBRARIES[source](
            model,
            name=teacher_name,
            checkpoint=checkpoint,
            input_size=input_size,
            dtype=chosen,
            summary=summary,
            allow_download=allow_download,
        )
    return teacher.to(device)


def teacher_files(source: str, model: str, checkpoint: str | Path | None) -> list[Path] | None:
    """The files on this machine that a teacher is built from, sorted: weights and configurations.

    Returns:
        None where its library looks them up by a name: they are known once it is loaded.
    """
    if source == "builtin":
        if model not in EFFICIENTNET_BLOCKS:
            return []  # made of code alone
        return [efficientnet_file(model, model, checkpoint)]
    places = [Path(p).expanduser() for p in (checkpoint, model) if p is not None]
    if checkpoint is None and source != "transformers":
        return None
    if not places[0].exists():
        return None
    found: set[Path] = set()
    for place in places:
        if place.is_file():
            found |= {place, *place.parent.glob("*.json")}
        elif place.is_dir():
            found |= {p for p in place.iterdir() if p.is_file() and p.suffix in _BUILT_FROM}
    return sorted(found)
