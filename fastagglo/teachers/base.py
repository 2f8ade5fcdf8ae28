"""What a frozen teacher is: one interface over every library that teachers come from."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode

from fastagglo.errors import UserError
from fastagglo.features import Features

# Float images may overshoot [0, 1] by this much: rounding of half precision and of resizes.
RANGE_SLACK = 1e-3

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


class TeacherSettingError(UserError, ValueError):
    """A setting of a teacher has a value that this teacher cannot have.

    It is a ``ValueError`` for a caller in Python and a ``UserError`` for a run configured by a
    file, where ``train.py`` prints it in one line.
    """


@dataclass(frozen=True)
class TeacherSpec:
    """What a teacher takes and gives.

    Attributes:
        name: the teacher's name in the configuration, the key of its adaptor heads.
        input_size: the only (square) input size in pixels, or None: any multiple of ``multiple``.
        multiple: height and width must be multiples of it, in pixels.
        patch_size: input pixels per cell of the spatial map.
        mean: per-channel mean that the teacher subtracts from RGB in [0, 1].
        std: per-channel divisor after that.
        summary: channels of the summary vector, or None where the teacher has none.
        spatial: channels of the spatial map, or None where the teacher has none.
    """

    name: str
    input_size: int | None
    multiple: int
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    summary: int | None
    spatial: int | None

    @property
    def accepts(self) -> str:
        """The accepted input sizes in words, for messages."""
        if self.input_size is not None:
            return f"{self.input_size} x {self.input_size} pixels"
        return f"height and width in multiples of {self.multiple} pixels"

    def grid(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """Shape ``(h, w)`` of the spatial map of an image of ``size`` pixels.

        Args:
            size: the side of a square image, or ``(height, width)``.

        Raises:
            ValueError: the teacher does not accept this size; the message says which it does.
        """
        height, width = (size, size) if isinstance(size, int) else size
        fits = (
            height == width == self.input_size
            if self.input_size is not None
            else height > 0
            and width > 0
            and height % self.multiple == 0
            and width % self.multiple == 0
        )
        if not fits:
            raise ValueError(
                f"teacher {self.name!r} accepts {self.accepts}; got {height} x {width}"
            )
        return height // self.patch_size, width // self.patch_size


class Teacher(nn.Module):
    """A frozen model that gives the targets of distillation.

    It always runs in evaluation mode, without gradients, in its own dtype whatever autocast is
    active around it; normalisation happens inside.

    Args:
        spec: what it takes and gives.
        tower: maps normalised images ``(N, 3, H, W)`` of ``dtype`` to ``(summary, spatial)``:
            ``(N, C)`` or None and ``(N, h, w, C)`` or None.
        dtype: the dtype of the tower's weights and of its input.

    Attributes:
        seen: images so far, by height and width: what was really computed.
        feature_errors: by step that made it faster, how far its features are then off, where that
            was measured.
    """

    def __init__(
        self, spec: TeacherSpec, tower: nn.Module, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.tower = tower.to(dtype).requires_grad_(False)
        # Not in the state dict: the specification holds them, and weights alone are saved.
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.seen: Counter[tuple[int, int]] = Counter()
        self.feature_errors: dict[str, float] = {}
        self._flops: dict[tuple[int, int], int | None] = {}
        self._counted: list[nn.Module] = []  # in a list: no part of this module
        self.eval()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode, so that ``model.train()`` around it cannot thaw it."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: a loss must be able to save the targets for backward
    def forward(self, images: Tensor) -> Features:
        """Features of a batch.

        Args:
            images: ``(N, 3, H, W)`` RGB on the teacher's device, either floating in [0, 1] or
                uint8 in 0 .. 255; any strides; ``N`` may be 0.

        Returns:
            Features in float32: summary ``(N, spec.summary)`` and spatial
            ``(N, h, w, spec.spatial)`` with ``(h, w) = spec.grid((H, W))``, each None where the
            specification says None.

        Raises:
            TypeError: not a tensor, or neither floating nor uint8.
            ValueError: wrong shape, size or device (the message says which sizes are accepted); on
                the CPU also floats outside [0, 1].
        """
        spec = self.spec
        grid = self._check(images)
        count = images.shape[0]
        if not torch.compiler.is_compiling():
            self.seen[images.shape[2], images.shape[3]] += count
        if count == 0:
            return Features(
                None if spec.summary is None else self.mean.new_zeros(0, spec.summary),
                None if spec.spatial is None else self.mean.new_zeros(0, *grid, spec.spatial),
            )
        if images.dtype == torch.float32:
            x = images - self.mean
        else:  # a copy of our own: worked on in place, it costs a third of the time
            x = images.to(torch.float32, memory_format=torch.contiguous_format)
            x = (x.div_(255) if images.dtype == torch.uint8 else x).sub_(self.mean)
        x = x.div_(self.std)
        with torch.autocast(x.device.type, enabled=False):
            summary, spatial = self.tower(x.to(self.dtype))
        return Features(
            None if spec.summary is None else summary.float(),
            None if spec.spatial is None else spatial.float().contiguous(),
        )

    def flops(self, height: int, width: int) -> int | None:
        """Forward FLOPs of one image: products, convolutions and attention by rows squared.

        A multiply and an add are 2 FLOPs. Counted without data, once for each size.

        Returns:
            None for a tower that does not run on PyTorch's meta device.
        """
        size = (height, width)
        if size not in self._flops:
            try:
                hollow = self._counted[0] if self._counted else _hollow(self.tower)
                self._flops[size] = _count_flops(hollow, height, width)
            except Exception:  # whatever a tower raises about tensors that have no data
                self._flops[size] = None
        return self._flops[size]

    def count_as_is(self) -> None:
        """From now on `flops` counts the tower as it is at this moment.

        For a tower that is about to be changed in a way that hides its products: by fused
        operators, quantised weights, a compiler.
        """
        self._counted[:] = [_hollow(self.tower)]

    def _check(self, images: Tensor) -> tuple[int, int]:
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a tensor (N, 3, H, W), got {type(images).__name__}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(
                f"images: expected floating in [0, 1] or uint8, got {images.dtype}; convert first"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images: expected (N, 3, H, W) in RGB, got shape {tuple(images.shape)}"
            )
        if images.device != self.device:
            raise ValueError(
                f"images: on {images.device}, but teacher {self.name!r} is on {self.device}; "
                f"move one of them"
            )
        grid = self.spec.grid((images.shape[2], images.shape[3]))
        # On a GPU a look would wait for the device.
        checked = images.is_floating_point() and images.device.type == "cpu" and images.numel()
        if checked and not torch.compiler.is_compiling():
            low, high = (value.item() for value in torch.aminmax(images))
            # Written so that a NaN fails too.
            if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
                raise ValueError(
                    f"images: must lie in [0, 1], got values from {low:.4g} to {high:.4g}; pass "
                    f"images that are not normalised (x / 255, or uint8), teacher {self.name!r} "
                    "normalises them"
                )
        return grid

    def extra_repr(self) -> str:
        return f"{self.spec}, dtype={self.dtype}"


def _hollow(tower: nn.Module) -> nn.Module:
    """A copy whose weights have shapes only: what deepcopy finds in its memo it does not copy."""
    memo: dict[int, object] = {}
    for value in (*tower.parameters(), *tower.buffers()):
        shape = torch.empty_like(value, device="meta")
        memo[id(value)] = (
            nn.Parameter(shape, requires_grad=False) if isinstance(value, nn.Parameter) else shape
        )
    return copy.deepcopy(tower, memo)


@torch.no_grad()
def _count_flops(hollow: nn.Module, height: int, width: int) -> int:
    weight = next(hollow.parameters(), torch.empty(()))
    images = torch.empty(1, 3, height, width, dtype=weight.dtype, device="meta")
    with FlopCounterMode(display=False) as counter:
        hollow(images)
    return counter.get_total_flops()


def weights_hash(teacher: Teacher) -> str:
    """SHA-256 (hex) of a teacher's name-ordered weights: a key for what depends on them.

    Equal for the same weights in the same dtype, on any device. Costs one pass over the weights.
    """
    digest = hashlib.sha256()
    for key, value in sorted(teacher.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        for part in _plain(value.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(value: Tensor) -> list[Tensor]:
    """A tensor, or what a quantised weight is made of."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(value, name))]


def as_grid(tokens: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Patch tokens ``(N, h * w, C)`` of ``images (N, 3, H, W)`` as ``(N, h, w, C)``."""
    return tokens.unflatten(1, (images.shape[2] // patch_size, images.shape[3] // patch_size))


def fixed_size(
    name: str, asked: int | None, native: int | None, multiple: int, usual: int | None = None
) -> int | None:
    """The fixed input size of a teacher that the user may pin with ``input_size``.

    Args:
        name: of the teacher, for the message.
        asked: the user's ``input_size``, or None.
        native: the only size that the model takes, or None if it takes any multiple.
        multiple: in pixels.
        usual: a size that it takes besides, multiple or not: the one that it was trained at.

    Raises:
        TeacherSettingError: the model cannot take the size that was asked for.
    """
    if asked is None or asked == usual:
        return native if asked is None else asked
    if native is not None and asked != native:
        raise TeacherSettingError(
            f"teacher {name!r}: input_size={asked}, but it takes {native} only"
        )
    if native is None and (asked <= 0 or asked % multiple):
        raise TeacherSettingError(
            f"teacher {name!r}: input_size={asked} is not a positive multiple of {multiple}"
        )
    return asked
