"""What attention is measured on: the students' head shapes and the layouts of their batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastagglo.model.config import PRESETS

# CLS and register tokens of each image: four teachers and four registers in RADIOv2.5
# (arXiv 2412.07679), three and seven in C-RADIOv4 (arXiv 2601.17237).
PREFIX_V25, PREFIX_V4 = 8, 10

# One draw of C-RADIOv4's two groups, eight low images to a high one as in its batch of 1024 + 128.
LOW_V4 = dict.fromkeys((128, 192, 224, 256, 384, 432), 16)
HIGH_V4 = dict.fromkeys((512, 768, 1024, 1152), 3)

STUDENTS = ("B", "L", "SO400M", "H", "g")

# Peers, by name in ``attention_peers.PEERS``. Those of CUDA take part in one case of a CPU's, too,
# where the results show that they cannot.
LOOPS = ("per-resolution", "per-image")
PADDED = ("padded", "padded-batch")
BACKENDS = ("flash", "efficient", "cudnn")
VARLEN = ("varlen", "xformers", "flag-gems")
ALL = (*LOOPS, *PADDED, "flex", *BACKENDS, *VARLEN)

LONGEST = 40  # letters of a batch in a label


@dataclass(frozen=True)
class Mix:
    """A batch's segments.

    Attributes:
        name: for test ids and plots.
        images: (images, segments of each image, rows of each segment). An image is one segment in
            a global layer, and one segment per window in a windowed one.
    """

    name: str
    images: tuple[tuple[int, int, int], ...]

    @property
    def lengths(self) -> list[int]:
        """Rows of each segment."""
        return [rows for images, each, rows in self.images for _ in range(images * each)]

    @property
    def dense(self) -> list[tuple[int, int]]:
        """(segments, rows) of each stretch of equal segments: one dense batch each."""
        return [(images * each, rows) for images, each, rows in self.images]

    @property
    def by_image(self) -> list[tuple[int, int]]:
        """(segments, rows) of each image."""
        return [(each, rows) for images, each, rows in self.images for _ in range(images)]

    @property
    def batch(self) -> str:
        """The segments in short: ``8x64 8x196`` are eight of 64 rows and eight of 196."""
        return " ".join(f"{segments}x{rows}" for segments, rows in self.dense)

    @property
    def mixed(self) -> bool:
        """Whether there is anything to pad."""
        return len({rows for _, _, rows in self.images}) > 1


# The mix that the targets on a CPU are stated for, and lighter ones of its kind.
MIX = Mix("mix", ((8, 1, 64), (8, 1, 196), (4, 1, 576), (2, 1, 1024)))
SMALL_MIX = Mix("small-mix", ((2, 1, 64), (2, 1, 196), (1, 1, 576)))
TINY_MIX = Mix("tiny-mix", ((2, 1, 16), (1, 1, 49)))


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        student: a preset of ``fastagglo.model``, whose heads are taken.
        mix: the batch.
        backward: forward and backward, or forward alone.
        bias: with a ``key_bias`` per token, which is data and gets no gradient.
        size: bytes of an element.
        peers: who takes part beside us.
    """

    student: str
    mix: Mix
    backward: bool
    bias: bool = False
    size: int = 4
    peers: tuple[str, ...] = LOOPS

    @property
    def heads(self) -> int:
        return PRESETS[self.student].num_heads

    @property
    def head_dim(self) -> int:
        return PRESETS[self.student].width // self.heads

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    @property
    def id(self) -> str:
        return f"{self.student}-{self.mix.name}{'-bias' if self.bias else ''}-{self.direction}"

    @property
    def flops(self) -> float:
        """Of the two products of the forward over each segment's own square, and of the five of
        the backward."""
        squares = sum(rows * rows for rows in self.mix.lengths)
        return 4 * self.heads * self.head_dim * squares * (3.5 if self.backward else 1)

    @property
    def bytes(self) -> int:
        """Of queries, keys and values, read, and the output, written; with the backward of its
        gradient, read, and theirs, written."""
        matrices = 8 if self.backward else 4
        return matrices * sum(self.mix.lengths) * self.heads * self.head_dim * self.size

    @property
    def label(self) -> str:
        """For plots."""
        batch = self.mix.batch.replace("x", "×")
        batch = f" ({batch})" if len(batch) <= LONGEST else ""
        bias = ", key_bias" if self.bias else ""
        return f"{self.student} {self.heads}×{self.head_dim}, {self.mix.name}{batch}{bias}"

    @property
    def facts(self) -> dict[str, Any]:
        """What the results say of a case."""
        return {
            "label": self.label,
            "student": self.student,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "mix": self.mix.name,
            "batch": self.mix.batch,
            "tokens": sum(self.mix.lengths),
            "pass": self.direction,
            "bias": self.bias,
            "flops": self.flops,
            "bytes": self.bytes,
        }


def images_of(
    student: str, counts: Mapping[int, int], prefix: int = PREFIX_V25, name: str | None = None
) -> Mix:
    """Images in global layers.

    Args:
        student: whose patch size counts; pixels are rounded to whole patches.
        counts: images of each size in pixels.
        prefix: CLS and register tokens of an image.
        name: default: the sizes.
    """
    patch = PRESETS[student].patch_size
    grids = {round(pixels / patch): images for pixels, images in counts.items()}
    name = name or "+".join(str(grid * patch) for grid in grids) + "px"
    return Mix(name, tuple((images, 1, grid**2 + prefix) for grid, images in grids.items()))


def windows_of(student: str, counts: Mapping[int, int], window: int) -> Mix:
    """Images in windowed layers, without their prefix tokens, which bypass these layers.

    Args:
        student: whose patch size counts.
        counts: images of each grid (patches per side).
        window: patches per side of a window, which divides each grid.
    """
    patch = PRESETS[student].patch_size
    if wrong := [grid for grid in counts if grid % window]:
        raise ValueError(f"window must divide each grid, got {window} and {wrong}")
    sizes = "+".join(str(grid * patch) for grid in counts)
    images = tuple((n, (grid // window) ** 2, window**2) for grid, n in counts.items())
    return Mix(f"{sizes}px-w{window}", images)


def uniform(student: str, pixels: int, tokens: int) -> Mix:
    """As many images of one size as ``tokens`` rows hold, at least one."""
    rows = images_of(student, {pixels: 1}).lengths[0]
    return images_of(student, {pixels: max(1, tokens // rows)})


def recipe_mixes(student: str) -> list[Mix]:
    """The batches of the recipes that train this student."""
    mixes = []
    if student != "SO400M":  # RADIOv2.5, third stage: eight images of 432 px to one of 1024 px
        mixes.append(images_of(student, {432: 32, 1024: 4}))
    if student in ("SO400M", "H"):
        mixes.append(images_of(student, LOW_V4 | HIGH_V4, PREFIX_V4, "v4-low+high"))
    return mixes


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on ``"cuda"`` or ``"cpu"``."""
    if device == "cpu":
        return _quick("tiny", TINY_MIX) if quick else _on_cpu()
    found = _quick("H", SMALL_MIX) if quick else _on_cuda()
    return [replace(case, size=2) for case in found]


def _quick(student: str, mix: Mix) -> list[Case]:
    windows = windows_of(student, {8: 1}, 4)
    return [
        Case(student, mix, False, peers=(*LOOPS, *PADDED, *BACKENDS, *VARLEN)),
        Case(student, mix, True, peers=(*LOOPS, *PADDED)),
        Case(student, mix, True, bias=True, peers=(*LOOPS, *PADDED)),
        Case(student, windows, True),
    ]


def _on_cpu() -> list[Case]:
    """FlexAttention has no backward there and compiles ten seconds for each case: once."""
    forward = tuple(name for name in ALL if name != "padded-batch")
    found = [Case("B", MIX, False, peers=forward), Case("B", MIX, True, peers=(*LOOPS, "padded"))]
    for student in ("SO400M", "H"):  # heads of 72 and 80 channels
        found.append(Case(student, SMALL_MIX, False, peers=(*LOOPS, *PADDED)))
        found.append(Case(student, SMALL_MIX, True, peers=(*LOOPS, "padded")))
    found.append(Case("B", SMALL_MIX, True, bias=True, peers=(*LOOPS, "padded")))
    return [*found, Case("B", windows_of("B", {32: 1}, 8), True)]


def _on_cuda() -> list[Case]:
    """Whole batches of recipes, of one size, of windows; every size for each head dim once.

    FlexAttention compiles for each case: it takes part where the mix of the CPU's goals and those
    of the odd head dims are.
    """
    found = [Case("B", MIX, backward, peers=ALL) for backward in (False, True)]
    for student in STUDENTS:
        mixes = recipe_mixes(student)
        flex = ("flex",) if student in ("SO400M", "H") else ()
        everyone = (*LOOPS, *PADDED, *BACKENDS, *VARLEN)
        found += [Case(student, mix, True, peers=(*everyone, *flex)) for mix in mixes]
        if student in ("L", "g"):  # heads of 64 channels, as B
            continue
        found += [Case(student, mix, False, peers=everyone) for mix in mixes]
        equal = [uniform(student, pixels, 32_768) for pixels in (224, 432, 768, 1152)]
        equal.append(windows_of(student, {64: 8}, 16))
        if student != "B":
            equal.append(windows_of(student, {48: 8, 72: 4}, 24))
        found += [Case(student, mix, True, peers=(*LOOPS, *BACKENDS, *VARLEN)) for mix in equal]
        biased = Case(student, mixes[0], True, bias=True)
        found.append(replace(biased, peers=(*LOOPS, *PADDED, "efficient", "cudnn")))
    return found
