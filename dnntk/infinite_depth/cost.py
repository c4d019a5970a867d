"""What kernel gradient flow costs before it is computed: memory, arithmetic, traffic, seconds.

`Problem` says what `dnntk.KernelFlow` would do, `Rates` what a process does in a second, and `cost`
puts the two together, loop by loop as `dnntk.infinite_depth.gram_matrix` and
`dnntk.infinite_depth.solvers` go through them. The rates
are measured (`dnntk.infinite_depth.forecast`) or those of a machine that is not at hand
(``scripts/plan_gram.py``).
"""

import dataclasses
import math
from collections.abc import Iterator

from dnntk.infinite_depth.cross_kernel import balanced, padded_rows
from dnntk.infinite_depth.solvers import BLOCK, CHECK_GROWTH, FIRST_CHECK

# Of one cosine in float64 and in float32: Horner's rule of degree 16 and 6, and what is around it.
EVEN_OPERATIONS = {8: 42, 4: 22}
VECTORS_AT_WORK = 8  # blocks of own rows that an iteration holds at once, beside the basis
VECTORS_ON_THE_WAY = 6  # blocks of all rows, where several processes exchange them
WAYS_OVER_THE_BASIS = 4  # an iteration reads it so often: two projections, coordinates and removal
EIGH_MATRICES = 3  # of m x m: the eigenvectors in place of the matrix, and LAPACK's workspace


@dataclasses.dataclass(frozen=True)
class Problem:
    """A flow of `dnntk.kernel.limit_ntk`, and what is asked of it.

    Attributes:
        examples: n, training examples.
        shape: of one example, (d,) for the MLP or (H, W, c) for the CNN.
        outputs: d_out.
        tests: points to predict at.
        times: how many times are reported there and at the training examples.
        iterations: of the Krylov method; 0 is an eigendecomposition.
        kernel_size: side of the CNN's filters.
        block_size: examples along a tile's side.
        itemsize: bytes of a number in which the kernel is evaluated.
        processes: how many share the tiles.
        stored: are the tiles kept, or computed for every product?
        folder: are they and the iterations kept in files?
    """

    examples: int
    shape: tuple[int, ...]
    outputs: int
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
        return max(self.outputs, BLOCK)

    @property
    def tiles(self) -> int:
        """Of the process that has the most."""
        side = len(balanced(self.examples, self.block_size))
        return -(-side * (side + 1) // 2 // self.processes)

    @property
    def tile_entries(self) -> int:
        """Of one, padded as it is computed."""
        start, stop = balanced(self.examples, self.block_size)[0]
        return padded_rows(stop - start) ** 2

    @property
    def tile_bytes(self) -> float:
        """Of a process's tiles, whether they are kept or not."""
        start, stop = balanced(self.examples, self.block_size)[0]
        return 4.0 * self.examples * (self.examples + stop - start) / self.processes

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
        entries: kernel entries, computed and put into a tile, by all of its devices.
        recomputed: kernel entries, computed and multiplied.
        product: bytes of stored tiles, in a product with a block of vectors.
        basis: bytes of the Krylov basis, in products with a block of vectors.
        columns: rows times vectors of a block, made orthonormal.
        eigh: rows cubed of a matrix that is diagonalized.
        matrix: floating-point operations of a matrix product.
        network: bytes received from the other processes.
        disk: bytes written.
        read: bytes read from a file.
        host: bytes of tiles that come from the devices and are stored.
        tile_seconds: of a tile, before its device has begun.
        compiling: seconds, once.
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
    """What each process needs.

    Attributes:
        memory: bytes by what they hold.
        operations: floating-point operations by what they are for.
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
        """Of all stages, one after the other."""
        return sum(self.seconds.values())

    @property
    def total_memory(self) -> float:
        """Bytes, as though all were there at once."""
        return sum(self.memory.values())


def cost(problem: Problem, rates: Rates) -> Cost:
    """Memory, arithmetic, traffic and time of a process.

    Processes share tiles, rows of the Krylov basis and points to predict at. An eigendecomposition
    is everyone's.
    """
    p, n, columns = problem, problem.examples, problem.columns
    vectors = 8.0 * n * columns  # bytes of a block
    steps, others = p.iterations, 1 - 1 / p.processes
    rows = n / p.processes if steps else float(n)  # of the basis, in a process
    own = 8.0 * rows * columns  # bytes of a block there
    size = steps * columns if steps else n  # vectors in the basis
    entries = float(p.tiles * p.tile_entries)
    sweeps = 1 if p.stored else steps + (steps == 0)
    kernel = max(
        entries / (rates.entries if p.stored else rates.recomputed),
        p.tiles * rates.tile_seconds + (p.tile_bytes / rates.host if p.stored else 0.0),
    )
    looks = [columns * look for look in _looks(steps)] if steps else [n]
    over_basis = WAYS_OVER_THE_BASIS * own * steps * (steps - 1) / 2
    answers = 2 * p.times * 8.0 * rows * size  # at the training examples, and the coefficients
    outputs = p.times * p.outputs
    new = float(-(-p.tests // p.processes)) * n
    product = p.tile_bytes / (rates.read if p.folder else rates.product) if p.stored else 0.0
    sent = 2 * steps * vectors + 8.0 * outputs * (2 * n * (steps > 0) + p.tests)
    traffic = others * (sent + (0 if steps else p.processes * 8.0 * n * n))
    disk = (p.tile_bytes * p.stored + steps * own) if p.folder else 0.0
    return Cost(
        memory={
            "inputs": 8.0 * p.example_size * (2 * n + p.tests),
            "tiles": p.tile_bytes if p.stored and not p.folder else 0.0,
            "basis": own * steps if steps else EIGH_MATRICES * 8.0 * n * n,
            "vectors": own * VECTORS_AT_WORK + vectors * VECTORS_ON_THE_WAY * (p.processes > 1),
            "outputs": 8.0 * outputs * (3 * n + 2 * p.tests),
        },
        operations={
            "kernel": p.entry_operations * (sweeps * entries + new),
            "product": 4.0 * p.tile_bytes / 8 * columns * steps,
            "basis": over_basis / 4 * columns,
            "prediction": 2.0 * new * outputs + answers / 4 * p.outputs,
        },
        traffic=traffic,
        disk=disk,
        seconds={
            "kernel": rates.compiling + sweeps * kernel,
            "product": steps * product,
            "network": traffic / rates.network,
            "basis": over_basis / rates.basis + steps * rows * columns / rates.columns,
            "eigenvectors": sum(float(d) ** 3 for d in looks) / rates.eigh,
            "prediction": new / rates.entries
            + 2 * new * outputs / rates.matrix
            + answers / rates.basis,
            "disk": disk / rates.disk,
        },
    )


def _looks(steps: int) -> Iterator[int]:
    """After how many iterations `dnntk.infinite_depth.solvers.Krylov` looks at its residual."""
    look = FIRST_CHECK
    while look < steps:
        yield look
        look = max(look + 1, int(look * CHECK_GROWTH))
    yield steps
