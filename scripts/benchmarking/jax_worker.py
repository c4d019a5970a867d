"""A worker of benchmark.py: the literal network in plain JAX, without `dnntk`.

``lax.scan`` scans over the stacked layers, ``unrolled`` is a Python loop over a list of layers.
Both jit one step of `jax.value_and_grad` and plain SGD.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarking import worker

Layer = dict[str, jax.Array]


class Plain:
    """Training steps of plain SGD on 1/2 E ||f - y||^2."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Read the network and its data from ``job``'s folder and compile the step."""
        folder = Path(job["folder"])
        self.x, self.y = (jnp.asarray(np.load(folder / f"{name}.npy")) for name in "xy")
        params: Any = {
            name: {
                part: jnp.asarray(np.load(folder / f"{name}_{part}.npy"))
                for part in ("kernel", "bias")
            }
            for name in ("first", "middle", "last")
        }
        if job["worker"] == "unrolled":
            middle = params["middle"]
            count = len(middle["bias"])
            layers = [{name: p[i] for name, p in middle.items()} for i in range(count)]
            params = [params["first"], *layers, params["last"]]
        self.params = params
        outputs = unrolled if job["worker"] == "unrolled" else scanned

        def compile() -> Any:
            step = jax.jit(partial(_step, outputs, job["literal_rate"]), donate_argnums=0)
            return step.lower(self.params, self.x, self.y).compile()

        self.step, seconds = worker.compiled(compile, job["compiles"])
        self.facts = {
            "compile_seconds": seconds,
            "gradient_bytes": sum(p.nbytes for p in jax.tree.leaves(self.params)),
        }

    def take(self, steps: int) -> float:
        """Take training steps; return the loss before the last one."""
        value = math.nan
        for _ in range(steps):
            self.params, loss = self.step(self.params, self.x, self.y)
            value = float(loss)
        jax.block_until_ready(self.params)
        return value


def scanned(params: dict[str, Layer], x: jax.Array) -> jax.Array:
    """Outputs [n, d_out] by a scan over stacked layers."""

    def layer(h: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
        return jax.nn.relu(_affine(h, layer)), None

    h = jax.nn.relu(_affine(x, params["first"]))
    h, _ = lax.scan(layer, h, params["middle"])
    return _read_out(_affine(h, params["last"]))


def unrolled(layers: Sequence[Layer], x: jax.Array) -> jax.Array:
    """Outputs [n, d_out] by a Python loop over the layers."""
    for layer in layers[:-1]:
        x = jax.nn.relu(_affine(x, layer))
    return _read_out(_affine(x, layers[-1]))


def _affine(h: jax.Array, layer: Layer) -> jax.Array:
    if h.ndim == 2:
        return h @ layer["kernel"] + layer["bias"]
    names = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(h, layer["kernel"], (1, 1), "SAME", dimension_numbers=names)
    return h + layer["bias"]


def _read_out(h: jax.Array) -> jax.Array:
    return h if h.ndim == 2 else h.mean((1, 2))


def _step(outputs: Any, rate: float, params: Any, x: jax.Array, y: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        return 0.5 * jnp.mean(jnp.sum((outputs(params, x) - y) ** 2, 1))

    value, gradient = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - rate * g, params, gradient), value


def peak_bytes() -> int:
    """Peak memory of the accelerator, or of this process where there is none."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return int(statistics.get("peak_bytes_in_use", 0)) or worker.peak_bytes()


if __name__ == "__main__":
    jax.devices()  # allocates the backend's memory before the network's is counted
    worker.serve(Plain, peak_bytes)
