"""How good a student is: held-out figures, PCA pictures and the run's report page."""

from fastagglo.eval.heldout import ExplainedVariance, evaluate, to_grid
from fastagglo.eval.pca import PcaBasis, backbone_figure, feature_figure, pca_rgb
from fastagglo.eval.report import read_metrics, write_report

__all__ = [
    "ExplainedVariance",
    "PcaBasis",
    "backbone_figure",
    "evaluate",
    "feature_figure",
    "pca_rgb",
    "read_metrics",
    "to_grid",
    "write_report",
]
