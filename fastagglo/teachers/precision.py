"""The types that a teacher computes in: half precision with islands of float32."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastagglo.errors import suggestion
from fastagglo.teachers.base import Teacher, TeacherSettingError


def set_precision(teacher: Teacher, dtype: torch.dtype, keep_float32: Sequence[str] = ()) -> None:
    """Move a teacher to another type, in place, but for some modules that stay in float32.

    Such an island takes its input in float32 and hands its output on in ``dtype``: for a norm, a
    neck or a pooling head whose values half precision cannot hold. A tower without weights has
    nothing to move and stays as it is.

    Args:
        teacher: loaded in float32, so that the islands' weights are not rounded.
        dtype: of the weights and the computation elsewhere.
        keep_float32: names of modules of its tower, or patterns such as ``"*.norm2"``; of those
            within one another the outermost counts.

    Raises:
        TeacherSettingError: a pattern that no module matches.
    """
    names = [name for name, _ in teacher.tower.named_modules() if name]
    chosen = set()
    for pattern in keep_float32:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise TeacherSettingError(
                f"teacher {teacher.name!r}: keep_float32 has {pattern!r}, which matches no module "
                f"of its {type(teacher.tower).__name__}{suggestion(pattern, names[:40])}"
            )
        chosen.update(found)
    if next(teacher.tower.parameters(), None) is None:
        return
    islands = {n for n in chosen if not any(n.startswith(f"{other}.") for other in chosen)}
    modules = dict(teacher.tower.named_modules())
    inside = {id(part) for name in islands for part in modules[name].modules()}
    for module in modules.values():
        if id(module) not in inside:
            for value in (*module._parameters.values(), *module._buffers.values()):
                if value is not None and value.is_floating_point():
                    value.data = value.data.to(dtype)  # in place: weights may be shared
    for name in islands:
        modules[name].register_forward_pre_hook(_float32_in, with_kwargs=True)
        modules[name].register_forward_hook(_Out(dtype))
    teacher.dtype = dtype


def _float32_in(
    module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _cast(arguments, torch.float32), _cast(named, torch.float32)


class _Out:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, self.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(x, dtype) for x in value))
    if isinstance(value, list | tuple):
        return type(value)(_cast(x, dtype) for x in value)
    if isinstance(value, dict):  # transformers' outputs too: changed in place, their kind kept
        for key, part in list(value.items()):
            value[key] = _cast(part, dtype)
    return value
