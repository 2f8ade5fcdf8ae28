"""The photos and crops that a run's settings ask for."""

from __future__ import annotations

import torch

from fastagglo.data import CropStream, Filters, Split, build_source
from fastagglo.data import split as split_source
from fastagglo.data.fixed import FeatureReader
from fastagglo.errors import UserError
from fastagglo.train.config import RunConfig
from fastagglo.train.schedule import Planner


def load_split(config: RunConfig) -> Split:
    """All photos of a run, in their training and held-out parts."""
    data = config.data
    weights = data.weights or (1.0,) * len(data.images)
    mixture = list(zip(data.images, weights, strict=True))
    source = build_source(mixture if len(mixture) > 1 else data.images[0])
    return split_source(source, photos=data.holdout_photos, region=data.holdout_region)


def crop_stream(
    config: RunConfig,
    data: Split,
    planner: Planner,
    *,
    reader: FeatureReader | None = None,
) -> CropStream:
    """The training crops of one rank.

    Args:
        config: the run.
        data: of `load_split`.
        planner: of each step of this rank.
        reader: gives stored features of fixed crops.
    """
    settings = config.data
    return CropStream(
        data.train,
        planner,
        seed=config.seed,
        rank=planner.rank,
        world=planner.world,
        scale=settings.crop_scale,
        region=settings.holdout_region,
        filters=Filters(settings.min_size, settings.uniform_std, settings.drop_duplicates),
        fixed_crops=settings.crops_per_photo,
        crop_seed=settings.crop_seed,
        reader=reader,
        encoded=settings.decoder == "nvjpeg",
    )


def check_decoder(config: RunConfig, device: torch.device) -> None:
    """Refuse a decoder that the device has not. Raises UserError."""
    if config.data.decoder == "nvjpeg" and device.type != "cuda":
        raise UserError(
            f"setting data.decoder is 'nvjpeg', which needs a CUDA device, and the run is on "
            f"{device.type}: use cpu"
        )
