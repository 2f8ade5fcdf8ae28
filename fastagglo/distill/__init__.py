"""Multi-teacher distillation: balancing teachers and losses, mosaics, the student's average."""

from fastagglo.distill import mosaic
from fastagglo.distill.balance import (
    AdaLoss,
    Balancer,
    FixedWeights,
    LossRatioWeights,
    UncertaintyWeights,
    make_balancer,
    teacher_dropping,
)
from fastagglo.distill.dispersion import Dispersion
from fastagglo.distill.distiller import Distiller, DistillOutput, Matching
from fastagglo.distill.ema import make_ema, mesa_loss
from fastagglo.distill.hadamard import hadamard, hadamard_order_exists, mixing_rotation
from fastagglo.distill.mosaic import MosaicPlan, mosaic_plan
from fastagglo.distill.phi_s import PhiS

__all__ = [
    "AdaLoss",
    "Balancer",
    "Dispersion",
    "DistillOutput",
    "Distiller",
    "FixedWeights",
    "LossRatioWeights",
    "Matching",
    "MosaicPlan",
    "PhiS",
    "UncertaintyWeights",
    "hadamard",
    "hadamard_order_exists",
    "make_balancer",
    "make_ema",
    "mesa_loss",
    "mixing_rotation",
    "mosaic",
    "mosaic_plan",
    "teacher_dropping",
]
