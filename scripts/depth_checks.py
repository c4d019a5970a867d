"""The long check of the deepest network: float32 beside float64 at ten million layers."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dnntk import DeepNarrowMLP, load_dataset
from dnntk.runs.folder import peak_memory_bytes
from dnntk.training import gradient_flow, placement

__all__ = ["ten_million_layers"]


def ten_million_layers(folder: Path) -> dict[str, Any]:
    """A gradient step of the toy MLP in float32, beside float64 on the same network."""
    del folder
    depth, time_step = 10**7, 0.5
    model = DeepNarrowMLP(depth, 1, float(depth) ** 2.2)
    data = load_dataset("toy")

    def evaluate(params: Any, frozen: Any, dtype: str) -> tuple[float, Any]:
        params, frozen, x, y = jax.tree.map(
            lambda a: jnp.asarray(a, dtype), (params, frozen, data.x_train, data.y_train)
        )
        batch = placement.Batch(x, y, jnp.full(len(x), 1 / len(x), dtype))
        loss_and_gradient = jax.jit(
            lambda p, f: gradient_flow.loss_and_gradient(model, p, f, batch, 1)
        )
        loss, gradient = loss_and_gradient(params, frozen)
        return float(loss), jax.device_get(gradient)

    x = jnp.asarray(data.x_train, jnp.float32)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), x))
    params, frozen = variables["params"], {"initial": variables["initial"]}
    # The first gradient moves the network off its zero output; the second one is compared.
    before, gradient = evaluate(params, frozen, "float32")
    params = jax.tree.map(lambda p, g: p - np.float32(time_step) * g, params, gradient)
    begun = time.perf_counter()
    loss, gradient = evaluate(params, frozen, "float32")
    seconds = time.perf_counter() - begun
    with jax.enable_x64(True):
        expected_loss, expected = evaluate(params, frozen, "float64")
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True))
    error = sum(float(np.sum((g - e) ** 2)) for g, e in pairs)
    norm = sum(float(np.sum(e**2)) for _, e in pairs)
    return {
        "loss_before": before,
        "loss_after_a_step": loss,
        "loss_in_float64": expected_loss,
        "gradient_error": (error / norm) ** 0.5,
        "gradient_seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "promised": "agreement to 1e-4",
    }
