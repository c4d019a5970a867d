import math

import numpy as np

from dnntk.infinite_depth.spectral_filter import SpectralFilter


def test_the_filter_is_the_time_where_the_eigenvalue_is_zero():
    found = SpectralFilter(3.0)(np.array([0.0, 1e-12, 2.0]))
    np.testing.assert_allclose(found, [3, 3, (1 - np.exp(-6)) / 2], rtol=1e-9)
    np.testing.assert_allclose(SpectralFilter(math.inf, 0.5)(np.array([1.5])), 0.5)
