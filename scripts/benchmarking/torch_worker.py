"""A worker of benchmark.py: the plain PyTorch loop over layers, as a competent user writes it.

``PyTorch loop`` keeps images in PyTorch's default layout, ``PyTorch loop, channels_last`` in the
layout that PyTorch's documentation recommends for speed. The worker starts from the literal
matrices that `comparison` wrote, and needs PyTorch and NumPy only.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarking import worker


class Network(nn.Module):
    """A list of layers, a ReLU between two, the mean over the image at the end."""

    def __init__(self, layers: list[nn.Module], images: bool) -> None:
        """``layers`` from the first to the last."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.images = images

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs [n, d_in] or [n, c, H, W] to outputs [n, d_out]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.relu(layer(x))
        x = last(x)
        return x.mean((2, 3)) if self.images else x


class Loop:
    """Training steps of plain SGD on 1/2 E ||f - y||^2."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Read the network and its data from ``job``'s folder."""
        self.device = torch.device("cuda" if job["platform"] == "gpu" else "cpu")
        folder, images = Path(job["folder"]), job["arch"] == "cnn"
        self.x = torch.from_numpy(np.load(folder / "x.npy")).to(self.device)
        self.y = torch.from_numpy(np.load(folder / "y.npy")).to(self.device)
        layers = [_layer(kernel, bias) for kernel, bias in _matrices(folder)]
        self.network = Network(layers, images).to(self.device)
        if images:
            last = job["worker"].endswith("channels_last")
            layout = torch.channels_last if last else torch.contiguous_format
            self.network = self.network.to(memory_format=layout)
            # Not `contiguous`: with one channel it keeps strides that PyTorch takes for the other
            # layout, and all layers would then use the other layout.
            self.x = self.x.permute(0, 3, 1, 2).clone(memory_format=layout)
        self.optimizer = torch.optim.SGD(self.network.parameters(), job["literal_rate"])
        held = sum(p.numel() * p.element_size() for p in self.network.parameters())
        self.facts = {
            "gradient_bytes": held,
            "version": torch.__version__,
            "torch_threads": torch.get_num_threads(),
        }

    def take(self, steps: int) -> float:
        """Take training steps; return the loss before the last one."""
        value = math.nan
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = 0.5 * ((self.network(self.x) - self.y) ** 2).sum(1).mean()
            loss.backward()
            self.optimizer.step()
            value = loss.item()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return value


def _layer(kernel: np.ndarray, bias: np.ndarray) -> nn.Module:
    """A linear or convolutional layer from flax's kernel [in, out] or [q, q, in, out]."""
    weight = torch.from_numpy(kernel)
    layer: nn.Module
    if kernel.ndim == 2:
        layer, weight = nn.Linear(*kernel.shape), weight.T
    else:
        q, _, d_in, d_out = kernel.shape
        layer, weight = nn.Conv2d(d_in, d_out, q, padding=q // 2), weight.permute(3, 2, 0, 1)
    with torch.no_grad():
        layer.weight.copy_(weight)
        assert layer.bias is not None
        layer.bias.copy_(torch.from_numpy(bias))
    return layer


def _matrices(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Kernel and bias of each layer, in order."""
    for name in ("first", "middle", "last"):
        kernel, bias = (folder / f"{name}_{part}.npy" for part in ("kernel", "bias"))
        if name == "middle":
            yield from zip(_slices(kernel), _slices(bias), strict=True)
        else:
            yield np.load(kernel), np.load(bias)


def _slices(file: Path) -> Iterator[np.ndarray]:
    """The arrays along the first axis of a .npy file, read one at a time to save memory."""
    with file.open("rb") as stream:
        np.lib.format.read_magic(stream)
        (count, *shape), _, dtype = np.lib.format.read_array_header_1_0(stream)
        for _ in range(count):
            yield np.fromfile(stream, dtype, math.prod(shape)).reshape(shape)


def _peak() -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return worker.peak_bytes()


if __name__ == "__main__":
    worker.serve(Loop, _peak)
