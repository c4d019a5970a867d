"""The long checks of `dnntk.ntk`: an operator's product over 60,000 images, kernels in factors."""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from benchmarking.measure import check_same, turns

from dnntk import ntk
from dnntk.runs.folder import peak_memory_bytes

__all__ = ["CNN", "MLP", "factors", "operator"]


class CNN(nn.Module):
    """An ordinary convolutional network: 1,025,866 parameters on images of 28 x 28 x 1."""

    channels: tuple[int, ...] = (32, 64)
    width: int = 320

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [n, 28, 28, 1] to outputs [n, 10]."""
        for channels in self.channels:
            x = nn.avg_pool(nn.relu(nn.Conv(channels, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1))))


class MLP(nn.Module):
    """Three dense layers, 1,024 units in those between."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [n, 28, 28, 1] to outputs [n, 10]."""
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(1024)(x))
        return nn.Dense(10)(x)


def factors(folder: Path) -> dict[str, Any]:
    """The full kernel of 200 images, 10 outputs: factors beside `jax.vmap(jax.jacrev(...))`.

    Memory is that of the compiled programs; times are measured in turns, for 20 images by the MLP.
    """
    del folder
    x = np.random.default_rng(0).random((200, 28, 28, 1), dtype=np.float32)
    networks = {"mlp": (MLP(), 20), "cnn": (CNN((16, 32), 128), 200)}
    return {name: _against_jacobian(*network, x) for name, network in networks.items()} | {
        "promised": "5 times faster, or a tenth of the memory"
    }


def _against_jacobian(model: nn.Module, timed: int, x: np.ndarray) -> dict[str, Any]:
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])

    def outputs_of(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, x[None])

    def plain(variables: Any, x: jax.Array) -> Any:
        rows = jax.vmap(jax.jacrev(outputs_of), (None, 0))(variables, x)
        rows = [j.reshape(len(x), 10, -1) for j in jax.tree.leaves(rows)]
        return sum(jnp.einsum("nkp,mlp->nmkl", j, j) for j in rows)

    kernels = {"factors": jax.jit(ntk.empirical_ntk_fn(model)), "jacrev": jax.jit(plain)}
    row: dict[str, Any] = {"parameters": sum(p.size for p in jax.tree.leaves(variables))}
    for name, kernel in kernels.items():
        memory: Any = kernel.lower(variables, x).compile().memory_analysis()
        row[f"{name}_bytes"] = memory.temp_size_in_bytes
    calls = [partial(kernel, variables, x[:timed]) for kernel in kernels.values()]
    found, expected = (call() for call in calls)
    row["difference"] = check_same(found, expected, 1e-4)
    seconds = [statistics.median(each) for each in turns(3, *calls)]
    row |= dict(zip(("factors_seconds", "jacrev_seconds"), seconds, strict=True))
    return row | {"images_timed": timed, "times_faster": seconds[1] / seconds[0]}


def operator(folder: Path) -> dict[str, Any]:
    """A product with the NTK of 60,000 images and a CNN of a million parameters; run it alone."""
    del folder
    rng = np.random.default_rng(0)
    x = rng.random((60_000, 28, 28, 1), dtype=np.float32)
    model = CNN()
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    product = ntk.operator(model, variables, x)
    v = rng.standard_normal(product.shape[0], dtype=np.float32)
    begun, processor = time.perf_counter(), time.process_time()
    energy = float(v @ product.matvec(v))
    return {
        "parameters": sum(p.size for p in jax.tree.leaves(variables)),
        "block_size": product.block_size,
        "seconds": time.perf_counter() - begun,
        "processor_seconds": time.process_time() - processor,
        "energy": energy,
        "peak_memory_bytes": peak_memory_bytes(),
        "promised": "under 3 GB",
    }
