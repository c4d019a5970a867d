"""The empirical neural tangent kernel, of deep narrow networks and of any other, and its tools."""

from dnntk.ntk.empirical import empirical_ntk, empirical_ntk_fn
from dnntk.ntk.measures import alignment, cka, effective_dimension, kernel_movement
from dnntk.ntk.operators import Operator, operator
from dnntk.ntk.taylor import linearize, taylor_expand

__all__ = [
    "Operator",
    "alignment",
    "cka",
    "effective_dimension",
    "empirical_ntk",
    "empirical_ntk_fn",
    "kernel_movement",
    "linearize",
    "operator",
    "taylor_expand",
]
