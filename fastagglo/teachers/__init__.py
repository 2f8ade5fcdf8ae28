"""Frozen teachers behind one interface: built in, timm, open_clip, transformers."""

from fastagglo.teachers.base import Teacher, TeacherSettingError, TeacherSpec, weights_hash
from fastagglo.teachers.hog import hog
from fastagglo.teachers.load import load_teacher, teacher_files

__all__ = [
    "Teacher",
    "TeacherSettingError",
    "TeacherSpec",
    "hog",
    "load_teacher",
    "teacher_files",
    "weights_hash",
]
