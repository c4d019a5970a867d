"""The cost of kernel gradient flow before it runs: memory, arithmetic, traffic, seconds.

`Workload` describes the loops of `dnntk.KernelFlow`, `Rates` what a process does in a second, and
`cost` combines the two. The rates are measured (`dnntk.infinite_depth.forecast`) or those of a
machine that is not at hand (``scripts/plan_gram.py``).
"""

import dataclasses
import math
from collections.abc import Iterator

from dnntk.infinite_depth.cross_kernel import balanced, padded_rows
from dnntk.infinite_depth.solvers import BLOCK, CHECK_GROWTH, FIRST_CHECK

__all__ = ["Cost", "Rates", "Workload", "cost"]

# Of one cosine, by bytes of its type: Horner's rule of degree 16 or 6, and what is around it.
EVEN_OPERATIONS = {8: 42, 4: 22}
WORKING_BLOCKS = 8  # blocks of own rows that an iteration holds at once, beside the basis
EXCHANGED_BLOCKS = 6  # blocks of all rows, where several processes exchange them
BASIS_PASSES = 4  # of an iteration over the basis: two projections, coordinates and removal
EIGH_MATRICES = 3  # of m x m: the eigenvectors in place of the matrix, and LAPACK's workspace


@dataclasses.dataclass(frozen=True)
class Workload:
    """A flow of `dnntk.kernel.limit_ntk`, and the predictions asked of it.

    Attributes:
        examples: n, training examples.
        shape: of one example, (d,) for the MLP or (H, W, c) for the CNN.
        d_out: output dimension.
        tests: points to predict at.
        times: kernel times reported at these points and at the training examples.
        iterations: of the Krylov method; 0 is an eigendecomposition.
        kernel_size: side of the CNN's filters.
        block_size: examples along a tile's side.
        itemsize: bytes of a number of the type in which the kernel is evaluated.
        processes: number of processes that share the tiles.
        stored: are the tiles kept, or evaluated for every product?
        folder: are tiles and iterations kept in files?
    """

    examples: int
    shape: tuple[int, ...]
    d_out: int
    tests: int
    times: int
    iterations: int
    kernel_size: int = 3
    block_size: int = 1024
    itemsize: int = 8
    processes: int = 1
    stored: bool = True
    folder: bool = False

    @property
    def columns(self) -> int:
        """Vectors in a block of the Krylov method."""
        return max(self.d_out, BLOCK)

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        return balanced(self.examples, self.block_size)[0][1]

    @property
    def tiles(self) -> int:
        """Tiles of the process that has the most."""
        side = len(balanced(self.examples, self.block_size))
        return -(-side * (side + 1) // 2 // self.processes)

    @property
    def tile_entries(self) -> int:
        """Evaluated entries of a tile, with the padding."""
        return padded_rows(self.tile_rows) ** 2

    @property
    def tile_bytes(self) -> float:
        """Bytes of a process's tiles, stored or not."""
        return 4.0 * self.examples * (self.examples + self.tile_rows) / self.processes

    @property
    def example_size(self) -> int:
        """Numbers in an example."""
        return math.prod(self.shape)

    @property
    def entry_operations(self) -> float:
        """Floating-point operations of one kernel entry; a square root counts as one."""
        even = EVEN_OPERATIONS[self.itemsize]
        if len(self.shape) == 1:
            return 2 * self.shape[0] + even + 10
        height, width, channels = self.shape
        window = self.kernel_size**2
        linear = window * channels * (1 + window)
        return (height * width) ** 2 * (2 * (window * channels + 1) + even + 3) + 2 * linear


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one process does in a second.

    Attributes:
        entries: kernel entries, evaluated and put into a tile, by all of its devices.
        recomputed: kernel entries, evaluated and multiplied.
        product: bytes of stored tiles, in a product with a block of vectors.
        basis: bytes of the Krylov basis, in products with a block of vectors.
        columns: rows times vectors of a block, made orthonormal.
        eigh: rows cubed of a matrix that is diagonalized.
        matrix: floating-point operations of a matrix product.
        network: bytes received from the other processes.
        disk: bytes written to a file.
        read: bytes read from a file.
        host: bytes of tiles that the devices send and the host stores.
        tile_seconds: seconds to start the evaluation of a tile.
        compiling: seconds of compilation, once.
    """

    entries: float
    recomputed: float
    product: float
    basis: float
    columns: float
    eigh: float
    matrix: float
    network: float = math.inf
    disk: float = math.inf
    read: float = math.inf
    host: float = math.inf
    tile_seconds: float = 0.0
    compiling: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost for each process.

    Attributes:
        memory: bytes by content.
        operations: floating-point operations by purpose.
        traffic: bytes received from other processes.
        disk: bytes in files.
        seconds: by stage: kernel, product, network, basis, eigenvectors, prediction.
    """

    memory: dict[str, float]
    operations: dict[str, float]
    traffic: float
    disk: float
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        """Seconds of all stages, one after the other."""
        return sum(self.seconds.values())

    @property
    def total_memory(self) -> float:
        """Bytes of everything together."""
        return sum(self.memory.values())


def cost(workload: Workload, rates: Rates) -> Cost:
    """Memory, arithmetic, traffic and time of a process.

    The processes divide tiles, rows of the Krylov basis, and points to predict at. Each of them
    does a whole eigendecomposition.
    """
    p, n, columns = workload, workload.examples, workload.columns
    vectors = 8.0 * n * columns  # bytes of a block
    iterations, others = p.iterations, 1 - 1 / p.processes
    rows = n / p.processes if iterations else float(n)  # of the basis, in a process
    own = 8.0 * rows * columns  # bytes of the process's rows of a block
    size = iterations * columns if iterations else n  # vectors in the basis
    entries = float(p.tiles * p.tile_entries)
    sweeps = 1 if p.stored else iterations + (iterations == 0)
    kernel = max(
        entries / (rates.entries if p.stored else rates.recomputed),
        p.tiles * rates.tile_seconds + (p.tile_bytes / rates.host if p.stored else 0.0),
    )
    sizes = [columns * check for check in _checks(iterations)] if iterations else [n]
    over_basis = BASIS_PASSES * own * iterations * (iterations - 1) / 2
    answers = 2 * p.times * 8.0 * rows * size  # at the training examples, and the coefficients
    columns = p.times * p.d_out
    new = float(-(-p.tests // p.processes)) * n
    product = p.tile_bytes / (rates.read if p.folder else rates.product) if p.stored else 0.0
    sent = 2 * iterations * vectors + 8.0 * columns * (2 * n * (iterations > 0) + p.tests)
    traffic = others * (sent + (0 if iterations else p.processes * 8.0 * n * n))
    disk = (p.tile_bytes * p.stored + iterations * own) if p.folder else 0.0
    return Cost(
        memory={
            "inputs": 8.0 * p.example_size * (2 * n + p.tests),
            "tiles": p.tile_bytes if p.stored and not p.folder else 0.0,
            "basis": own * iterations if iterations else EIGH_MATRICES * 8.0 * n * n,
            "vectors": own * WORKING_BLOCKS + vectors * EXCHANGED_BLOCKS * (p.processes > 1),
            "outputs": 8.0 * columns * (3 * n + 2 * p.tests),
        },
        operations={
            "kernel": p.entry_operations * (sweeps * entries + new),
            "product": 4.0 * p.tile_bytes / 8 * columns * iterations,
            "basis": over_basis / 4 * columns,
            "prediction": 2.0 * new * columns + answers / 4 * p.d_out,
        },
        traffic=traffic,
        disk=disk,
        seconds={
            "kernel": rates.compiling + sweeps * kernel,
            "product": iterations * product,
            "network": traffic / rates.network,
            "basis": over_basis / rates.basis + iterations * rows * columns / rates.columns,
            "eigenvectors": sum(float(d) ** 3 for d in sizes) / rates.eigh,
            "prediction": new / rates.entries
            + 2 * new * columns / rates.matrix
            + answers / rates.basis,
            "disk": disk / rates.disk,
        },
    )


def _checks(iterations: int) -> Iterator[int]:
    """The iterations at which `dnntk.infinite_depth.solvers.Krylov` checks its residual."""
    check = FIRST_CHECK
    while check < iterations:
        yield check
        check = max(check + 1, int(check * CHECK_GROWTH))
    yield iterations
