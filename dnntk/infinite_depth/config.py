"""The configuration of a prediction: every choice, its default, and the checks between them."""

import dataclasses
import math
import os
from typing import Any

from dnntk.checks import check_choice, check_deviation
from dnntk.errors import InputError
from dnntk.infinite_depth.kernel_flow import SOLVERS
from dnntk.runs import fields
from dnntk.runs.folder import as_json
from dnntk.training.config import ARCHITECTURES, DTYPES, TrainConfig

__all__ = ["SELECTIONS", "PredictConfig"]

SELECTIONS = ("validation", "loo", "evidence")
DEFAULT_TIMES = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)

# Fields that a run of `dnntk.train` and its prediction must have in common.
DATA_FIELDS = ("arch", "kernel_size", "dataset", "classes", "data_dir", "pool", "offset", "seed")


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """An infinitely deep network on a dataset.

    Attributes:
        arch, kernel_size, dataset, classes, data_dir, pool, offset: as in `TrainConfig`.
        rho, beta: standard deviations of the random weights and biases; of several, the pair is
            taken that ``select`` finds best.
        times: kernel times to report, which may include infinity. The one that ``select`` finds
            best is chosen, if there is anything to choose by. None is the times of the compared
            run's evaluations, or without such a run `DEFAULT_TIMES`.
        ridge: weight decay, in units of the eigenvalues of K/N; a compared run's own, or what
            ``select`` "evidence" chooses.
        select: how rho, beta and the time are chosen. "validation": by the errors on training
            examples that are held out. "loo": by those on each of ``search_examples`` training
            examples, predicted from all the others. "evidence": by the likelihood of these examples
            under a Gaussian process with the kernel, over its scale and the noise, too; the
            prediction is at infinite time with the ridge noise / N. The last two hold no example
            out.
        validation: training examples held out for choices; 0 is a tenth of them if there are
            several values of rho or beta, otherwise none.
        search_examples: training examples, at most, for the choice of rho and beta. By "loo" or
            "evidence" they decide alone, and their Gram matrix is diagonalized: seconds for 4,000,
            some minutes for 10,000.
        train_examples: training examples in all; 0 is all of the dataset's.
        solver, block_size, dtype: as in `KernelFlow`.
        tolerance: relative residual at which the Krylov method stops. Ten times `KernelFlow`'s
            default: every iteration reads the whole Gram matrix, and losses do not need the last
            digits of outputs (on 6,000 MNIST digits, 1e-4 and 1e-9 give the same).
        memory_gb: memory for the Gram matrix and the Krylov basis, in GB; None is 3/4 of the
            machine's.
        gram_dir: folder where the Gram matrix and the Krylov iterations are kept and found again.
        seed: seed of the validation split, of ``train_examples``, and of the digits' test split.

    Raises:
        InputError: a value is not as above.
    """

    arch: str = "mlp"
    kernel_size: int = 3
    dataset: str = "digits"
    classes: tuple[int, ...] | str = (0, 1)
    data_dir: str | os.PathLike[str] | None = None
    pool: int | None = None
    offset: float = 0.0
    rho: tuple[float, ...] = (1.0,)
    beta: tuple[float, ...] = (1.0,)
    times: tuple[float, ...] | None = None
    ridge: float = 0.0
    select: str = "validation"
    validation: int = 0
    search_examples: int = 6000
    train_examples: int = 0
    solver: str = "auto"
    tolerance: float = 1e-5
    block_size: int = 1024
    dtype: str = "float64"
    memory_gb: float | None = None
    gram_dir: str | os.PathLike[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check everything that needs no data."""
        fields.convert(self)
        check_choice("arch", self.arch, ARCHITECTURES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("solver", self.solver, SOLVERS)
        check_choice("select", self.select, SELECTIONS)
        if self.select == "evidence" and self.ridge:
            raise InputError(
                f"ridge: expected 0, as select=evidence chooses it, got {self.ridge}; leave one of "
                "them out"
            )
        if self.select != "validation":
            if self.validation:
                raise InputError(
                    f"validation: expected 0, as select={self.select} holds no example out, got "
                    f"{self.validation}; leave one of them out"
                )
            if self.solver == "krylov":
                raise InputError(
                    f"solver: expected auto or eigh, as select={self.select} needs all "
                    "eigenvectors, got krylov"
                )
        for name in ("rho", "beta"):
            values = getattr(self, name)
            if not values:
                raise InputError(f"{name}: expected one number or more, got none")
            for value in values:
                check_deviation(name, value)
        if self.times is not None and not (self.times and all(t > 0 for t in self.times)):
            raise InputError(f"times: expected numbers above 0, or inf, got {self.times}")
        if not 0 <= self.ridge < math.inf:
            raise InputError(f"ridge: expected a finite number >= 0, got {self.ridge}")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance: expected a number in (0, 1), got {self.tolerance}")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise InputError(f"memory_gb: expected a number above 0, got {self.memory_gb}")
        for name, least in (
            ("validation", 0),
            ("train_examples", 0),
            ("seed", 0),
            ("search_examples", 2),
            ("block_size", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        self.network()  # the network's configuration checks the shared fields

    @property
    def times_or_default(self) -> tuple[float, ...]:
        """The kernel times, or their default without a run to compare with."""
        return DEFAULT_TIMES if self.times is None else self.times

    def network(self) -> TrainConfig:
        """A network on the same data, with the fields that the two configurations share."""
        return TrainConfig(**{name: getattr(self, name) for name in (*DATA_FIELDS, "dtype")})

    def to_json(self) -> dict[str, Any]:
        """Every field as JSON; infinity as text, the default times in place of None."""
        return as_json(dataclasses.asdict(self) | {"times": self.times_or_default})
