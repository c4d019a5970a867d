"""Functions of a large symmetric matrix times a few vectors: many functions, one factorization.

Gradient flow on targets B with the positive semidefinite matrix A and the ridge r has learnt
phi(A) B at time t, where phi(s) = (1 - exp(-t (s + r))) / (s + r). Two ways to it share one form,
an orthonormal basis Q and the small matrix Q^T A Q, diagonalized:

`Eigendecomposition`  Q is everything. Any time is exact to rounding. For matrices of a few thousand
    rows: time of order m^3, memory 3 m^2.
`Krylov`  Q spans B, AB, A^2 B, ...: block Lanczos with full orthogonalization, for anything larger.
    One product with A an iteration, and memory for the basis. Short times need few iterations,
    t = infinity without a ridge the most. A kernel's few large eigenvalues, its constant part and
    the main directions of the data, cost an iteration each and do not slow down the others.

Block Lanczos: Golub & Underwood (1977). The defect of the differential equation as the residual of
a matrix function: Botchev, Grimm & Hochbruck (2013).
"""

import contextlib
import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from dnntk.kernel.gram import PROGRESS_DELAY
from dnntk.runtime import processes
from dnntk.runtime.progress import progress_bar
from dnntk.runtime.threads import by_rows, one_blas_thread

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
BLOCK = 8  # a product with fewer vectors takes as long, and more iterations are needed
CHUNK = 128  # vectors of the basis that lie together, so that products with them are few
LOOK_AGAIN = 1.2  # convergence is looked at whenever the basis has grown by this factor
FIRST_LOOK = 2
ENOUGH_FOR_THE_LARGEST = 12  # iterations, after which the largest eigenvalue stands still
SMALL = 512  # rows


@dataclasses.dataclass(frozen=True)
class Filter:
    """What gradient flow of one length does to a component of eigenvalue s.

    Attributes:
        time: t, may be infinite.
        ridge: r, added to every eigenvalue.
    """

    time: float
    ridge: float = 0.0

    def __call__(self, s: Array) -> Array:
        """phi(s) = (1 - exp(-t (s + r))) / (s + r), and t where s + r is 0."""
        s = s + self.ridge
        positive = s > np.finfo(np.float64).tiny
        safe = np.where(positive, s, 1.0)
        return np.where(positive, -np.expm1(-self.time * safe) / safe, self.time)


class Solver(Protocol):
    """A in an orthonormal basis of d vectors.

    Attributes:
        name: for the log.
        values: [d] eigenvalues of Q^T A Q, ascending; those that rounding pushed below 0 are 0.
        least: the smallest of them as it was found.
        targets: [d, k] components of B by eigenvector of Q^T A Q.
        iterations: products with A so far; 0 for a direct method.
    """

    name: str
    values: Array
    least: float
    targets: Array
    iterations: int

    def reach(self, filters: list[Filter], tolerance: float) -> None:
        """Work until the residual of every filter is within the tolerance, or at a limit."""

    def expand(self, components: Array) -> Array:
        """[d, c] by eigenvector of Q^T A Q -> [m, c]."""

    def applied(self, components: Array) -> Array:
        """A times what `expand` gives."""

    def outside(self, components: Array) -> Array:
        """The part of that outside of the basis, in orthonormal coordinates [e, c]."""


def residual(solver: Solver, flow: Filter) -> tuple[float, float]:
    """How far phi(A) B is from obeying its differential equation, and what rounding adds.

    Both relative to the norm of B: of (B - (A + r) x - dx/dt), which at t = infinity is the
    residual of the linear system. Up to the rounding it bounds the error of A x, component by
    component of A's eigenvectors.
    """
    components = flow(solver.values)[:, None] * solver.targets
    if not np.isfinite(components).all():  # t is infinite, and an eigenvalue is 0
        return np.inf, np.inf
    norm = float(np.linalg.norm(solver.targets)) or 1.0
    rounding = EPS * float(solver.values[-1] + flow.ridge) * float(np.linalg.norm(components))
    return float(np.linalg.norm(solver.outside(components))) / norm, rounding / norm


class Eigendecomposition:
    """All eigenvectors of A; see `Solver`."""

    def __init__(self, matrix: Array, targets: Array) -> None:
        """Diagonalize ``matrix`` [m, m], which is overwritten, for ``targets`` [m, k]."""
        self.name = "eigendecomposition"
        self.iterations = 0
        # Threads would only wait for each other over a small matrix.
        with one_blas_thread() if len(matrix) <= SMALL else contextlib.nullcontext():
            values, self._vectors = scipy.linalg.eigh(
                matrix, driver="evd", overwrite_a=True, check_finite=False
            )
        self.least = float(values[0])
        self.values = np.maximum(values, 0)
        self.targets = self._vectors.T @ targets

    def reach(self, filters: list[Filter], tolerance: float) -> None:
        """Nothing is left to do: every function is exact to rounding."""

    def expand(self, components: Array) -> Array:
        """[m, c] by eigenvector -> [m, c]."""
        return self._vectors @ components

    def applied(self, components: Array) -> Array:
        """A times what `expand` gives."""
        return self._vectors @ (self.values[:, None] * components)

    def outside(self, components: Array) -> Array:
        """Nothing lies outside."""
        return np.zeros((0, components.shape[1]))


class Krylov:
    """A on the Krylov space of the targets, grown until the functions asked for are right.

    See `Solver`. Memory: 8 m bytes a vector, as many vectors an iteration as there are targets, or
    `BLOCK`. Nothing of it depends on the order of the rows but its rounding, and the random vectors
    by which few targets are filled up.

    Of several processes each has its rows of the basis (`dnntk.runtime.processes.Rows`), and all
    have the small matrices: what they need of each other's rows are inner products.
    """

    def __init__(
        self,
        product: Callable[[Array], Array],
        targets: Array,
        *,
        most: int,
        progress: bool,
        folder: Path | None = None,
    ) -> None:
        """Start a basis with the span of the targets.

        Args:
            product: [m, b] -> A times it; of several processes, own rows to own rows.
            targets: [m, k], all of them.
            most: iterations at most.
            progress: show a bar once it has taken five seconds.
            folder: where every iteration is kept, and found by a later process; of this product
                and these targets only.
        """
        self.name = "block Krylov"
        self.iterations = 0
        self._product, self._most, self._progress = product, most, progress
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        m, k = targets.shape
        filling = np.random.default_rng(0).normal(size=(m, max(min(BLOCK, m) - k, 0)))
        filling *= np.linalg.norm(targets) / np.sqrt(m * max(k, 1)) or 1.0
        self._rows = rows = processes.Rows(m)
        own = rows.local(np.concatenate([targets, filling], 1))
        self._basis = _Vectors(len(own))
        self._new, _ = _orthonormal(own, 0.0, m)
        self._first = processes.all_reduce(self._new.T @ own[:, :k])
        self._small = np.zeros((0, 0))  # Q^T A Q, block tridiagonal
        self._below = np.zeros((self._new.shape[1], 0))  # what A moves from the basis to _new
        self._vectors = np.zeros((0, 0))  # of _small, once it was diagonalized
        self._scale = 0.0

    @property
    def _exhausted(self) -> bool:
        return self._new.shape[1] == 0

    def reach(self, filters: list[Filter], tolerance: float) -> None:
        """Grow the basis until every filter's residual is within the tolerance, or at the limit."""
        bar = progress_bar(
            desc="solve",
            unit="iteration",
            initial=self.iterations,
            delay=PROGRESS_DELAY,
            disable=not self._progress,
        )
        look = max(FIRST_LOOK if filters else ENOUGH_FOR_THE_LARGEST, self.iterations)
        with bar:
            while True:
                ended = self._exhausted or self.iterations >= self._most
                if self.iterations >= look or ended:
                    if len(self._vectors) < len(self._small):
                        self._diagonalize()
                    found = [residual(self, each) for each in filters]
                    worst = max((defect for defect, _ in found), default=0.0)
                    bar.set_postfix(residual=f"{worst:.1e}", refresh=False)
                    if ended or all(d <= max(tolerance, rounding) for d, rounding in found):
                        return
                    look = max(self.iterations + 1, int(self.iterations * LOOK_AGAIN))
                self._grow()
                bar.update()

    def expand(self, components: Array) -> Array:
        """[d, c] by eigenvector of Q^T A Q -> [m, c]."""
        with one_blas_thread():
            return self._rows.all_gather(self._basis.combine(self._vectors @ components))

    def applied(self, components: Array) -> Array:
        """A times what `expand` gives, without another product."""
        with one_blas_thread():
            inside = self._basis.combine(self._vectors @ (self.values[:, None] * components))
            return self._rows.all_gather(inside + self._new @ self.outside(components))

    def outside(self, components: Array) -> Array:
        """What A moves out of the basis, in coordinates of the next block."""
        last = self._below.shape[1]
        return self._below @ (self._vectors[len(self._vectors) - last :] @ components)

    def _grow(self) -> None:
        """One product with A, and the next block orthogonal to all before."""
        saved = self._saved()
        # Of several processes one may have been killed before it wrote what another has.
        if processes.any_process(saved is None) or saved is None:
            with one_blas_thread():  # see `dnntk.runtime.threads`
                saved = self._iterated()
        corner, new, below = saved
        size, width, last = len(self._small), len(corner), self._below.shape[1]
        small = np.zeros((size + width, size + width))
        small[:size, :size] = self._small
        small[size:, size - last : size] = self._below
        small[size - last : size, size:] = self._below.T
        small[size:, size:] = corner
        self._basis.append(self._new)
        self._small, self._new, self._below = small, new, below
        self.iterations += 1

    def _iterated(self) -> tuple[Array, Array, Array]:
        """Block on the diagonal of Q^T A Q, next block of the basis, block below the diagonal."""
        new = self._product(self._new)
        corner = processes.all_reduce(self._new.T @ new)
        self._scale = max(self._scale, float(np.linalg.norm(corner, 2)))
        room = self._rows.total - len(self._small) - len(corner)
        self._remove_all_from(new)
        new, below = _orthonormal(new, 8 * EPS * self._scale, room)
        # What was left may have been little more than rounding, which is not orthogonal.
        self._remove_all_from(new)
        new, change = _orthonormal(new, 0.0, room)
        step = (corner + corner.T) / 2, new, change @ below
        if self._folder is not None:
            file = self._file()
            partial = file.with_suffix(".partial")
            with partial.open("wb") as out:
                np.savez(out, corner=step[0], new=step[1], below=step[2])
            partial.replace(file)
        return step

    def _remove_all_from(self, new: Array) -> None:
        new -= self._new @ processes.all_reduce(self._new.T @ new)
        self._basis.remove_from(new)

    def _file(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self.iterations:05d}.npz"

    def _saved(self) -> tuple[Array, Array, Array] | None:
        """The step that an earlier process has taken, if it is there and whole."""
        if self._folder is None or not self._file().exists():
            return None
        try:
            with self._file().open("rb") as file, np.load(file, allow_pickle=False) as held:
                step = tuple(held[name] for name in ("corner", "new", "below"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        width = self._new.shape[1]
        shapes = (width, width), (len(self._new), step[1].shape[-1]), (step[1].shape[-1], width)
        if tuple(a.shape for a in step) != shapes or any(a.dtype != np.float64 for a in step):
            return None
        self._scale = max(self._scale, float(np.linalg.norm(step[0], 2)))
        return step[0], step[1], step[2]

    def _diagonalize(self) -> None:
        values, self._vectors = scipy.linalg.eigh(self._small, driver="evd", check_finite=False)
        self.least = float(values[0])
        self.values = np.maximum(values, 0)
        self.targets = self._vectors[: len(self._first)].T @ self._first


class _Vectors:
    """Orthonormal columns [m, d] in chunks, d growing; of several processes, own rows of them."""

    def __init__(self, m: int) -> None:
        self._m, self._count = m, 0
        self._chunks: list[Array] = []

    def append(self, block: Array) -> None:
        """Add columns [m, b]."""
        while block.shape[1]:
            column = self._count % CHUNK
            if column == 0:
                self._chunks.append(np.empty((self._m, CHUNK), order="F"))
            taken = min(CHUNK - column, block.shape[1])
            self._chunks[-1][:, column : column + taken] = block[:, :taken]
            self._count += taken
            block = block[:, taken:]

    def remove_from(self, new: Array) -> None:
        """Subtract from columns [m, b], in place, their projections on these."""
        if self._count:
            inside = lambda rows: [columns[rows].T @ new[rows] for columns in self._filled()]  # noqa: E731
            parts = [np.concatenate(part) for part in by_rows(self._m, inside)]
            new -= self.combine(processes.all_reduce(np.sum(parts, axis=0)))

    def combine(self, coordinates: Array) -> Array:
        """[d, c] -> [m, c]."""
        result = np.zeros((self._m, coordinates.shape[1]))

        def add(rows: slice) -> None:
            for number, columns in enumerate(self._filled()):
                result[rows] += columns[rows] @ coordinates[number * CHUNK :][: columns.shape[1]]

        by_rows(self._m, add)
        return result

    def _filled(self) -> list[Array]:
        return [c[:, : self._count - i * CHUNK] for i, c in enumerate(self._chunks)]


def _orthonormal(block: Array, least: float, most: int) -> tuple[Array, Array]:
    """(q [m, r], coordinates [r, b]) of the columns; directions shorter than ``least`` are left.

    Of several processes, own rows to own rows: each makes its own orthonormal, and all the same of
    what is left of everyone's (Demmel, Grigori, Hoemmen & Langou, 2012).
    """
    with one_blas_thread():  # a few columns: threads would only wait for each other
        own, whole = _shared_triangles(block) if processes.is_multiprocess() else (None, block)
        q, triangle, order = scipy.linalg.qr(
            whole, mode="economic", pivoting=True, check_finite=False
        )
        if own is not None:
            q = own @ q[processes.index() * block.shape[1] :][: own.shape[1]]
    lengths = np.abs(np.diag(triangle))
    floor = max(least, 8 * EPS * float(lengths[0])) if len(lengths) else 0.0
    rank = min(int(np.sum(lengths > floor)), most)
    coordinates = np.empty((rank, block.shape[1]))
    coordinates[:, order] = triangle[:rank]
    return np.ascontiguousarray(q[:, :rank]), coordinates


def _shared_triangles(block: Array) -> tuple[Array, Array]:
    """Orthonormal columns of own rows, and what is left of all processes', one under the other."""
    width = block.shape[1]
    if len(block):
        q, triangle = scipy.linalg.qr(block, mode="economic", check_finite=False)
    else:
        q, triangle = np.zeros((0, 0)), np.zeros((0, width))
    padded = np.zeros((width, width))
    padded[: len(triangle)] = triangle
    return q, processes.Rows(width * processes.count()).all_gather(padded)
