"""Which losses are convex where."""

import jax.numpy as jnp
import numpy as np
import pytest

from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import KernelFlow
from dnntk.infinite_depth.pointwise_loss import Pointwise

Y = np.array([[0.0, 1.0], [1.0, 0.0], [0.3, 0.7]])
LOSSES = {
    "linear": (lambda f, y: jnp.sum(f * y), True),
    "quartic": (lambda f, y: jnp.sum((f - y) ** 4), True),
    "huber": (lambda f, y: jnp.sum(jnp.where(abs(f - y) < 1, (f - y) ** 2 / 2, abs(f - y))), True),
    "saddle": (lambda f, y: (f[0] - y[0]) * (f[1] - y[1]), False),
    "no second derivative": (lambda f, y: jnp.sum(abs(f - y) ** 1.5), False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_not_convex_is_refused(name):
    loss, is_convex = LOSSES[name]
    pointwise = Pointwise(loss, Y)
    for f in (np.zeros((3, 2)), 100 * Y):
        if is_convex:
            pointwise.check_convex(f, 0.0)
            continue
        with pytest.raises(InputError, match="^loss: expected a convex.* at t = 2;"):
            pointwise.check_convex(f, 2.0)


def test_the_flow_stops_where_the_loss_turns_concave():
    """f' = 1 + 3 f^2 from f = -1 is tan(sqrt(3) t - pi / 3) / sqrt(3); it is 0 at t = 0.6046."""
    given = {"loss": lambda f, y: -jnp.sum(f + f**3), "initial": [[-1.0]], "progress": False}
    flow = KernelFlow(lambda a, b: a @ b.T, [[1.0]], [0.0], **given)
    for _ in range(2):
        with pytest.raises(InputError, match=r"at t = 0\.6[01]"):
            flow.predict([[1.0]], 0.8)
        f = np.tan(np.sqrt(3) * 0.5 - np.pi / 3) / np.sqrt(3)
        assert flow.predict([[1.0]], 0.5)[0, 0] == pytest.approx(f + 1, abs=1e-6)
