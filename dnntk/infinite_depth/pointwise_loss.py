"""A loss by its function alone: values and derivatives on the training examples, on the host."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from numpy.typing import NDArray

from dnntk.checks import reason
from dnntk.errors import InputError
from dnntk.training.losses import Loss, check_targets, interpolant, loss_of

__all__ = ["Pointwise"]

Array = NDArray[np.float64]
# Negative second derivatives of which a flow takes no notice: of the largest one, and at all.
CONCAVE = 1e-8
LEAST_CONCAVE = 1e-14


class Pointwise:
    """A loss and its derivatives by the outputs, on many examples, in float64 on the host."""

    def __init__(self, loss: str | Loss, y: Array) -> None:
        """Bind the targets [n, k].

        Raises:
            InputError: the targets are not the loss's; or the function does not return a number
                for outputs [k] and a target [k].
        """
        function = loss_of(loss)
        check_targets(loss, "y_train", y)
        self._loss, self._y, self._device = loss, y, jax.local_devices(backend="cpu")[0]
        self._largest = 0.0  # second derivative so far
        row = jax.ShapeDtypeStruct(y.shape[1:], np.float64)
        try:
            with jax.enable_x64(True):
                shape = jax.eval_shape(function, row, row).shape
        except Exception as error:  # a user's function may raise anything
            raise InputError(
                "loss: expected a function (outputs [k], target [k]) -> number that JAX can trace, "
                f"got {type(error).__name__}: {reason(error)}; write it with jax.numpy"
            ) from None
        if shape != ():
            raise InputError(
                "loss: expected a function (outputs [k], target [k]) -> number, got an array of "
                f"shape {list(shape)}; sum over the outputs"
            )
        compiled = _compiled_once if isinstance(loss, str) else _compiled
        self._functions = compiled(function)

    def end(self, start: Array) -> Array | None:
        """`interpolant` of the targets: outputs [n, k], or None."""
        return interpolant(self._loss, self._y, start)

    def value(self, f: Array) -> float:
        """The mean over examples of the loss at outputs [n, k]."""
        return float(np.mean(self._evaluate("value", f)))

    def gradient(self, f: Array) -> Array:
        """Derivatives [n, k] by the outputs [n, k]."""
        return self._evaluate("gradient", f)

    def hessian(self, f: Array) -> Array:
        """Second derivatives [n, k, k] by the outputs [n, k]."""
        return self._evaluate("hessian", f)

    def check_convex(self, f: Array, time: float) -> None:
        """Refuse a function that is not convex at outputs [n, k], those of a time.

        Raises:
            InputError: a second derivative is not finite, or has a negative eigenvalue.
        """
        if isinstance(self._loss, str):
            return  # these are
        hessian = self.hessian(f)
        self._largest = max(self._largest, float(np.abs(hessian).max(initial=0)))
        slack = CONCAVE * self._largest + LEAST_CONCAVE
        try:
            if not np.isfinite(hessian).all():
                raise np.linalg.LinAlgError
            np.linalg.cholesky(hessian + slack * np.eye(f.shape[1]))
        except np.linalg.LinAlgError:
            raise InputError(
                "loss: expected a convex, twice differentiable function, got a negative second "
                f"derivative, or none, at t = {time:.3g}; give a convex one, or a shorter time"
            ) from None

    def _evaluate(self, which: str, f: Array) -> Array:
        with jax.enable_x64(True), jax.default_device(self._device):
            return np.asarray(self._functions[which](f, self._y))


def _compiled(function: Loss) -> dict[str, Callable[[Array, Array], jax.Array]]:
    """A loss and its derivatives by the outputs, of many examples: [n, k], [n, k] -> [n, ...]."""
    one = {"value": function, "gradient": jax.grad(function), "hessian": jax.hessian(function)}
    return {name: jax.jit(jax.vmap(each)) for name, each in one.items()}


_compiled_once = functools.cache(_compiled)
