import gc
import os
import tempfile

# Before numpy is imported. Workers share the cores: BLAS's own threads would mostly spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pictures  # noqa: E402
import processes  # noqa: E402
import pytest  # noqa: E402

processes.take_interrupts()
processes.compile_fast()  # train.py, run as a process of its own, is optimized
import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)
# Many tests compile what another has compiled. The folder is a worker's own, and goes with it.
# What takes less is compiled again sooner than it is packed, written and found.
COMPILED = tempfile.TemporaryDirectory()
processes.cache_without_compressing()
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.04)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Scripts, too, run again and again in processes of their own.
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"


pictures.render_once()


@pytest.fixture(scope="session")
def mnist_folder():
    """The four published MNIST files; a user's machine need not have them."""
    folder = os.environ.get("DNNTK_MNIST")
    if not folder:
        pytest.skip("set DNNTK_MNIST to a folder with MNIST's four raw IDX files to run this")
    return folder


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# A file is one worker's; the longest come first, so that no worker is left with one at the end.
LONGEST = (
    *(
        "models",
        "scripts",
        "empirical",
        "run",
        "processes",
        "ops",
        "pipeline",
        "limit",
        "benchmark",
    ),
    *("readme", "checkpoints", "ntk_convergence", "gradient_flow", "trainability", "cost", "soak"),
)


def pytest_collection_finish():
    """Collect garbage seldom, and never in what was imported: 2 to 5% of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


def pytest_collection_modifyitems(items):
    """Order the files; the tests of each stay in their order."""
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
