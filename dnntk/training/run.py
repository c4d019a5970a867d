"""`dnntk.train`: train one network on one dataset, and save all that describes the run.

`train` is what ``scripts/train.py`` calls; in a notebook it does the same, with or without a
workdir. Data flows one way: configuration, data, network, step size, gradient flow, results.
"""

import os
from typing import Any

import jax

from dnntk.checks import brief
from dnntk.data.datasets import Dataset, load_dataset
from dnntk.data.own_data import check_same, own_dataset, record
from dnntk.errors import Diverged, InputError
from dnntk.runs.folder import DIVERGED, RunFolder
from dnntk.runs.locks import freeing_folders
from dnntk.runtime import processes
from dnntk.runtime.log_lines import printed_lines
from dnntk.training.config import TrainConfig
from dnntk.training.kernel_run import KernelRun
from dnntk.training.trainer import Run, TrainResult

__all__ = ["check_compiles", "load_dataset_for", "train", "train_on"]


@freeing_folders()
def train(
    config: TrainConfig | None = None,
    workdir: str | os.PathLike[str] | None = None,
    *,
    dataset: Dataset | None = None,
    resume: bool = False,
    progress: bool = True,
    verbose: bool | None = None,
) -> TrainResult:
    """Train a deep narrow network.

    Args:
        config: the run; None is the default one (1000 layers, digits 0 and 1).
        workdir: folder for configuration, metrics, checkpoints, summary and figures; None writes
            nothing.
        dataset: examples of your own, instead of those that ``config`` names; of any kind that
            `dnntk.data.own_data.own_dataset` takes.
        resume: continue from the last good checkpoint in ``workdir``, with exactly the numbers of
            an uninterrupted run (on the same machine and devices); start if there is no run yet.
        progress: show a progress bar.
        verbose: print the lines on network, data, step and result, unless a logging handler takes
            them; None is as ``progress``.

    Returns:
        The trained variables, the history and the summary. No global setting of JAX changes.

    Raises:
        InputError: the configuration, the data or the workdir cannot be used; the message says why.
        Diverged: the loss became NaN or grew without bound; the last good checkpoint is kept.
        Stopped: SIGTERM came; the current step was finished and a checkpoint written.
        Interrupted: Ctrl-C was pressed; likewise. A second Ctrl-C interrupts at once.
    """
    config = _checked(config)
    own = None if dataset is None else own_dataset(dataset, config)
    recorded = {} if own is None else record(own)
    with printed_lines(processes.is_primary() and (progress if verbose is None else verbose)):
        return _trained(config, own, recorded, workdir, resume, progress)


@freeing_folders()
def train_on(
    config: TrainConfig,
    dataset: Dataset,
    workdir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """`train` on a dataset that `load_dataset_for` loaded for ``config``, or on a part of it."""
    return _trained(_checked(config), dataset, {}, workdir, resume, progress)


def _checked(config: TrainConfig | None) -> TrainConfig:
    if not isinstance(config, TrainConfig | None):
        raise InputError(f"config: expected a dnntk.TrainConfig, got {brief(config)}")
    check_compiles()
    return config or TrainConfig()


def check_compiles() -> None:
    """Refuse JAX_DISABLE_JIT, in which no program can be compiled."""
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise InputError(
            "JAX_DISABLE_JIT: expected it off, as training compiles its steps, got it on; unset "
            "it, or jax.config.update('jax_disable_jit', False)"
        )


def _trained(
    config: TrainConfig,
    dataset: Dataset | None,
    recorded: dict[str, Any],
    workdir: str | os.PathLike[str] | None,
    resume: bool,
    progress: bool,
) -> TrainResult:
    """``recorded`` are the entries of config.json on the user's own data."""
    if resume and workdir is None:
        raise InputError("resume: expected a workdir to go on in, got none; give workdir")
    with jax.enable_x64(config.dtype == "float64"):
        folder = None if workdir is None else RunFolder(workdir)
        resume = folder is not None and _claimed(folder, config, recorded, resume)
        data = load_dataset_for(config) if dataset is None else dataset
        try:
            kind = KernelRun if config.optimizer == "kernel" else Run
            return kind(config, data, recorded, folder, resume, progress).result()
        except Diverged as diverged:
            if folder is not None:
                folder.write_json(DIVERGED, {"message": str(diverged)})
            raise


def _claimed(
    folder: RunFolder, config: TrainConfig, recorded: dict[str, Any], resume: bool
) -> bool:
    """Claim the folder; returns whether it has a run to continue."""
    if resume and not folder.vacant:
        saved = folder.read_config()
        check_same(saved, recorded, folder.path, "resume")
        if "own" in saved:
            saved = saved | {"dataset": TrainConfig.dataset, "classes": TrainConfig.classes}
        TrainConfig.from_json({name: saved[name] for name in saved if name != "own"})
    data = {name: value for name, value in recorded.items() if name != "own"}
    free = config.resumable
    if config.optimizer == "kernel" and not any((folder.path / "checkpoints").glob("[0-9]*")):
        free += ("time", "ridge")  # a refused time is mended in the same folder: its kernel stands
    return folder.claim(config.to_json() | data, resume, free=free)


def load_dataset_for(config: TrainConfig) -> Dataset:
    """The dataset that ``config`` names."""
    return load_dataset(
        config.dataset,
        classes=config.classes,
        data_dir=config.data_dir,
        pool=config.pool_or_default,
        seed=config.seed,
        keep_unpooled=config.shift > 0,
        offset=config.offset,
    )
