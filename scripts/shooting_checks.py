"""The long check of `dnntk.parallel`: beside the layer loop and beside float64, at many shapes."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dnntk import DeepNarrowCNN, DeepNarrowMLP, TrainConfig, parallel, train
from dnntk.networks.models import DeepNarrow

__all__ = ["depth_chunks"]

INFINITY = math.inf
# Architecture, depth, inputs, outputs, C, and the size of D's random entries.
SHAPES: tuple[tuple[Any, int, tuple[int, ...], int, float, float], ...] = (
    (DeepNarrowMLP, 3, (5, 2), 1, 5.0, 1.0),
    (DeepNarrowMLP, 4, (1, 3), 3, 1.0, 1.0),
    (DeepNarrowMLP, 7, (3, 1), 2, 0.3, 0.3),
    (DeepNarrowMLP, 31, (7, 3), 2, INFINITY, 0.3),
    (DeepNarrowMLP, 101, (16, 2), 1, 0.3, 0.3),
    (DeepNarrowMLP, 211, (9, 40), 3, 2.0, 0.1),
    (DeepNarrowMLP, 100, (8, 196), 10, 50.0, 0.1),
    (DeepNarrowMLP, 997, (20, 8), 10, 1.0, 0.1),
    (DeepNarrowMLP, 1000, (32, 2), 1, 5.0, 1.0),
    (DeepNarrowMLP, 1000, (32, 2), 1, 0.3, 0.1),
    (DeepNarrowMLP, 1000, (64, 49), 1, 1000**2.2, 0.3),
    (DeepNarrowMLP, 10_007, (16, 2), 1, 5.0, 0.1),
    (DeepNarrowMLP, 10_007, (16, 2), 1, INFINITY, 0.3),
    (DeepNarrowMLP, 100_000, (16, 2), 1, 5.0, 0.1),
    (DeepNarrowCNN, 3, (2, 4, 4, 1), 1, 5.0, 0.3),
    (DeepNarrowCNN, 17, (3, 5, 5, 3), 2, 1.0, 0.1),
    (DeepNarrowCNN, 53, (4, 5, 4, 1), 1, 5.0, 0.03),
    (DeepNarrowCNN, 100, (4, 7, 7, 1), 1, 0.3, 0.03),
    (DeepNarrowCNN, 300, (6, 7, 7, 1), 2, 1.0, 0.03),
    (DeepNarrowCNN, 1000, (8, 7, 7, 1), 1, 1000**2.2, 0.1),
    (DeepNarrowCNN, 1003, (8, 7, 7, 1), 10, 5.0, 0.03),
    (DeepNarrowCNN, 10_001, (2, 4, 4, 1), 1, 50.0, 0.03),
)
# (architecture, dataset, depth, C) of networks that are trained first.
TRAINED = (
    *itertools.product(("mlp", "cnn"), ("digits",), (1000,), (0.3, 1.0, 5.0, 1000**2.2)),
    *itertools.product(("mlp", "cnn"), ("mnist",), (1000,), (1.0, 5.0)),
    ("mlp", "toy", 1000, 5.0),
    ("mlp", "toy", 10_000, 5.0),
    ("mlp", "toy", 100_000, 5.0),
    ("mlp", "toy", 100_000, 50.0),
)
STEPS, INPUTS = 100, 200


def depth_chunks(folder: Path) -> dict[str, Any]:
    """Chunks of layers side by side: outputs and gradients against the loop and float64."""
    del folder
    return {
        "random": list(_random()),
        "trained": list(_trained()),
        "promised": "float64: 1e-9 from the loop; float32: no further from float64 than the loop "
        "but for roundings, at depth 100,000 (toy, C = 5) 50 times nearer",
    }


def _random() -> Iterator[dict[str, Any]]:
    for seed, (make, depth, shape, d_out, scale, size) in enumerate(SHAPES):
        model: DeepNarrow = make(depth, d_out, scale)
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(shape)
        with jax.enable_x64(True):
            variables = jax.device_get(jax.jit(model.init)(jax.random.key(seed), x))
        moved = lambda p, rng=rng, size=size: p + size * rng.standard_normal(p.shape)  # noqa: E731
        variables = {**variables, "params": jax.tree.map(moved, variables["params"])}
        named = {"network": make.__name__, "depth": depth, "inputs": shape, "scale": scale}
        yield _show(named | compare(model, variables, x))


def _trained() -> Iterator[dict[str, Any]]:
    for arch, dataset, depth, scale in TRAINED:
        folder = flags.FLAGS.data_dir if dataset == "mnist" else None
        if dataset == "mnist" and folder is None:
            continue
        given = {"dataset": dataset, "data_dir": folder, "depth": depth, "scale": scale}
        run = train(TrainConfig(arch=arch, steps=STEPS, **given), progress=False)
        found = compare(run.model, run.variables, run.dataset.x_train[:INPUTS])
        yield _show({"network": arch, "dataset": dataset, "depth": depth, "scale": scale} | found)


def compare(model: DeepNarrow, variables: Any, x: np.ndarray) -> dict[str, Any]:
    """Largest distances from float64's loop, relative to the largest output or derivative."""
    targets = np.cos(np.arange(len(x) * model.d_out)).reshape(len(x), -1)

    def run(dtype: str, loop: bool) -> tuple[np.ndarray, list[np.ndarray], Any]:
        def loss(params: Any, frozen: Any, x: jax.Array, y: jax.Array) -> Any:
            given = {"params": params, **frozen}
            f, report = cast(jax.Array, model.apply(given, x)), None
            if not loop:
                f, report = parallel.outputs(model, given, x)
            return jnp.sum((f - y) ** 2) / len(y), (f, report)

        with jax.enable_x64(dtype == "float64"):
            frozen = {name: tree for name, tree in variables.items() if name != "params"}
            given = jax.tree.map(
                lambda a: np.asarray(a, dtype), (variables["params"], frozen, x, targets)
            )
            gradient = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))
            (_, (f, report)), slopes = jax.device_get(gradient(*given))
        return f.astype(np.float64), jax.tree.leaves(slopes), report

    f, slopes, _ = run("float64", True)
    largest = max(float(np.abs(s).max()) for s in slopes if s.size)

    def errors(found: np.ndarray, gradients: list[np.ndarray]) -> tuple[float, float]:
        pairs = [(a, b) for a, b in zip(gradients, slopes, strict=True) if b.size]
        furthest = max(float(np.abs(a - b).max()) for a, b in pairs)
        return float(np.abs(found - f).max() / np.abs(f).max()), furthest / largest

    values: dict[str, Any] = {}
    for dtype in ("float64", "float32"):
        found, gradients, report = run(dtype, False)
        values[dtype] = errors(found, gradients)
        values[f"{dtype}_sweeps"] = int(report.sweeps)
        values[f"{dtype}_by_the_loop"] = bool(report.sequential)
    return values | {"float32_loop": errors(*run("float32", True)[:2])}


def _show(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row
