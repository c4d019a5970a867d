"""The memory, arithmetic, traffic, disk and time of a prediction before it begins.

Every loop of the run is tried for about a second on this device, in every process at once, and
`dnntk.infinite_depth.cost` counts its repetitions. The solver's iterations are counted on a few
thousand of the examples: at a finite time they hardly depend on the number of examples.
"""

import dataclasses
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import scipy.linalg

from dnntk.errors import InputError
from dnntk.infinite_depth.config import PredictConfig
from dnntk.infinite_depth.cost import BASIS_PASSES, Cost, Rates, Workload, cost
from dnntk.infinite_depth.cross_kernel import CrossKernel
from dnntk.infinite_depth.gram_matrix import SymmetricGram, keeps_tiles, usual_memory
from dnntk.infinite_depth.kernel_flow import MAX_ITERATIONS, KernelFlow
from dnntk.infinite_depth.prediction import CURVE_POINTS, Prediction
from dnntk.infinite_depth.solvers import BLOCK, CHUNK, Krylov, uses_eigh
from dnntk.runs.folder import resident_bytes
from dnntk.runs.paths import as_path
from dnntk.runtime import processes
from dnntk.runtime.devices import COMPILING, HOST_FRACTION, on_cpu, worth
from dnntk.runtime.progress import duration
from dnntk.runtime.threads import one_blas_thread

__all__ = ["PredictForecast", "forecast"]

SECONDS = 2.0  # of trials of the kernel, about
TRIALS = 5  # the mean is used, since other work on the machine varies
MAX_TILES = 8  # a trial
SAMPLE = 2000  # examples, at most, on which iterations are counted
SAMPLE_SECONDS = 4.0  # of their kernel
TILED_ROWS = 6144  # of a matrix whose product is timed: too large for any cache
BASIS_ROWS = 65536
ITERATIONS = 4  # by which a basis grows in a trial
MATRIX_ROWS = 200, 1200  # of a matrix that is diagonalized, at least and at most
FILE_BYTES = 1 << 26

log = logging.getLogger("dnntk")


@dataclasses.dataclass(frozen=True)
class PredictForecast:
    """The cost of a prediction that has not begun.

    Attributes:
        workload: the flow on all training examples.
        rates: rates of this device.
        cost: cost of that flow for each process.
        choice_seconds: seconds of reading the data, and of the choice of rho, beta and the time.
        held_bytes: memory of the process before the flow.
        sample: examples on which the iterations were counted; 0 for an eigendecomposition.
        max_iterations: most iterations that the memory allows.
        device: the devices that were measured.
    """

    workload: Workload
    rates: Rates
    cost: Cost
    choice_seconds: float
    held_bytes: int
    sample: int
    max_iterations: int
    device: str

    @property
    def total_seconds(self) -> float:
        """Seconds from reading the data to the last prediction."""
        return self.choice_seconds + self.cost.total_seconds

    @property
    def total_memory(self) -> float:
        """Peak memory of each process, in bytes."""
        return self.held_bytes + self.cost.total_memory

    def __str__(self) -> str:
        """The report that ``--dry_run`` prints."""
        p, c, r = self.workload, self.cost, self.rates
        where = (
            "in files" if p.folder else "in memory" if p.stored else "evaluated for every product"
        )
        shared = f", shared by {p.processes} processes" if p.processes > 1 else ""
        solver = "eigendecomposition"
        if p.iterations:
            solver = (
                f"block Krylov, {p.iterations} iterations of {p.columns} vectors (from "
                f"{self.sample:,} examples; memory allows {self.max_iterations:,})"
            )
        memory = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in c.memory.items() if v >= 5e6)
        work = ", ".join(f"{k} {v / 1e9:.3g}" for k, v in c.operations.items() if v)
        parts = {"choice": self.choice_seconds} | c.seconds
        times = ", ".join(f"{k} {v:.3g}" for k, v in parts.items() if v >= 0.05)
        each = f" ({c.traffic / p.iterations / 1e6:.3g} MB an iteration)" if c.traffic else ""
        return "\n".join(
            (
                f"matrix:      {p.examples:,} x {p.examples:,}, {p.tile_bytes / 1e9:.2f} GB of "
                f"tiles a process, {where}{shared}",
                f"solver:      {solver}",
                f"memory:      {self.total_memory / 1e9:.2f} GB a process at the peak (now "
                f"{self.held_bytes / 1e9:.2f}, {memory})",
                f"arithmetic:  {sum(c.operations.values()) / 1e9:.3g} Gflop a process ({work})",
                f"traffic:     {c.traffic / 1e9:.3g} GB received by a process{each}",
                f"disk:        {c.disk / 1e9:.3g} GB a process",
                f"time:        {duration(self.total_seconds)} until the pictures (s: {times})",
                f"calibrated:  {r.entries / 1e6:.3g} M kernel entries/s, products "
                f"{r.product / 1e9:.3g} GB/s, basis {r.basis / 1e9:.3g} GB/s, matrices "
                f"{r.matrix / 1e9:.3g} Gflop/s, {self.device}",
            )
        )


def forecast(config: PredictConfig) -> PredictForecast:
    """Try every loop of the run on its own data, and extrapolate.

    Args:
        config: the run.

    Returns:
        The cost of `dnntk.predict` here while nothing else runs. No files remain.

    Raises:
        InputError: the configuration or the data cannot be used.
    """
    return _Calibration(config).forecast()


class _Calibration:
    """Trials of the loops of one prediction."""

    def __init__(self, config: PredictConfig) -> None:
        start = time.perf_counter()
        self.run = Prediction(config, None, None, progress=False)
        self.reading = time.perf_counter() - start
        self.config, self.data = config, self.run.data
        self.memory = usual_memory() if config.memory_gb is None else config.memory_gb * 1e9
        self.rng = np.random.default_rng(0)
        self.d_out = self.data.y_train.shape[1]
        self.kernel = self.run.kernel(config.rho[0], config.beta[0])
        self.cross = CrossKernel(self.kernel, self.data.x_train, config.dtype)

    def forecast(self) -> PredictForecast:
        n, held_out = len(self.data.x_train), self.run.held_out()
        times = len(self.config.times_or_default)
        main = self._workload(n, len(self.data.x_test), times + CURVE_POINTS)
        before = resident_bytes()
        entries, recomputed, compiling = self._kernel(main)
        held = resident_bytes()
        sample, needed = (0, 0) if self._direct(n) else self._iterations(entries)
        left = self.memory - (main.tile_bytes if main.stored and not main.folder else 0)
        most = max(1, int(min(MAX_ITERATIONS, left // (8 * n * main.columns))))
        main = dataclasses.replace(main, iterations=min(needed, most))
        sweeps = 1 if main.stored else max(main.iterations, 1)
        work = sweeps * main.tiles * main.tile_entries / entries
        used, faster = self._devices(work, compiling)
        held += (used - 1) * max(held - before, 0)  # the kernel is compiled for each device
        rates = self._rates(main, faster * entries, faster * recomputed, compiling)
        choice = self.reading
        if self.config.select != "validation":
            choice += self._selection_seconds(min(self.config.search_examples, n), rates)
        elif held_out:
            choice += self._choice_seconds(n - held_out, held_out, min(needed, most), rates)
        return PredictForecast(
            workload=main,
            rates=rates,
            cost=cost(main, rates),
            choice_seconds=choice,
            held_bytes=held,
            sample=sample,
            max_iterations=most,
            device=f"{len(jax.local_devices())} x {jax.devices()[0].device_kind}",
        )

    def _direct(self, n: int) -> bool:
        return uses_eigh(self.config.solver, n)

    def _workload(self, examples: int, tests: int, times: int, iterations: int = 0) -> Workload:
        config, folder = self.config, self.config.gram_dir is not None
        fits = keeps_tiles(examples, config.block_size, self.memory)
        return Workload(
            examples=examples,
            shape=self.data.x_train.shape[1:],
            d_out=self.d_out,
            tests=tests,
            times=times,
            iterations=iterations,
            kernel_size=config.kernel_size,
            block_size=config.block_size,
            itemsize=np.dtype(config.dtype).itemsize,
            processes=processes.count(),
            stored=folder or self._direct(examples) or fits,
            folder=folder,
        )

    def _choice_seconds(self, rest: int, held_out: int, iterations: int, rates: Rates) -> float:
        """Seconds of the choice of rho and beta, and of the time on the validation examples."""
        config, total = self.config, 0.0
        pairs, times = len(config.rho) * len(config.beta), len(config.times_or_default)
        if pairs > 1:
            few = min(config.search_examples, rest)
            needed = 0 if self._direct(few) else iterations
            search = self._workload(few, held_out, times, needed)
            searched = dataclasses.replace(search, folder=False)
            total += pairs * cost(searched, rates).total_seconds
        needed = 0 if self._direct(rest) else iterations
        last = self._workload(rest, held_out, times, needed)
        seconds = cost(last, rates).seconds
        return total + sum(seconds.values()) - (seconds["kernel"] if last.stored else 0.0)

    def _selection_seconds(self, few: int, rates: Rates) -> float:
        """Seconds of the choice of rho, beta and the time without held-out examples."""
        config = self.config
        search = self._workload(few, 0, len(config.times_or_default))
        search = dataclasses.replace(search, stored=True, folder=False)
        return len(config.rho) * len(config.beta) * cost(search, rates).total_seconds

    def _kernel(self, workload: Workload) -> tuple[float, float, float]:
        """Entries a second, stored and multiplied, and the seconds of compilation."""
        x = self.cross.x
        few = x[: min(128, len(x))]
        self.cross.block(few, few)
        rate = len(few) ** 2 / _seconds(lambda: self.cross.block(few, few))
        most = 128 * max(1, math.isqrt(int(rate * SECONDS / TRIALS)) // 128)
        rows = processes.broadcast(min(workload.tile_rows, most))
        tile = x[:rows], x[:rows]
        first = _seconds(lambda: self.cross.block(*tile))
        count = processes.broadcast(max(2, min(MAX_TILES, int(SECONDS / TRIALS * rate / rows**2))))
        vectors = self.rng.normal(size=(rows, workload.columns))

        def fill() -> None:
            kept = [block.ravel().copy() for block in self.cross.blocks([tile] * count)]
            assert len(kept) == count

        def multiply() -> None:
            with one_blas_thread():
                for block in self.cross.blocks([tile] * count):
                    assert len(block @ vectors) == len(block.T @ vectors)

        entries, both = (count * rows**2 / _together(each) for each in (fill, multiply))
        compiling = max(first - rows**2 / entries, 0.0)
        return entries, both, compiling

    def _devices(self, work: float, compiling: float) -> tuple[int, float]:
        """The number of devices that share ``work`` seconds of one, and their speed-up."""
        idle = HOST_FRACTION if on_cpu() else 1.0
        used = worth(idle * work, max(compiling, COMPILING), len(jax.local_devices()))
        return used, 1 / (1 - idle * (1 - 1 / used))

    def _rates(
        self, workload: Workload, entries: float, recomputed: float, compiling: float
    ) -> Rates:
        network, product, columns = math.inf, math.inf, math.inf
        basis = self._basis(workload.columns)
        if workload.iterations:
            network = self._network(workload.columns)
            product = self._product(workload.columns, network)
            columns = self._columns(workload.columns, basis)
        disk = self._disk() if workload.folder else math.inf
        cached = workload.tile_bytes <= self.memory
        return Rates(
            entries=entries,
            recomputed=recomputed,
            product=product,
            basis=basis,
            columns=columns,
            eigh=self._eigh(workload.iterations * workload.columns or workload.examples),
            matrix=self._matrix(workload),
            network=network,
            disk=disk,
            read=product if cached else disk,
            compiling=compiling,
        )

    def _product(self, columns: int, network: float) -> float:
        """Bytes of tiles a second, for a matrix whose entries cost nothing."""
        x = self.rng.uniform(1, 2, (TILED_ROWS, 1))
        cross = CrossKernel(lambda x1, x2: x1 @ x2.T, x, "float64")
        gram = SymmetricGram(cross, block_size=self.config.block_size, progress=False)
        vectors, rows = self.rng.normal(size=(TILED_ROWS, columns)), processes.Rows(TILED_ROWS)
        own = rows.local(vectors)
        gram.product(own, rows)
        waiting = 2 * (vectors.nbytes - own.nbytes) / network
        seconds = _together(lambda: [gram.product(own, rows) for _ in range(4)]) / 4
        return gram.nbytes / max(seconds - waiting, seconds / 10)

    def _basis(self, columns: int) -> float:
        """Bytes a second of vectors, in products with a block of them."""
        targets = self.rng.normal(size=(BASIS_ROWS, columns))
        held = np.asfortranarray(self.rng.normal(size=(BASIS_ROWS, CHUNK)))

        def go_over() -> None:
            targets - held @ (held.T @ targets)

        return 2 * held.nbytes / _together(go_over)

    def _columns(self, columns: int, basis: float) -> float:
        """Rows times vectors of a block a second, without the products with earlier blocks."""
        rows = processes.Rows(BASIS_ROWS * processes.count())
        scale = self.rng.uniform(0.1, 1, (BASIS_ROWS, 1))
        targets = self.rng.normal(size=(rows.total, columns))

        def grow() -> None:
            solver = Krylov(lambda v: scale * v, targets, max_iterations=ITERATIONS, progress=False)
            solver.refine([], 0.0)

        own = rows.local(targets)
        before = BASIS_PASSES * own.nbytes * ITERATIONS * (ITERATIONS - 1) / 2
        grown = _together(grow)
        return ITERATIONS * own.size / max(grown - before / basis, grown / 2)

    def _eigh(self, size: int) -> float:
        """Rows cubed a second, for a matrix of about this size."""
        least, most = MATRIX_ROWS
        rows = min(max(size, least), most)
        matrix = self.rng.normal(size=(rows, rows))
        matrix += matrix.T
        work = partial(scipy.linalg.eigh, matrix, driver="evd", check_finite=False)
        return rows**3 / _together(work)

    def _matrix(self, workload: Workload) -> float:
        rows = min(workload.block_size, workload.examples)
        columns = workload.times * workload.d_out
        block, right = self.rng.normal(size=(rows, rows)), self.rng.normal(size=(rows, columns))
        block @ right
        return 2 * rows**2 * columns / (_together(lambda: [block @ right for _ in range(4)]) / 4)

    def _network(self, columns: int) -> float:
        if not processes.is_multiprocess():
            return math.inf
        rows = processes.Rows(BASIS_ROWS * processes.count())
        own = np.ones((BASIS_ROWS, columns))
        rows.all_gather(own)
        return (processes.count() - 1) * own.nbytes / _together(lambda: rows.all_gather(own))

    def _disk(self) -> float:
        folder = as_path("gram_dir", self.config.gram_dir or ".").absolute()
        while not folder.is_dir():
            folder = folder.parent
        content = self.rng.bytes(FILE_BYTES)
        with tempfile.TemporaryFile(dir=folder) as file:

            def write() -> None:
                file.seek(0)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

            return FILE_BYTES / _together(write)

    def _iterations(self, entries: float) -> tuple[int, int]:
        """The size of a sample of the examples, and the iterations that it needs."""
        config, data = self.config, self.data
        affordable = math.isqrt(int(2 * SAMPLE_SECONDS * entries * processes.count()))
        sample = processes.broadcast(min(len(data.x_train), SAMPLE, max(200, affordable)))
        flow = KernelFlow(
            self.kernel,
            data.x_train[:sample],
            data.y_train[:sample],
            ridge=config.ridge,
            solver="krylov",
            tolerance=config.tolerance,
            dtype=config.dtype,
            progress=False,
        )
        level = log.level
        log.setLevel(logging.ERROR)  # warnings would be about the sample
        try:
            solutions = flow.solutions(list(config.times_or_default))
        except InputError:
            if math.inf not in config.times_or_default:
                raise  # the run would raise it, too
            # The matrix is singular: the basis holds every direction.
            return sample, math.ceil(sample / max(self.d_out, BLOCK))
        finally:
            log.setLevel(level)
        return sample, max(each.iterations for each in solutions)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return max(time.perf_counter() - start, 1e-9)


def _together(work: Callable[[], object]) -> float:
    """The mean of some trials, at the same time in every process."""
    processes.barrier("calibration")
    return sum(_seconds(work) for _ in range(TRIALS)) / TRIALS
