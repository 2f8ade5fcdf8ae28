"""One adaptor head: the small MLP that turns a student's tokens into a teacher's features.

The parameter names are those of the published RADIO weights. Each residual step of a head is one
call of ``norm_gelu_linear``; the submodules hold parameters, and their own ``forward`` and hooks
are not used.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastagglo.ops.autocast import autocast_enabled
from fastagglo.ops.mlp import norm_gelu_linear, shared_linear, uses_triton
from fastagglo.ops.sharded import overwrite, whole


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` computed in at least fp32, whatever the input and autocast say.

    The result has the input's dtype, except under autocast, where it stays fp32 for the GELU or
    the GEMM that follows: what CUDA's autocast does by itself and the CPU's does not.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., C) -> (..., C)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        y = F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps)
        return y if autocast_enabled(x.device) else y.to(x.dtype)


def pixel_shuffle(tokens: Tensor, upsample: int) -> Tensor:
    """Unfold the channels of a grid of tokens into ``upsample`` x ``upsample`` cells each.

    Channel order: cell row, cell column, feature. Channel ``(i * upsample + j) * C + c`` of token
    ``(y, x)`` becomes feature ``c`` of cell ``(y * upsample + i, x * upsample + j)``.

    Args:
        tokens: (..., h, w, C * upsample**2).
        upsample: cells per token and side, at least 1.

    Returns:
        (..., h * upsample, w * upsample, C).

    Raises:
        ValueError: fewer than three dimensions, or channels that ``upsample**2`` does not divide.
    """
    if tokens.dim() < 3 or tokens.shape[-1] % upsample**2:
        raise ValueError(
            f"pixel_shuffle: tokens must be (..., h, w, C * {upsample}**2), got {shape_of(tokens)}"
        )
    *lead, h, w, channels = tokens.shape
    cells = tokens.reshape(*lead, h, w, upsample, upsample, channels // upsample**2)
    return cells.transpose(-4, -3).reshape(*lead, h * upsample, w * upsample, cells.shape[-1])


class Head(nn.Module):
    """What heads of both versions share: the output layer ``last`` and what is folded into it."""

    in_features: int
    out_features: int
    upsample: int
    fc1: nn.Linear
    last: nn.Linear

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        *,
        shuffle: bool = True,
        entered: bool = False,
    ) -> Tensor:
        """Features of the teacher.

        Args:
            x: (..., in_features); (N, h, w, in_features) when ``upsample`` > 1. In the dtype of
                the parameters, except under autocast.
            rotation: (C, C) with C = ``out_features``, or None. The output is then
                ``rotation.T @ y`` for each feature ``y``: with the rotation of a PHI-S target
                (arXiv 2410.01680) the head predicts normalised features inside and the teacher's
                own axes outside. It is folded into the last weight in fp32, so no per-token
                C x C product is paid.
            shuffle: False leaves out the pixel shuffle; see :meth:`tokens`.
            entered: x is (..., hidden), what :meth:`enter` gives, not the tokens.

        Returns:
            (..., out_features); (N, h * upsample, w * upsample, out_features) when upsampling.

        Raises:
            TypeError: ``x`` or ``rotation`` is not a floating-point tensor, or ``x`` has not the
                dtype of the parameters while autocast is off.
            ValueError: a wrong shape or device.
        """
        if not entered:
            check_input(type(self).__name__, x, self)
        shuffle = shuffle and self.upsample > 1
        if shuffle and x.dim() != 4:
            raise ValueError(
                f"{type(self).__name__}: x must be (N, h, w, {self.in_features}) because upsample "
                f"is {self.upsample}, got {shape_of(x)}; use head.tokens(x) for packed tokens"
            )
        weight, bias = self.last.weight, self.last.bias
        if rotation is not None:
            check_rotation("rotation", rotation, self.out_features, x.device)
            dtype = weight.dtype
            weight, bias = (v.to(dtype) for v in self._rotated(rotation.mT))
        x = x if entered else self.enter(x)
        return self._leave(x, weight, bias, self.upsample if shuffle else 1)

    def enter(self, x: Tensor) -> Tensor:
        """The first layer: (..., in_features) -> (..., hidden)."""
        return shared_linear(x, [self.fc1.weight], [self.fc1.bias])[0]

    def _leave(self, x: Tensor, weight: Tensor, bias: Tensor, upsample: int) -> Tensor:
        """All but the first layer, with these parameters of the last, and the pixel shuffle."""
        raise TypeError("Head is a base class: use AdaptorMLP or AdaptorMLPv1")

    def tokens(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Without the pixel shuffle, for packed tokens: (..., in) -> (..., out * upsample**2)."""
        # Through __call__, so that hooks (FSDP's among them) see it.
        return self(x, rotation, shuffle=False)

    def _rotated(self, matrix: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``matrix @ W, matrix @ b`` of the last layer, per replica, in ``dtype`` or wider."""
        weight, bias = whole(self.last.weight), whole(self.last.bias)
        wide = torch.promote_types(weight.dtype, dtype)
        device = weight.device
        weight = weight.to(wide).unflatten(0, (-1, self.out_features))
        bias = bias.to(wide).unflatten(0, (-1, self.out_features))
        plain = autocast_enabled(device)
        with torch.autocast(device.type, enabled=False) if plain else nullcontext():
            matrix = matrix.to(wide)
            return (matrix @ weight).flatten(0, 1), (bias @ matrix.mT).flatten()

    @torch.no_grad()
    def rotate_output_(self, rotation: Tensor) -> None:
        """``W <- R W, b <- R b`` in the last layer, in place, computed in fp64.

        A collective call where FSDP has sharded the layer.

        ``forward(x, rotation=R)`` afterwards equals ``forward(x)`` before, for an orthogonal R:
        a head that has learned in the teacher's own axes can start on PHI-S targets.

        Args:
            rotation: (out_features, out_features).
        """
        check_rotation("rotation", rotation, self.out_features, self.fc1.weight.device)
        weight, bias = self._rotated(rotation, torch.float64)
        overwrite(self.last.weight, weight)
        overwrite(self.last.bias, bias)

    @torch.no_grad()
    def fold_affine_(
        self, mean: Tensor, scale: Tensor | float, rotation: Tensor | None = None
    ) -> None:
        """``W <- scale * R^T W, b <- scale * R^T b + mean`` in place, computed in fp64.

        A head that predicts the normalised target ``R (y - mean) / scale`` then predicts ``y``,
        the teacher's own features: what an exported model should give. A collective call where
        FSDP has sharded the layer.

        Args:
            mean: (out_features,).
            scale: a number, a 0-d tensor or (out_features,).
            rotation: (out_features, out_features), or None for no rotation.
        """
        device, size = self.fc1.weight.device, self.out_features
        mean, scale = (torch.as_tensor(v).to(device, torch.float64) for v in (mean, scale))
        if mean.shape != (size,):
            raise ValueError(f"fold_affine_: mean must be ({size},), got {shape_of(mean)}")
        if scale.shape not in ((), (size,)):
            raise ValueError(f"fold_affine_: scale must be () or ({size},), got {shape_of(scale)}")
        if rotation is None:
            rotation = torch.eye(size, dtype=torch.float64, device=device)
        check_rotation("rotation", rotation, size, device)
        weight, bias = self._rotated(rotation.mT, torch.float64)
        rows = scale.expand(size).repeat(self.upsample**2)
        overwrite(self.last.weight, weight * rows[:, None])
        overwrite(self.last.bias, bias * rows + mean.repeat(self.upsample**2))

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, upsample={self.upsample}"

    def _start(self) -> None:
        """The initial weights of :class:`AdaptorMLP`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # The cells of a patch start out equal, as from nearest-neighbour upsampling: independent
        # draws would print a checkerboard that takes long to unlearn (ICNR, arXiv 1707.02937).
        with torch.no_grad():
            last = self.last.weight
            last.copy_(last[: self.out_features].repeat(self.upsample**2, 1))


class AdaptorMLP(Head):
    """One adaptor head: ``[LN, GELU] -> fc1 -> n x {x + Linear(GELU(LN(x)))} -> LN, GELU, Linear``.

    Linear weights start as a truncated normal of standard deviation 0.02, biases as zero.

    Args:
        in_features: channels of the student's tokens.
        hidden: width of the head.
        out_features: channels of the teacher's features.
        blocks: residual blocks between ``fc1`` and ``final``.
        upsample: output cells per token and side; see :func:`pixel_shuffle` for the channel order.
        pre_norm: put LayerNorm and GELU before ``fc1``.
        recompute: keep for the backward what goes into each LayerNorm, and make the GELU's output
            again from it; False keeps that output too. An attribute, to be set at will.

    Raises:
        TypeError: a size that is not an int, or a switch that is not a bool.
        ValueError: a size that is too small.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        blocks: int = 0,
        upsample: int = 1,
        pre_norm: bool = False,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes("AdaptorMLP", in_features, hidden, out_features, blocks, upsample)
        check_bool("AdaptorMLP", "pre_norm", pre_norm)
        check_bool("AdaptorMLP", "recompute", recompute)
        self.recompute = recompute
        self.in_features = in_features
        self.out_features = out_features
        self.upsample = upsample
        self.pre_norm = nn.Sequential(LayerNorm(in_features), nn.GELU()) if pre_norm else None
        self.fc1 = nn.Linear(in_features, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(blocks)
        )
        self.final = nn.Sequential(
            LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out_features * upsample**2)
        )
        self._start()

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        return self.final[2]

    def enter(self, x: Tensor) -> Tensor:
        """LayerNorm and GELU if ``pre_norm``, and the first layer: (..., in) -> (..., hidden)."""
        if self.pre_norm is None:
            return super().enter(x)
        return self._step(self.pre_norm[0], x, self.fc1.weight, self.fc1.bias)

    def _leave(self, x: Tensor, weight: Tensor, bias: Tensor, upsample: int) -> Tensor:
        for norm, _, linear in self.blocks:
            x = self._step(norm, x, linear.weight, linear.bias, x)
        return self._step(self.final[0], x, weight, bias, upsample=upsample)

    def _step(
        self,
        norm: LayerNorm,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None = None,
        upsample: int = 1,
    ) -> Tensor:
        return norm_gelu_linear(
            *(x, norm.weight, norm.bias, weight, bias, residual),
            eps=norm.eps,
            recompute=self.recompute,
            upsample=upsample,
        )


class AdaptorMLPv1(Head):
    """The head of the first RADIO weights: ``fc1 -> LN, ReLU -> n x {Linear, LN, ReLU} -> fc2``.

    It has no residual steps and no GELU, so nothing is fused. For old weights; train
    :class:`AdaptorMLP`.

    Args:
        in_features, hidden, out_features, upsample: as of :class:`AdaptorMLP`.
        blocks: layers between the first and the last.

    Raises:
        TypeError, ValueError: as :class:`AdaptorMLP`.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        blocks: int = 0,
        upsample: int = 1,
    ) -> None:
        super().__init__()
        _check_sizes("AdaptorMLPv1", in_features, hidden, out_features, blocks, upsample)
        self.in_features = in_features
        self.out_features = out_features
        self.upsample = upsample
        self.fc1 = nn.Linear(in_features, hidden)
        self.norm = LayerNorm(hidden)
        inner: list[nn.Module] = []
        for _ in range(blocks):
            inner += [nn.Linear(hidden, hidden), LayerNorm(hidden), nn.ReLU()]
        self.inner = nn.Sequential(*inner)
        self.fc2 = nn.Linear(hidden, out_features * upsample**2)
        self._start()

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        return self.fc2

    def _leave(self, x: Tensor, weight: Tensor, bias: Tensor, upsample: int) -> Tensor:
        y = F.linear(self.inner(F.relu(self.norm(x))), weight, bias)
        return pixel_shuffle(y, upsample) if upsample > 1 else y


def adaptor_mlp(x: Tensor, head: AdaptorMLP, *, rotation: Tensor | None = None) -> Tensor:
    """Apply one adaptor head; the same as ``head(x, rotation)``.

    Args:
        x: (..., in_features), or (N, h, w, in_features) for a head that upsamples.
        head: the head's parameters.
        rotation: (C, C) or None; see :meth:`AdaptorMLP.forward`.

    Returns:
        (..., out_features), or (N, h * upsample, w * upsample, out_features).

    Raises:
        TypeError: ``head`` is not an :class:`AdaptorMLP`, or ``x`` not a tensor of its dtype.
        ValueError: a wrong shape or device, or a backend that this op does not have.
    """
    if not isinstance(head, AdaptorMLP):
        raise TypeError(f"adaptor_mlp: head must be an AdaptorMLP, got {type(head).__name__}")
    check_input("adaptor_mlp", x, head)
    uses_triton("adaptor_mlp", x, norm=True)  # raises if a backend was asked for that it lacks
    return head(x, rotation)


def shape_of(x: Tensor) -> str:
    """A shape as errors print it."""
    return str(tuple(x.shape))


def check_int(owner: str, name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def check_bool(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a bool, got {value!r}")


def _check_sizes(
    owner: str, in_features: int, hidden: int, out_features: int, blocks: int, upsample: int
) -> None:
    for name, value, least in (
        ("in_features", in_features, 1),
        ("hidden", hidden, 1),
        ("out_features", out_features, 1),
        ("blocks", blocks, 0),
        ("upsample", upsample, 1),
    ):
        check_int(owner, name, value, least)


def check_input(owner: str, x: Tensor, head: Head) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{owner}: x must be a floating-point tensor, got {kind}")
    if x.dim() == 0 or x.shape[-1] != head.in_features:
        raise ValueError(f"{owner}: x must be (..., {head.in_features}), got {shape_of(x)}")
    if x.device != head.fc1.weight.device:
        raise ValueError(f"{owner}: x is on {x.device}, the head on {head.fc1.weight.device}")
    dtype = head.fc1.weight.dtype
    if x.dtype != dtype and not autocast_enabled(x.device):
        raise TypeError(
            f"{owner}: x must have the head's dtype, {dtype}, got {x.dtype}; cast one of them, or "
            "use torch.autocast"
        )


def check_rotation(name: str, rotation: Tensor, size: int, device: torch.device) -> None:
    if not isinstance(rotation, Tensor) or not rotation.is_floating_point():
        kind = rotation.dtype if isinstance(rotation, Tensor) else type(rotation).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if rotation.shape != (size, size):
        raise ValueError(f"{name} must be ({size}, {size}), got {shape_of(rotation)}")
    if rotation.device != device:
        raise ValueError(f"{name} is on {rotation.device}, the head on {device}")
