"""The limit kernel of deep narrow networks, the arc-cosine kernels, and Gram matrices."""

from dnntk.kernel.arccos import arccos0, arccos1
from dnntk.kernel.limit import limit_ntk

__all__ = ["arccos0", "arccos1", "limit_ntk"]
