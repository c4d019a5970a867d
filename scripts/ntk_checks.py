"""The long checks of `dnntk.ntk`: an operator's product over 60,000 images, kernels in factors."""

import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dnntk import ntk
from dnntk.runs.folder import peak_memory_bytes

__all__ = ["CNN", "operator"]


class CNN(nn.Module):
    """An ordinary convolutional network: 962,926 parameters on images of 28 x 28 x 1."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [n, 28, 28, 1] to outputs [n, 10]."""
        for channels in (32, 64):
            x = nn.avg_pool(nn.relu(nn.Conv(channels, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(300)(x.reshape(len(x), -1))))


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
