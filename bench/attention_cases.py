"""What attention is measured on: the students' head shapes and the layouts of their batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastagglo.model.config import PRESETS

# CLS and register tokens of each image: four teachers and four registers in RADIOv2.5
# (arXiv 2412.07679), three and seven in C-RADIOv4 (arXiv 2601.17237).
PREFIX_V25, PREFIX_V4 = 8, 10

# One draw of C-RADIOv4's two groups, eight low images to a high one as in its batch of 1024 + 128.
LOW_V4 = dict.fromkeys((128, 192, 224, 256, 384, 432), 16)
HIGH_V4 = dict.fromkeys((512, 768, 1024, 1152), 3)

STUDENTS = ("B", "L", "SO400M", "H", "g")


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
SMALL_MIX = Mix("small-mix", ((4, 1, 64), (4, 1, 196), (1, 1, 576)))
TINY_MIX = Mix("tiny-mix", ((2, 1, 16), (1, 1, 49)))


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        student: a preset of ``fastagglo.model``, whose heads are taken.
        mix: the batch.
        backward: forward and backward, or forward alone.
        bias: with a ``key_bias`` per token, which is data and gets no gradient.
    """

    student: str
    mix: Mix
    backward: bool
    bias: bool = False

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
    def name(self) -> str:
        return f"{self.student}-{self.mix.name}{'-bias' if self.bias else ''}-{self.direction}"

    @property
    def flops(self) -> float:
        """Of the two products of the forward over each segment's own square, and of the five of
        the backward."""
        squares = sum(rows * rows for rows in self.mix.lengths)
        return 4 * self.heads * self.head_dim * squares * (3.5 if self.backward else 1)


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
    """What each peer is timed on by itself, on ``"cuda"`` or ``"cpu"``."""
    plain: list[tuple[str, Mix]] = []
    biased: list[tuple[str, Mix]] = []
    if quick:
        student = "tiny" if device == "cpu" else "H"
        mix = TINY_MIX if device == "cpu" else SMALL_MIX
        plain = [(student, mix), (student, windows_of(student, {8: 1}, 4))]
        biased = [(student, mix)]
    elif device == "cpu":
        plain = [(student, uniform(student, 224, 512)) for student in STUDENTS]
        plain += [("B", SMALL_MIX), ("B", windows_of("B", {32: 1}, 8))]
        biased = [("B", SMALL_MIX)]
    else:
        for student in STUDENTS:
            mixes = [uniform(student, pixels, 32_768) for pixels in (224, 432, 768, 1152)]
            mixes += [*recipe_mixes(student), windows_of(student, {64: 8}, 16)]
            if student in ("SO400M", "H"):
                mixes.append(windows_of(student, {48: 8, 72: 4}, 24))
            plain += [(student, mix) for mix in mixes]
            biased.append((student, recipe_mixes(student)[0]))
        plain.append(("B", MIX))
    return [
        Case(student, mix, backward, bias)
        for bias, chosen in ((False, plain), (True, biased))
        for student, mix in chosen
        for backward in (False, True)
    ]


def peers_of(case: Case) -> list[str]:
    """Who takes part, by name in ``attention_peers.PEERS``."""
    names = ["fastagglo", "per-resolution", "per-image"]
    if case.mix.mixed:
        names += ["padded", "padded-batch"]
    names.append("flex")
    return names if case.bias else [*names, "varlen", "xformers"]


@dataclass(frozen=True)
class Duel:
    """A case whose rounds alternate between us and some peers."""

    case: Case
    peers: tuple[str, ...]
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.case.name}-vs-{self.peers[0]}"


def duels(device: str, quick: bool) -> list[Duel]:
    """The headline ratios. The padded peers take most of the time on a CPU: fewer rounds."""
    loops, padded = ("per-image", "per-resolution"), ("padded", "padded-batch", "flex")
    found = []
    for backward in (False, True):
        if quick:
            student, mix = ("tiny", TINY_MIX) if device == "cpu" else ("H", SMALL_MIX)
            found.append(Duel(Case(student, mix, backward), (*loops, *padded[:2]), 5))
        elif device == "cpu":
            case = Case("B", MIX, backward)
            found += [Duel(case, loops, 25), Duel(case, padded, 5)]
        else:
            chosen = [("B", MIX), *((s, mix) for s in STUDENTS for mix in recipe_mixes(s))]
            for student, mix in chosen:
                everyone = (*loops, *padded, "varlen", "xformers")
                found.append(Duel(Case(student, mix, backward), everyone, 30))
    return found
