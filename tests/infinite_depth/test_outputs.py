import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.infinite_depth.outputs import OutputLayout


@pytest.mark.parametrize("matrix_size", [1, 3])
def test_products_with_the_kernel_come_back_by_time(matrix_size):
    rng = np.random.default_rng(0)
    layout, times = OutputLayout(3, matrix_size), rng.normal(size=(2, 5, 3))
    matrix = rng.normal(size=(5 * matrix_size, 5 * matrix_size))
    products = matrix @ layout.by_kernel_row(np.concatenate(times, 1))
    expected = [(np.kron(matrix, np.eye(3 // matrix_size)) @ f.ravel()) for f in times]
    found = layout.by_time(products, 2, [1.0, 2.0])
    np.testing.assert_allclose(found, np.reshape(expected, (2, 5, 3)), rtol=1e-12)


def test_a_number_serves_all_outputs_and_other_shapes_are_refused():
    assert OutputLayout(2, 1).checked("initial", 0.5, 4).tolist() == [[0.5, 0.5]] * 4
    with pytest.raises(InputError, match=r"initial: expected shape \[4, 2\], got \[4\]"):
        OutputLayout(2, 1).checked("initial", np.zeros(4), 4)
