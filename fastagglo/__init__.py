"""fastagglo: fast, open training of agglomerative vision foundation models, and its fused ops.

Importing it takes no GPU, no network, and no package but torch, triton and numpy.
"""

from importlib.metadata import version

from fastagglo import distill, kernels, model, ops
from fastagglo.compress import compress
from fastagglo.features import Features

__version__ = version("fastagglo")

__all__ = ["Features", "__version__", "compress", "distill", "kernels", "model", "ops"]
