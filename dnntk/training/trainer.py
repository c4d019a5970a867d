"""One run of `dnntk.train`: its setup, steps, evaluations, checkpoints and files."""

import contextlib
import dataclasses
import itertools
import logging
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dnntk.data.datasets import Dataset
from dnntk.data.labels import class_targets
from dnntk.data.own_data import warn_of_inputs
from dnntk.errors import Diverged, Interrupted, Stopped
from dnntk.networks.models import DeepNarrow
from dnntk.runs.checkpoints import Checkpoints, memory_to_write
from dnntk.runs.folder import (
    METRICS,
    SUMMARY,
    RunFolder,
    peak_memory_bytes,
    resident_bytes,
    versions,
)
from dnntk.runs.interruption import termination_flag
from dnntk.runtime import processes
from dnntk.runtime.progress import progress_bar
from dnntk.training import evaluation, gradient_flow, pipeline, placement
from dnntk.training.config import TrainConfig
from dnntk.training.optimizers import optimizer_of
from dnntk.training.plan import (
    Plan,
    Planner,
    checkpoint_interval,
    evaluated_examples,
    evaluation_steps,
    kernel_times,
)
from dnntk.training.reporting import draw_run, say_done, say_network, verdict, warn_of_vanished
from dnntk.training.step_size import Eigenvalue, largest_eigenvalue

__all__ = ["Run", "TrainResult"]

log = logging.getLogger("dnntk")

# A loss this many times the first one does not recover. A smaller one may: if C is small, a step
# above the stable limit raises the loss a thousandfold before the kernel shrinks.
DIVERGENCE = 1e6
# Duration of a call that takes several short steps: the progress bar moves this often.
SECONDS_AT_ONCE = 0.1


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        model: the network; ``model.apply(variables, x)`` are its outputs.
        variables: trained variables, on the default device.
        history: a dict for each evaluation: step, time, train_loss, test_loss, train_accuracy,
            test_accuracy, seconds.
        summary: the content of summary.json.
        dataset: the training and test data, images as the network takes them.
    """

    model: DeepNarrow
    variables: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    dataset: Dataset

    def __repr__(self) -> str:
        """The network and its results."""
        names = ("steps", "train_loss", "test_loss", "train_accuracy", "test_accuracy")
        found = ", ".join(f"{name}={self.summary.get(name)}" for name in names)
        kind = type(self.model).__name__
        return f"TrainResult({kind} of depth {self.model.depth}, {found}, {self.dataset!r})"


class Run:
    """One call of `dnntk.train`; ``recorded`` describes the user's own data in config.json."""

    kernel_seconds = 0.0  # before the first step, to be counted

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        recorded: dict[str, Any],
        folder: RunFolder | None,
        resume: bool,
        progress: bool,
    ) -> None:
        """Prepare everything but the compiled step."""
        self.config, self.folder = config, folder
        self.progress = progress and processes.is_primary()
        self.begun = self.called = time.perf_counter()
        self.recorded = recorded
        dataset = evaluation.with_targets_of(dataset, config.loss, config.label_smoothing)
        self.targets = class_targets(dataset) if recorded and dataset.classes else None
        if config.shift:
            dataset.shifted(np.arange(1), config.shift, np.random.default_rng())  # or an error now
        arrays = evaluation.as_trained(dataset, config.arch == "mlp", config.dtype)
        self.given, self.dataset = dataset, dataclasses.replace(dataset, **arrays)
        self.model = config.model(self.dataset.y_train.shape[1])
        self.planner = planner = Planner(config, self.model, len(self.dataset.x_train))
        self.batch_size, self.resume = planner.batch_size, resume
        key, one = jax.random.key(config.seed), jnp.asarray(self.dataset.x_train[:1])
        shapes = jax.eval_shape(self.model.init, key, one)
        self.parameters = sum(p.size for p in jax.tree.leaves(shapes["params"]))
        self.mesh = self.planner.mesh(shapes["params"], self.dataset.x_train)
        init = lambda key, x: pipeline.padded(self.model.init(key, x), self.mesh)  # noqa: E731
        where = placement.shardings(shapes, self.mesh)
        self.variables = jax.jit(init, out_shardings=where)(key, one)
        self._describe()
        self.plan = self._settle(resume)
        self.times = kernel_times(config, self.plan)
        self.optimizer = optimizer_of(config, self.plan.rate, self.plan.steps)
        popped = flax.core.pop(self.variables, "params")
        self.frozen, params = placement.put_state(popped, self.mesh)
        where = placement.shardings(jax.eval_shape(self.optimizer.init, params), self.mesh)
        opt_state = jax.jit(self.optimizer.init, out_shardings=where)(params)
        self.state = gradient_flow.TrainState(params, opt_state)
        self.predict = gradient_flow.make_predict(self.model, self.mesh)
        self.history: list[dict[str, Any]] = []
        self.test_outputs: np.ndarray | None = None
        self.curve: list[dict[str, float]] = []  # of the flow, where it is known in closed form

    def result(self) -> TrainResult:
        """Train, and write the results."""
        with self._checkpoints() as checkpoints:
            start = self._restore(checkpoints) if self.resume and checkpoints else 0
            self._compile()
            counted = self.history[-1]["seconds"] if self.history else self.kernel_seconds
            self.begun = time.perf_counter() - counted
            if not self.history:
                self._evaluate(0)
            stepping = self._train(start, checkpoints)
        summary = self._summary(stepping, self.plan.steps - start)
        variables = {"params": self.state.params, **self.frozen}
        if self.mesh.size > 1:
            variables = jax.device_put(self._whole(variables), jax.local_devices()[0])
        if self.folder:
            self.folder.write_json(SUMMARY, summary)
            self._draw()
        say_done(summary, self.config)
        return TrainResult(self.model, variables, self.history, summary, self.dataset)

    def _whole(self, tree: Any) -> Any:
        """The network's own arrays on the host, without the padding of stages."""
        return pipeline.unpadded(processes.to_host(tree), self.model)

    def _describe(self) -> None:
        width = self.variables["params"]["first"]["bias"].size
        say_network(self.config, width, self.parameters)
        log.info("data: %s; batches of %d", self._data(), self.batch_size)
        if self.config.loss != "squared":
            smoothing = self.config.label_smoothing
            log.info("loss: %s, labels smoothed by %g", self.config.loss, smoothing)
        if self.recorded:
            warn_of_inputs(self.dataset)
        devices = self.mesh.devices.ravel()
        log.info("device: %d x %s, %s", devices.size, devices[0].device_kind, self.config.dtype)

    def _data(self) -> str:
        return ("own data: " if self.recorded else "") + self.dataset.description

    def _settle(self, resume: bool) -> Plan:
        """The plan of a new run, or the saved one of a resumed run."""
        self.eigenvalue: Eigenvalue | None = None
        if resume and self.folder:
            plan = self.planner.resume(self.folder.read_config().get("plan"))
        else:
            plan = self.planner.plan(self._lambda_max)
            if self.folder:
                settled = {"plan": dataclasses.asdict(plan)}
                content = self.config.to_json() | self.recorded | settled
                self.folder.write_config("train", content)
        most = "at most " if self.config.optimizer == "kernel" else ""
        log.info("time_step: %s; %s%d steps", plan.reason, most, plan.steps)
        if self.eigenvalue is not None:
            warn_of_vanished(self.config, plan, self.eigenvalue)
        return plan

    def _lambda_max(self) -> Eigenvalue:
        """The largest eigenvalue of the network's own kernel on one batch."""
        order = np.random.default_rng(self.config.seed).permutation(len(self.dataset.x_train))
        chosen = np.sort(order[: self.batch_size])
        x, y = self.dataset.x_train[chosen], self.dataset.y_train[chosen]
        self.eigenvalue = largest_eigenvalue(self.model, self.variables, x, self.mesh, y=y)
        return self.eigenvalue

    @contextlib.contextmanager
    def _checkpoints(self) -> Iterator[Checkpoints | None]:
        if self.folder is None:
            yield None
        else:
            with Checkpoints(self.folder.path / "checkpoints") as checkpoints:
                yield checkpoints

    def _restore(self, checkpoints: Checkpoints) -> int:
        assert self.folder is not None
        held = self._held()
        like = jax.eval_shape(lambda held: pipeline.unpadded(held, self.model), held)
        if checkpoints.kept():  # free the initial values before the restored ones are read
            for array in jax.tree.leaves((self.state, self.frozen, self.variables)):
                array.delete()
        found = checkpoints.restore(like)
        step = found[0] if found else 0
        self.history = self.folder.keep_metrics_to(step if found else -1)
        if found:
            self._take(found[1])
        log.info("resume: from step %d", step)
        return step

    def _held(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"state": self.state._asdict(), "frozen": self.frozen}

    def _take(self, held: dict[str, Any]) -> None:
        """Go on from what a checkpoint held."""
        tree = placement.put_state({name: held[name] for name in ("state", "frozen")}, self.mesh)
        self.state, self.frozen = gradient_flow.TrainState(**tree["state"]), tree["frozen"]

    def _compile(self) -> None:
        begun = time.perf_counter()
        batch = self._batch(np.arange(self.batch_size))
        self.at_once = self._same_batch() and gradient_flow.short_steps(self.state.params)
        make = gradient_flow.make_steps if self.at_once else gradient_flow.make_step
        step = make(self.model, self.optimizer, self.mesh, loss=self.config.loss)
        count = (np.int32(1),) if self.at_once else ()
        self.step = step.lower(self.state, self.frozen, batch, *count).compile()
        self.compile_seconds = time.perf_counter() - begun
        log.info("compiled: the training step, %.1f s", self.compile_seconds)
        params, x = self.state.params, self.dataset.x_train[: self.batch_size]
        need = gradient_flow.step_bytes(self.step, self.model, params, x, self.mesh)
        kept = self.state, self.frozen
        total = max(resident_bytes() - sum(a.nbytes for a in jax.tree.leaves(kept)), 0) + need
        if self.folder:
            total += memory_to_write(kept)
        log.info("memory: about %.2f GB expected at the peak", total / 1e9)

    def _batch(self, chosen: np.ndarray, step: int | None = None) -> placement.Batch:
        """Training examples, moved as in step ``step`` by the configuration's shift, if given."""
        config = self.config
        if config.shift and step is not None:
            rng = np.random.default_rng((config.seed, step, config.shift))
            moved = self.given.shifted(chosen, config.shift, rng)
            x = evaluation.inputs_as_trained(moved, config.arch == "mlp", config.dtype)
        else:
            x = self.dataset.x_train[chosen]
        return placement.put_batch(x, self.dataset.y_train[chosen], self.mesh)

    def _same_batch(self) -> bool:
        return self.batch_size == len(self.dataset.x_train) and not self.config.shift

    def _batches(self, start: int) -> Iterator[placement.Batch]:
        examples = len(self.dataset.x_train)
        if self._same_batch():
            yield from itertools.repeat(self._batch(np.arange(examples)))
        orders = placement.mini_batches(examples, self.batch_size, self.config.seed, start)
        for step, chosen in zip(itertools.count(start), orders, strict=False):
            yield self._batch(chosen, step)

    def _train(self, start: int, checkpoints: Checkpoints | None) -> float:
        """Take the steps from ``start`` on; returns the seconds of the steps alone."""
        steps, batches, stepping = self.plan.steps, self._batches(start), 0.0
        looks = set(evaluation_steps(self.config, steps))
        checkpoint_every = checkpoint_interval(self.config, steps)
        bar = progress_bar(
            total=steps, initial=start, desc="training", unit="step", disable=not self.progress
        )
        with bar, termination_flag() as termination_requested:
            step, per_step = start, math.inf
            while step < steps:
                stops = (steps, step - step % checkpoint_every + checkpoint_every, *looks)
                count = self._count(step, stops, per_step)
                begun = time.perf_counter()
                more = (np.int32(count),) if self.at_once else ()
                self.state, loss = self.step(self.state, self.frozen, next(batches), *more)
                value = float(loss)
                took = time.perf_counter() - begun
                stepping, per_step, step = stepping + took, took / count, step + count
                self._check(value, step - 1)
                bar.set_postfix(loss=f"{value:.3g}", refresh=False)
                bar.update(count)
                stop = processes.any_process(step < steps and termination_requested() > 0)
                save = checkpoints and (step % checkpoint_every == 0 or step == steps or stop)
                if step in looks:
                    self._evaluate(step)
                elif save:
                    self._check(self._losses(step)["train_loss"], step)
                if save and checkpoints:
                    checkpoints.save(step, self._whole(self._held()))
                if stop:
                    raise self._stopped(step, termination_requested())
        return stepping

    def _stopped(self, step: int, number: int) -> Stopped | Interrupted:
        kept = "nothing is kept without a workdir"
        if self.folder:
            kept = f"go on with resume=True, workdir={str(self.folder.path)!r}"
        if number == signal.SIGINT:
            return Interrupted(f"interrupted after step {step}; {kept}")
        return Stopped(f"SIGTERM: stopped after step {step}; {kept}")

    def _count(self, step: int, stops: tuple[int, ...], seconds_a_step: float) -> int:
        """Steps in the next call: up to the next of ``stops``, for `SECONDS_AT_ONCE` at most."""
        if not self.at_once:
            return 1
        stop = min(other for other in stops if other > step)
        return processes.broadcast(max(1, min(stop - step, int(SECONDS_AT_ONCE / seconds_a_step))))

    def _check(self, loss: float, step: int) -> None:
        first = self.history[0]["train_loss"]
        if math.isfinite(loss) and loss <= DIVERGENCE * max(first, 1e-12):
            return
        limit = self.plan.lambda_max
        stable = self.planner.stable_step(limit) if limit else 0.0
        advice = f"the stable limit was {stable:.3g} at the start; " if limit else ""
        given = {name: getattr(self.config, name) for name in ("lr", "depth_rate")}
        sizes = given | {"time_step": self.plan.time_step}
        used = next(f"{name} {size:.3g}" for name, size in sizes.items() if size is not None)
        kept = f"; the last good checkpoint stays in {self.folder.path}" if self.folder else ""
        raise Diverged(
            f"the loss went from {first:.3g} to {loss:.3g} at step {step}: lower the {used} "
            f"({advice}a larger scale keeps the kernel still){kept}",
            self.history,
        )

    def _losses(self, step: int) -> dict[str, Any]:
        """Loss and accuracy on both splits, after the last step on all examples."""
        data = self.dataset
        limit = evaluated_examples(self.config, step == self.plan.steps)
        found: dict[str, Any] = {"test_loss": None, "test_accuracy": None}
        for name, x, y, labels in (
            ("train", data.x_train[:limit], data.y_train[:limit], data.labels_train),
            ("test", data.x_test[:limit], data.y_test[:limit], data.labels_test),
        ):
            if not len(x):
                continue
            outputs = self._outputs(x)
            labelled, right = data.labels_train is not None, labels if self.recorded else None
            right = None if right is None else right[:limit]
            given = outputs, y, labelled, self.targets, right, self.config.loss
            found |= evaluation.split_scores(name, *given)
        self.test_outputs = outputs if len(data.x_test) else data.y_test
        return found

    def _outputs(self, x: np.ndarray) -> np.ndarray:
        return self.predict(self.state.params, self.frozen, x, self.batch_size)

    def _evaluate(self, step: int, **more: float) -> None:
        reached = None if self.times is None else float(self.times[step])
        line: dict[str, Any] = {"step": step, "time": reached}
        line |= self._losses(step) | more
        line["seconds"] = round(time.perf_counter() - self.begun, 3)
        self.history.append(line)
        self._check(line["train_loss"], step)
        if self.folder:
            self.folder.append(METRICS, line)

    def _summary(self, stepping: float, steps: int) -> dict[str, Any]:
        config, last, y = self.config, self.history[-1], self.dataset.y_train
        return {
            "train_loss": last["train_loss"],
            **verdict(last["train_loss"], y[: config.eval_examples or None], y, config.loss),
            "test_loss": last["test_loss"],
            "train_accuracy": last["train_accuracy"],
            "test_accuracy": last["test_accuracy"],
            "steps": self.plan.steps,
            "time": last["time"],
            "time_step": self.plan.time_step,
            "lambda_max": self.plan.lambda_max,
            "seconds": last["seconds"],
            "sitting_seconds": round(time.perf_counter() - self.called, 3),
            "steps_per_second": steps / stepping if stepping else None,
            "compile_seconds": self.compile_seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "parameters": self.parameters,
            "data": self._data(),
            "device": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}",
            "versions": versions(),
        }

    def _draw(self) -> None:
        assert self.folder is not None
        if self.test_outputs is None:  # a finished run was resumed
            self._losses(self.plan.steps)
        assert self.test_outputs is not None
        if processes.is_primary():
            held = self.history, self.dataset, self.test_outputs, self.targets
            draw_run(self.folder.path, self.config, *held, curve=self.curve)
