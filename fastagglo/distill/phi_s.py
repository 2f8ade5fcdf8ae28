"""PHI-S: normalising a teacher's features so that all teachers weigh the same.

From "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation" (arXiv 2410.01680).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fastagglo.distill.buffers import PreciseBuffers
from fastagglo.distill.hadamard import mixing_rotation
from fastagglo.ops.loss import Affine

KINDS = ("phi-s", "global", "standardize")

# Rows are converted to float64 this many elements at a time: 32 MiB, whatever the batch.
_CHUNK_ELEMENTS = 1 << 22


class PhiS(PreciseBuffers):
    """Streaming statistics of features, and the invertible map that normalises them.

    "Distribution Balancing for Label-Free Multi-Teacher Distillation" (arXiv 2410.01680).

    With the mean ``mu`` and the covariance ``Sigma = U diag(lambda) U^T`` (divisor n - 1) of the
    rows seen, one of (``kind``):

    - ``"phi-s"``: ``y' = R (y - mu) / phi`` with ``phi = sqrt(tr Sigma / C)`` and the rotation
      ``R = H U^T``, ``H`` the normalised Hadamard matrix
      (:func:`~fastagglo.distill.hadamard.mixing_rotation` where there is none). Every channel of
      ``y'`` has variance one, and errors in ``y'`` are errors in ``y`` in one common unit: the map
      is a similarity. Inverse: ``y = phi R^T y' + mu``.
    - ``"global"``: the same without the rotation. MSE does not see the difference.
    - ``"standardize"``: ``y' = (y - mu) / sigma`` per channel. A constant channel gets sigma 1.

    The module is at once the ``normaliser`` of a :class:`~fastagglo.ops.LossTerm`: it has ``mean``,
    ``scale`` and ``rotation``, and unpacks into these three. Its state is made of buffers, so it
    rides in a checkpoint and loads into a fresh ``PhiS(channels)``, finished or not; the buffers
    stay float64 under ``.to(dtype)``.

    Typical use: ``update`` on the features of the first few thousand steps, ``all_reduce`` once,
    ``finish(src=0)``. ``affine`` serves the loss meanwhile.

    Args:
        channels: C, 1 to a few thousand; memory is three C x C matrices, 20 bytes an entry in all.
        kind: see above.

    Raises:
        TypeError: ``channels`` is not an int.
        ValueError: ``channels < 1`` or an unknown ``kind``.
    """

    count: Tensor
    running_mean: Tensor
    running_moment: Tensor
    final: Tensor
    final_rotation: Tensor

    def __init__(self, channels: int, kind: str = "phi-s") -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int):
            raise TypeError(f"channels: expected an int, got {type(channels).__name__}")
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        self.channels = channels
        self.kind = kind
        square = (channels, channels) if kind == "phi-s" else (0, 0)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running_mean", torch.zeros(channels, dtype=torch.float64))
        # Sum of (y - mean)(y - mean)^T over the rows seen.
        self.register_buffer("running_moment", torch.zeros(channels, channels, dtype=torch.float64))
        self.register_buffer("final", torch.zeros((), dtype=torch.bool))
        self.register_buffer("final_rotation", torch.zeros(square, dtype=torch.float64))
        self.register_buffer("_rotation32", None, persistent=False)
        # The state that is asked for every step, mirrored on the host where asking costs nothing.
        self._rows = 0
        self._finished = False

    @classmethod
    def fit(
        cls, features: Tensor | Iterable[Tensor], valid: Tensor | None = None, kind: str = "phi-s"
    ) -> PhiS:
        """A finished normaliser of these features.

        Args:
            features: ``(..., C)`` floating point, or an iterable of such tensors; the statistics
                live on the device of the (first) tensor.
            valid: as for :meth:`update`; only with a single tensor.
            kind: see :class:`PhiS`.

        Raises:
            TypeError, ValueError: as for :meth:`update` and :meth:`finish`.
        """
        if isinstance(features, Tensor):
            batches: list[Tensor] | Iterable[Tensor] = [features]
        elif valid is not None:
            raise ValueError("valid: expected None with an iterable of features; use update()")
        elif isinstance(features, Iterable):
            batches = features
        else:
            raise TypeError(
                "features: expected a tensor or an iterable of tensors, got "
                f"{type(features).__name__}"
            )
        phi_s: PhiS | None = None
        for batch in batches:
            if phi_s is None:
                _check_features(batch, "features")
                phi_s = cls(batch.shape[-1], kind).to(batch.device)
            phi_s.update(batch, valid)
        if phi_s is None:
            raise ValueError("features: expected at least one tensor, got an empty iterable")
        return phi_s.finish()

    @torch.no_grad()
    def update(self, batch: Tensor, valid: Tensor | None = None) -> None:
        """Adds rows to the statistics, in float64 (Chan's parallel form of Welford's update).

        The result does not depend, beyond float64 rounding, on how rows are split into calls. A
        mean far larger than the spread costs no accuracy. On a GPU the call waits for the device
        once.

        Args:
            batch: ``(..., C)``, any floating dtype, strides and device.
            valid: None, or a bool or float mask (above 0.5 = valid) with the shape
                ``batch.shape[:-1]`` or of its first dimensions, e.g. ``(N,)`` for a batch ``(N, h,
                w, C)``. Rows that are not valid may hold anything, NaN included.

        Raises:
            TypeError: ``batch`` is not a floating-point tensor, or ``valid`` not a mask.
            ValueError: shapes do not fit, or valid rows contain NaN or infinity (the message counts
                them; the statistics are then unchanged).
            RuntimeError: after :meth:`finish`; call :meth:`reset` first.
        """
        self._check_open("update")
        _check_features(batch, "batch", self.channels)
        rows = batch.detach().reshape(-1, self.channels)
        if valid is not None:
            rows = rows[_row_mask(valid, batch).to(rows.device)]
        if not len(rows):
            return
        step = max(1, _CHUNK_ELEMENTS // self.channels)
        bad = sum((~torch.isfinite(part).all(dim=1)).sum() for part in rows.split(step))
        if bad := int(bad):
            raise ValueError(
                f"batch: {bad} of {len(rows)} rows contain NaN or infinity; mask them with valid=, "
                "or look for what made them"
            )
        for part in rows.split(step):
            part = part.to(device=self.running_mean.device, dtype=torch.float64)
            # Relative to the first row, equal rows give an exact zero and a large mean cancels.
            origin = part[0]
            part = part - origin
            centre = part.mean(dim=0)
            part = part - centre
            self._combine(len(part), origin + centre, part.T @ part)

    @torch.no_grad()
    def merge(self, other: PhiS) -> None:
        """Adds all the rows that ``other`` has seen; ``other`` stays as it is.

        Raises:
            TypeError: ``other`` is not a PhiS. ValueError: it has other channels.
            RuntimeError: after :meth:`finish` of this one.
        """
        self._check_open("merge")
        if not isinstance(other, PhiS):
            raise TypeError(f"other: expected a PhiS, got {type(other).__name__}")
        if other.channels != self.channels:
            raise ValueError(f"other: expected {self.channels} channels, got {other.channels}")
        device = self.running_mean.device
        self._combine(other._rows, other.running_mean.to(device), other.running_moment.to(device))

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merges the statistics of all ranks, on each of them. A collective call.

        Call it once, right before :meth:`finish`: a second call would count every row again for
        each rank. Without an initialised process group it does nothing.

        Raises:
            RuntimeError: after :meth:`finish`.
        """
        self._check_open("all_reduce")
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return
        mine = torch.cat([self.count.double().reshape(1), self.running_mean])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, mine, group=group)
        counts = [int(r[0]) for r in ranks]
        total = sum(counts)
        if not total:
            return
        # Relative to one rank's mean, for the reason given in update().
        origin = next(r[1:] for r, n in zip(ranks, counts, strict=True) if n)
        mean = origin.clone()
        for rank, n in zip(ranks, counts, strict=True):
            if n:
                mean += (rank[1:] - origin) * (n / total)
        delta = self.running_mean - mean
        moment = self.running_moment + torch.outer(delta, delta) * self._rows
        dist.all_reduce(moment, group=group)
        self.running_moment.copy_(moment)
        self.running_mean.copy_(mean)
        self.count.fill_(total)
        self._refresh()

    @torch.no_grad()
    def broadcast(self, src: int = 0, group: dist.ProcessGroup | None = None) -> None:
        """Copies the whole state of global rank ``src`` to all ranks. A collective call.

        Eigenvectors may differ in the last bit between machines; this makes all ranks agree.
        Without an initialised process group it does nothing.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        flag = self.final.to(torch.uint8)
        for tensor in (self.count, self.running_mean, self.running_moment, flag):
            dist.broadcast(tensor, src, group=group)
        if self.final_rotation.numel():
            dist.broadcast(self.final_rotation, src, group=group)
        self.final.copy_(flag.bool())
        self._refresh()

    @torch.no_grad()
    def finish(self, src: int | None = None, group: dist.ProcessGroup | None = None) -> PhiS:
        """Freezes the statistics and, for PHI-S, computes the rotation; returns itself.

        The eigenvectors (float64, on the CPU) are ordered by falling eigenvalue, and each has the
        sign that makes its largest entry positive (the first of those within 1e-6 of the largest
        magnitude). Negative eigenvalues, which are rounding, count as zero; fewer rows than
        channels are fine. Seconds for a thousand channels, about a minute for 4096. Again: does
        nothing.

        Args:
            src: None, or the global rank that decomposes for all: a collective call, right after
                :meth:`all_reduce`, that leaves every rank with the state of that one. (The others
                would spend the same minute on eigenvectors that may differ in the last bit.)
                Without an initialised process group it does not matter.
            group: the ranks that take part; None: all.

        Raises:
            ValueError: fewer than two rows were seen, or all rows are equal.
        """
        if self.finished:
            return self
        # What is refused is refused on every rank, so that none waits for one that has raised.
        self._check_seen()
        if not bool(self.running_moment.diagonal().sum() > 0):
            raise ValueError(
                f"all {self._rows} rows of features are equal, so there is no variance to "
                "normalise; check the teacher that made them"
            )
        together = src is not None and dist.is_available() and dist.is_initialized()
        if self.kind == "phi-s" and (not together or dist.get_rank() == src):
            covariance = self.running_moment.cpu() / (self._rows - 1)
            eigenvalues, axes = torch.linalg.eigh((covariance + covariance.T) / 2)
            eigenvalues, axes = eigenvalues.flip(0).clamp(min=0), axes.flip(1)
            size = axes.abs()
            first_largest = (size >= size.amax(dim=0) * (1 - 1e-6)).byte().argmax(dim=0)
            axes = axes * axes.gather(0, first_largest[None]).sign()
            self.final_rotation.copy_(mixing_rotation(self.channels, eigenvalues) @ axes.T)
        self.final.fill_(True)
        if together:
            self.broadcast(src, group)
        self._refresh()
        return self

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets everything, as a new training stage does."""
        for buffer in (self.count, self.running_mean, self.running_moment, self.final):
            buffer.zero_()
        self.final_rotation.zero_()
        self._refresh()

    @property
    def finished(self) -> bool:
        """Whether :meth:`finish` has run."""
        return self._finished

    @property
    def mean(self) -> Tensor:
        """``(C,)`` float32, of the rows seen so far; zeros before the first."""
        return self.running_mean.float()

    @property
    def scale(self) -> Tensor:
        """Float32: 0-d (``phi``), or ``(C,)`` for ``"standardize"``; of the rows seen so far.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        return self._scale64().float()

    @property
    def rotation(self) -> Tensor | None:
        """``(C, C)`` float32 ``R`` of a finished PHI-S, else None."""
        return self._rotation32

    @property
    def affine(self) -> Affine:
        """Mean and scale without the rotation, from the rows seen so far.

        It is all that MSE needs, since it does not see rotations, and serves before :meth:`finish`.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        return Affine(self.mean, self.scale)

    def __iter__(self) -> Iterator[Tensor | None]:
        """``mean, scale, rotation = PhiS.fit(features)``."""
        return iter((self.mean, self.scale, self.rotation))

    def transform(self, y: Tensor) -> Tensor:
        """Features to normalised features: ``(..., C)`` in and out, same dtype, float64 inside.

        For evaluation and export; in training the loss normalises on the fly. Differentiable.

        Raises:
            TypeError, ValueError: ``y`` is not floating point or does not have C channels.
            RuntimeError: before :meth:`finish`.
        """
        self._check_map(y, "transform")
        out = (y.double() - self.running_mean) / self._scale64()
        if self._rotation32 is not None:
            out = out @ self.final_rotation.T
        return out.to(y.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """Normalised features back to features, the exact inverse of :meth:`transform`.

        Raises:
            TypeError, ValueError: ``y`` is not floating point or does not have C channels.
            RuntimeError: before :meth:`finish`.
        """
        self._check_map(y, "inverse")
        out = y.double()
        if self._rotation32 is not None:
            out = out @ self.final_rotation
        return (out * self._scale64() + self.running_mean).to(y.dtype)

    def extra_repr(self) -> str:
        state = "finished" if self.finished else "collecting"
        return f"channels={self.channels}, kind={self.kind!r}, rows={self._rows}, {state}"

    def _combine(self, rows: int, mean: Tensor, moment: Tensor) -> None:
        if not rows:
            return
        total = self._rows + rows
        delta = mean - self.running_mean
        self.running_mean.add_(delta * (rows / total))
        self.running_moment.add_(moment)
        self.running_moment.addr_(delta, delta, alpha=self._rows * (rows / total))
        self._rows = total
        self.count.fill_(total)

    def _scale64(self) -> Tensor:
        self._check_seen()
        variance = self.running_moment.diagonal() / (self._rows - 1)
        if self.kind == "standardize":
            return torch.where(variance > 0, variance, 1.0).sqrt()
        return variance.mean().sqrt()

    def _check_open(self, method: str) -> None:
        if self.finished:
            raise RuntimeError(
                f"{method}() after finish(): the statistics are frozen; call reset() to collect "
                "new ones"
            )

    def _check_seen(self) -> None:
        if self._rows < 2:
            raise ValueError(
                f"statistics need at least 2 rows of features, {self._rows} seen: update() first"
            )

    def _check_map(self, y: Tensor, method: str) -> None:
        if not self.finished:
            raise RuntimeError(f"{method}() before finish(): the statistics may still change")
        _check_features(y, "y", self.channels)

    def _refresh(self) -> None:
        """Follows a change of the buffers."""
        self._rows = int(self.count)
        self._finished = bool(self.final)
        ready = self._finished and self.kind == "phi-s"
        self._rotation32 = self.final_rotation.float() if ready else None

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()


def _check_features(value: Tensor, name: str, channels: int | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.dim() < 1 or (channels is not None and value.shape[-1] != channels):
        wanted = "C" if channels is None else channels
        raise ValueError(f"{name}: expected the shape (..., {wanted}), got {tuple(value.shape)}")


def _row_mask(valid: Tensor, batch: Tensor) -> Tensor:
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid: expected a tensor or None, got {type(valid).__name__}")
    if valid.is_complex():
        raise TypeError(f"valid: expected a bool or float mask, got {valid.dtype}")
    lead = batch.shape[:-1]
    if valid.shape != lead[: valid.dim()]:
        raise ValueError(
            f"valid: expected the shape {tuple(lead)} or of its first dimensions, "
            f"got {tuple(valid.shape)}"
        )
    mask = valid > 0.5
    return mask.reshape(mask.shape + (1,) * (len(lead) - mask.dim())).expand(lead).reshape(-1)
