import pytest
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def digits():
    """Training and test images in 0 to 1, and labels, of digits 0 to 2."""
    x, y = load_digits(n_class=3, return_X_y=True)
    return x[:120] / 16, y[:120], x[120:220] / 16, y[120:220]
