"""The long checks of `dnntk.solve`: beside the dense solution, beside descent, and its seconds."""

import dataclasses
import math
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sklearn.utils.estimator_checks import check_estimator

from dnntk import (
    DeepNarrowClassifier,
    DeepNarrowRegressor,
    KernelFlow,
    TrainConfig,
    empirical_ntk,
    solve,
    train,
)
from dnntk.networks.models import DeepNarrow
from dnntk.ntk.random_features import RandomFeatures
from dnntk.runs.folder import peak_memory_bytes
from dnntk.training import gradient_flow, placement
from dnntk.training.evaluation import as_trained
from dnntk.training.gradient_flow import TrainState
from dnntk.training.run import load_dataset_for

__all__ = ["estimators", "many_examples", "solved"]

# Training and held-out examples of the dense solution.
TRAINING, HELD_OUT = 200, 100
RIDGE = 1e-3


def solved(folder: Path) -> dict[str, Any]:
    """`dnntk.solve` against the dense solution, against gradient descent, and its seconds."""
    del folder
    return {
        "seconds": _seconds_against_descent(),
        "dense": _against_dense_solution(),
        "descent": _against_descent(),
        "promised": "dense: 1e-4, 8 iterations; descent: 1e-3; at least 300 times faster",
    }


def estimators(folder: Path) -> dict[str, Any]:
    """Every check of scikit-learn on the estimators of a real network."""
    del folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inputs of size 100, and negative ones
        found = {
            kind.__name__: [
                (result["check_name"], result["status"])
                for result in check_estimator(kind(depth=20, scale=1e6), on_fail=None)
            ]
            for kind in (DeepNarrowClassifier, DeepNarrowRegressor)
        }
    return {
        name: {
            "passed": sum(status == "passed" for _, status in results),
            "failed": [check for check, status in results if status == "failed"],
        }
        for name, results in found.items()
    } | {"promised": "none fails"}


def many_examples(folder: Path, data_dir: str | None) -> dict[str, Any]:
    """20,000 MNIST digits of ten classes at 7 x 7, depth 5000: products with the kernel.

    The network itself is solved for at the longest time.
    """
    del folder
    t, ridge = (100.0, 1e3, 1e4), 1e-4
    config = TrainConfig(
        dataset="mnist", data_dir=data_dir, classes="all", pool=4, depth=5000, optimizer="kernel"
    )
    model, variables, (x, y, _) = _problem(config)
    x, y = x[:20_000], y[:20_000]
    kernel = RandomFeatures(model, variables)
    begun = time.perf_counter()
    finite = KernelFlow(kernel, x, y, dtype="float32", tolerance=1e-5, progress=False)
    found = [finite.solution(each) for each in t]
    found.append(finite.for_targets(y, ridge=ridge).solution())
    seconds = time.perf_counter() - begun
    _, report = solve(model, variables, x, y, time=t[-1], progress=False)
    return {
        "products": dict(zip((*t, f"ridge {ridge}"), (s.iterations for s in found), strict=True)),
        "seconds_of_products": seconds,
        "solve": dataclasses.asdict(report),
        "peak_memory_bytes": peak_memory_bytes(),
        "promised": "at most 40 products",
    }


def _against_dense_solution() -> list[dict[str, Any]]:
    """Digits: float32 outputs beside the flow of the empirical NTK in float64.

    Depth is 1000, but 100 in the CNN of ten classes, whose dense kernel takes ten minutes else.
    """
    rows = []
    for arch in ("mlp", "cnn"):
        for classes in ((0, 1), "all"):
            depth = 100 if (arch, classes) == ("cnn", "all") else 1000
            config = TrainConfig(arch=arch, classes=classes, depth=depth)
            model, variables, (x, y, held_out) = _problem(config)
            x, y, held_out = x[:TRAINING], y[:TRAINING], held_out[:HELD_OUT]
            with jax.enable_x64(True):
                exact = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
                kernel = partial(empirical_ntk, model, exact)
                finite = KernelFlow(kernel, x, y, progress=False)
                decayed = KernelFlow(kernel, x, y, ridge=RIDGE, gram=finite.gram, progress=False)
                both = np.concatenate([x, held_out])
                expected = [*finite.predict(both, (1.0, 100.0, 1e4)), decayed.predict(both)]
            for t, outputs in zip((1.0, 100.0, 1e4, math.inf), expected, strict=True):
                ridge = RIDGE if math.isinf(t) else 0.0
                trained, report = solve(model, variables, x, y, time=t, ridge=ridge, progress=False)
                found = np.asarray(jax.jit(model.apply)(trained, both))
                row = {
                    "arch": arch,
                    "depth": depth,
                    "outputs": y.shape[1],
                    "time": t,
                    "ridge": ridge,
                }
                row["training_error"] = _relative(found[: len(x)], outputs[: len(x)])
                row["held_out_error"] = _relative(found[len(x) :], outputs[len(x) :])
                row |= {"iterations": report.iterations, "residual": report.residual}
                print(row, flush=True)
                rows.append(row)
    return rows


def _against_descent() -> list[dict[str, Any]]:
    """Toy and digits, depth 1000: outputs beside those of gradient descent by small steps."""
    rows = []
    for dataset, arch, t, steps in (
        ("toy", "mlp", 100.0, 4000),
        ("digits", "mlp", 20.0, 1000),
        ("digits", "cnn", 20.0, 1000),
    ):
        model, variables, (x, y, held_out) = _problem(TrainConfig(arch=arch, dataset=dataset))
        trained, _ = solve(model, variables, x, y, time=t, progress=False)
        frozen, optimizer = {"initial": variables["initial"]}, gradient_flow.sgd(t / steps)
        params = jax.tree.map(lambda p: p.copy(), variables["params"])
        mesh = placement.data_mesh(len(x), 0, threaded=True)
        take_steps = gradient_flow.make_steps(model, optimizer, mesh)
        state = TrainState(params, optimizer.init(params))
        state, _ = take_steps(state, frozen, placement.put_batch(x, y, mesh), np.int32(steps))
        predict = gradient_flow.make_predict(model, mesh)
        row: dict[str, Any] = {"dataset": dataset, "arch": arch, "time": t, "steps": steps}
        for name, inputs in (("training_error", x), ("held_out_error", held_out)):
            found, expected = (
                predict(end, frozen, inputs) for end in (trained["params"], state.params)
            )
            row[name] = _relative(found, expected)
        print(row, flush=True)
        rows.append(row)
    return rows


def _seconds_against_descent(measured_steps: int = 300) -> dict[str, Any]:
    """Digits 0/1, depth 1000, t = 10,000; descent's seconds are those of its rate of steps."""
    t, config = 1e4, TrainConfig(steps=measured_steps, eval_every=measured_steps)
    model, variables, (x, y, _) = _problem(config)
    begun = time.perf_counter()
    _, report = solve(model, variables, x, y, time=t, progress=False)
    seconds = time.perf_counter() - begun
    descent = train(config, progress=False).summary
    steps = t / descent["time_step"]
    needed = steps / descent["steps_per_second"]
    return {
        "solve_seconds": seconds,
        "solve_iterations": report.iterations,
        "solve_residual": report.residual,
        "descent_steps": steps,
        "descent_steps_measured": measured_steps,
        "descent_seconds": needed,
        "times_faster": needed / seconds,
    }


def _problem(config: TrainConfig) -> tuple[DeepNarrow, Any, tuple[np.ndarray, ...]]:
    """(model, variables, (training inputs, targets, held-out inputs))."""
    arrays = as_trained(load_dataset_for(config), config.arch == "mlp", config.dtype)
    x, y, held_out = (arrays[name] for name in ("x_train", "y_train", "x_test"))
    model = config.model(y.shape[1])
    return model, jax.jit(model.init)(jax.random.key(config.seed), x[:1]), (x, y, held_out)


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
