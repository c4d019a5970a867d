"""Functions of a large symmetric matrix times a few vectors: many functions, one factorization.

Gradient flow on targets B with the positive semidefinite matrix A and the ridge r has learnt
phi(A) B at time t, where phi(s) = (1 - exp(-t (s + r))) / (s + r), and descent in steps another phi
(`dnntk.infinite_depth.spectral_filter`). Both solvers diagonalize
Q^T A Q, for an orthonormal basis Q of d vectors, and have the same attributes and methods:

`Eigendecomposition`  Q is the whole space. Any time is exact to rounding. For matrices of a few
    thousand rows: time of order m^3, memory 3 m^2.
`Krylov`  Q spans B, AB, A^2 B, ...: block Lanczos with full orthogonalization, for anything larger.
    One product with A an iteration, and memory for the basis. Short times need few iterations,
    t = infinity without a ridge the most. A kernel's few large eigenvalues, its constant part and
    the main directions of the data, cost an iteration each and do not slow down the others.

Block Lanczos: Golub & Underwood (1977). The defect of the differential equation as the residual of
a matrix function: Botchev, Grimm & Hochbruck (2013).
"""

import contextlib
import copy
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from dnntk.infinite_depth.spectral_filter import SpectralFilter
from dnntk.kernel.gram import PROGRESS_DELAY
from dnntk.runtime import processes
from dnntk.runtime.progress import progress_bar
from dnntk.runtime.threads import by_rows, one_blas_thread

__all__ = [
    *("MAX_EIGH_ROWS", "SOLVERS", "Eigendecomposition", "Krylov", "Solver", "filtered"),
    *("diagonal_blocks", "residual", "uses_eigh"),
]

SOLVERS = ("auto", "eigh", "krylov")
MAX_EIGH_ROWS = 4096  # that "auto" diagonalizes as a whole

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
BLOCK = 8  # vectors: a product with fewer takes as long, and more iterations are needed
CHUNK = 128  # vectors of the basis in one array, so that products with them are few
CHECK_GROWTH = 1.2  # convergence is checked whenever the basis has grown by this factor
FIRST_CHECK = 2
SMALL = 512  # rows
PRODUCTS = 1 << 22  # of entries of eigenvectors that are held at a time


def uses_eigh(method: str, rows: int) -> bool:
    """Is a Gram matrix of this size diagonalized as a whole?"""
    return method == "eigh" or (method == "auto" and rows <= MAX_EIGH_ROWS)


def filtered(solver: "Solver", flow: SpectralFilter) -> Array:
    """phi(A) B by eigenvector of Q^T A Q: [d, k]."""
    return flow(solver.values)[:, None] * solver.targets


def residual(solver: "Solver", flow: SpectralFilter) -> tuple[float, float]:
    """The residual of phi(A) B in its differential equation, and a bound of its rounding error.

    Both are relative to the norm of B, or of A x where descent has grown beyond it. The residual is
    B - (A + r) x - dx/dt, at t = infinity that of the linear system. Up to rounding it bounds the
    error of A x in every component by A's eigenvectors. For descent it is the gradient's error at
    the last step; with momentum the error of A x may be a few times larger.
    """
    components = filtered(solver, flow)
    if not np.isfinite(components).all():  # t is infinite, and an eigenvalue is 0
        return np.inf, np.inf
    outputs = solver.values[:, None] * components
    norm = float(max(np.linalg.norm(solver.targets), np.linalg.norm(outputs))) or 1.0
    rounding = EPS * float(solver.values[-1] + flow.ridge) * float(np.linalg.norm(components))
    return float(np.linalg.norm(solver.residual_part(components))) / norm, rounding / norm


class Eigendecomposition:
    """All eigenvectors of A.

    Attributes:
        name: for the log.
        values: [d] eigenvalues of Q^T A Q, ascending; those that rounding pushed below 0 are 0.
        smallest_eigenvalue: the first of them before that correction.
        targets: [d, k] components of B by eigenvector of Q^T A Q.
        iterations: products with A so far; 0 for a direct method.
    """

    def __init__(self, matrix: Array, targets: Array) -> None:
        """Diagonalize ``matrix`` [m, m], which is overwritten, for ``targets`` [m, k]."""
        self.name = "eigendecomposition"
        self.iterations = 0
        # Threads would only wait for each other over a small matrix.
        with one_blas_thread() if len(matrix) <= SMALL else contextlib.nullcontext():
            values, self._vectors = scipy.linalg.eigh(
                matrix, driver="evd", overwrite_a=True, check_finite=False
            )
        self.smallest_eigenvalue = float(values[0])
        self.values = np.maximum(values, 0)
        self.targets = self._vectors.T @ targets

    def for_targets(self, targets: Array) -> "Eigendecomposition":
        """The same eigenvectors for other targets."""
        other = copy.copy(self)
        other.targets = self._vectors.T @ targets
        return other

    def diagonal_blocks(self, function: Callable[[Array], Array], size: int = 1) -> Array:
        """The diagonal blocks of some functions of A: [m / size, size, size, c].

        ``function`` maps eigenvalues [d] to the values [d, c] of c functions.
        """
        return diagonal_blocks(self._vectors, function(self.values), size)

    def refine(self, filters: list[SpectralFilter], tolerance: float) -> None:
        """Do nothing: every function is exact to rounding."""

    def from_eigenbasis(self, components: Array) -> Array:
        """[d, c] by eigenvector of Q^T A Q -> [m, c]."""
        return self._vectors @ components

    def apply_matrix(self, components: Array) -> Array:
        """A times ``from_eigenbasis(components)``."""
        return self._vectors @ (self.values[:, None] * components)

    def residual_part(self, components: Array) -> Array:
        """The part of ``apply_matrix(components)`` outside of the basis: [0, c], it is empty."""
        return np.zeros((0, components.shape[1]))


class Krylov:
    """A on the Krylov space of the targets, grown until the residuals are small enough.

    Attributes are those of `Eigendecomposition`. Memory is 8 m bytes a vector; an iteration adds as
    many vectors as there are targets, at least `BLOCK`. Another order of the rows changes only
    rounding errors, and the random vectors that fill up few targets.

    Each of several processes holds its rows of the basis (`dnntk.runtime.processes.Rows`), and all
    of them hold the small matrices: processes exchange inner products only.
    """

    def __init__(
        self,
        product: Callable[[Array], Array],
        targets: Array,
        *,
        max_iterations: int,
        progress: bool,
        folder: Path | None = None,
    ) -> None:
        """Start a basis with the span of the targets.

        Args:
            product: [m, b] -> A times it; with several processes, from own rows to own rows.
            targets: [m, k], all rows.
            max_iterations: most iterations.
            progress: show a bar after five seconds.
            folder: where every iteration is saved, for a later process with the same product and
                targets.
        """
        self.name = "block Krylov"
        self.iterations = 0
        self._product, self._max, self._progress = product, max_iterations, progress
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
        self._below = np.zeros((self._new.shape[1], 0))  # _new^T A Q, of the last block of Q
        self._vectors = np.zeros((0, 0))  # eigenvectors of _small when it was last diagonalized
        self._scale = 0.0

    @property
    def _exhausted(self) -> bool:
        return self._new.shape[1] == 0

    def refine(self, filters: list[SpectralFilter], tolerance: float) -> None:
        """Grow the basis until every filter's residual is within the tolerance, or at the limit.

        Without filters, until the largest eigenvalue's is.
        """
        bar = progress_bar(
            desc="solve",
            unit="iteration",
            initial=self.iterations,
            delay=PROGRESS_DELAY,
            disable=not self._progress,
        )
        check = max(FIRST_CHECK, self.iterations)
        with bar:
            while True:
                ended = self._exhausted or self.iterations >= self._max
                if self.iterations >= check or ended:
                    if len(self._vectors) < len(self._small):
                        self._diagonalize()
                    found = [residual(self, each) for each in filters] or [self._largest()]
                    worst = max(size for size, _ in found)
                    bar.set_postfix(residual=f"{worst:.1e}", refresh=False)
                    if ended or all(size <= max(tolerance, error) for size, error in found):
                        return
                    check = max(self.iterations + 1, int(self.iterations * CHECK_GROWTH))
                self._grow()
                bar.update()

    def from_eigenbasis(self, components: Array) -> Array:
        """[d, c] by eigenvector of Q^T A Q -> [m, c]."""
        with one_blas_thread():
            return self._rows.all_gather(self._basis.combine(self._vectors @ components))

    def apply_matrix(self, components: Array) -> Array:
        """A times ``from_eigenbasis(components)``, without a new product with A."""
        with one_blas_thread():
            inside = self._basis.combine(self._vectors @ (self.values[:, None] * components))
            return self._rows.all_gather(inside + self._new @ self.residual_part(components))

    def residual_part(self, components: Array) -> Array:
        """The part of ``apply_matrix(components)`` outside of the basis, by next block: [e, c]."""
        last = self._below.shape[1]
        return self._below @ (self._vectors[len(self._vectors) - last :] @ components)

    def _largest(self) -> tuple[float, float]:
        """The relative residual of the largest eigenvalue, and its rounding error."""
        unit = np.zeros((len(self.values), 1))
        unit[-1] = 1
        return float(np.linalg.norm(self.residual_part(unit)) / (self.values[-1] or 1.0)), EPS

    def _grow(self) -> None:
        """Add a block to the basis: one product with A, or an iteration from a file."""
        saved = self._saved()
        # A process may have been killed before it wrote an iteration that another one wrote.
        if processes.any_process(saved is None) or saved is None:
            with one_blas_thread():  # see `dnntk.runtime.threads`
                saved = self._iterate()
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

    def _iterate(self) -> tuple[Array, Array, Array]:
        """Block on the diagonal of Q^T A Q, next block of the basis, block below the diagonal."""
        new = self._product(self._new)
        corner = processes.all_reduce(self._new.T @ new)
        self._scale = max(self._scale, float(np.linalg.norm(corner, 2)))
        room = self._rows.total - len(self._small) - len(corner)
        self._remove_all_from(new)
        new, below = _orthonormal(new, 8 * EPS * self._scale, room)
        # The new vectors may be little more than rounding errors, which are not orthogonal.
        self._remove_all_from(new)
        new, change = _orthonormal(new, 0.0, room)
        corner, below = (corner + corner.T) / 2, change @ below
        if self._folder is not None:
            file = self._file()
            partial = file.with_suffix(".partial")
            with partial.open("wb") as out:
                np.savez(out, corner=corner, new=new, below=below)
            partial.replace(file)
        return corner, new, below

    def _remove_all_from(self, new: Array) -> None:
        new -= self._new @ processes.all_reduce(self._new.T @ new)
        self._basis.remove_from(new)

    def _file(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self.iterations:05d}.npz"

    def _saved(self) -> tuple[Array, Array, Array] | None:
        """The iteration that an earlier process saved; None if it is missing or damaged."""
        if self._folder is None or not self._file().exists():
            return None
        try:
            with self._file().open("rb") as file, np.load(file, allow_pickle=False) as held:
                corner, new, below = (held[name] for name in ("corner", "new", "below"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        width, rank = self._new.shape[1], new.shape[-1]
        shapes = (width, width), (len(self._new), rank), (rank, width)
        are_float64 = all(array.dtype == np.float64 for array in (corner, new, below))
        if (corner.shape, new.shape, below.shape) != shapes or not are_float64:
            return None
        self._scale = max(self._scale, float(np.linalg.norm(corner, 2)))
        return corner, new, below

    def _diagonalize(self) -> None:
        values, self._vectors = scipy.linalg.eigh(self._small, driver="evd", check_finite=False)
        self.smallest_eigenvalue = float(values[0])
        self.values = np.maximum(values, 0)
        self.targets = self._vectors[: len(self._first)].T @ self._first


Solver = Eigendecomposition | Krylov


def diagonal_blocks(vectors: Array, values: Array, size: int) -> Array:
    """Diagonal blocks [m / size, size, size, c] of vectors diag(values) vectors^T, m rows."""
    by_block = vectors.reshape(-1, size, vectors.shape[1])
    result = np.empty((len(by_block), size, size, values.shape[1]))
    step = max(1, PRODUCTS // (size**2 * vectors.shape[1] or 1))
    for start in range(0, len(by_block), step):
        part = by_block[start : start + step]
        products = part[:, :, None] * part[:, None]
        result[start : start + step] = products @ values
    return result


class _Vectors:
    """Orthonormal columns [m, d] in chunks, d growing; a process holds its own rows of them."""

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
        """Subtract from columns [m, b], in place, their projections on these vectors."""
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
    """(q [m, r], coordinates [r, b]) of the columns, without directions shorter than ``least``.

    With several processes, from own rows to own rows: each factors its own rows, and all of them
    factor the triangles of all (Demmel, Grigori, Hoemmen & Langou, 2012). At most ``most`` columns.
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
    """Own rows' orthonormal columns, and the triangles of all processes, one under the other."""
    width = block.shape[1]
    if len(block):
        q, triangle = scipy.linalg.qr(block, mode="economic", check_finite=False)
    else:
        q, triangle = np.zeros((0, 0)), np.zeros((0, width))
    padded = np.zeros((width, width))
    padded[: len(triangle)] = triangle
    return q, processes.Rows(width * processes.count()).all_gather(padded)
