"""A deep narrow network written out in numpy, layer by layer.

What JAX's code and the CPU library compute must agree with it. Images are
[n, height, width, channels]; an MLP's inputs are images of one pixel.
"""

import math

import jax
import numpy as np
from networks import drawn

from dnntk import DeepNarrowCNN, DeepNarrowMLP


def tree_map(function, *trees):
    """As `jax.tree.map`, of dictionaries of arrays."""
    if not isinstance(trees[0], dict):
        return function(*trees)
    return {name: tree_map(function, *(tree[name] for tree in trees)) for name in trees[0]}


class Reference:
    """Outputs, gradients and tangents of ``model`` on inputs x."""

    def __init__(self, model, frozen, x, dtype=np.float64):
        """Constants of a layer h' = max(carry h + W q + b, floor) with q = base + column h."""
        self.model, self.d_in, self.dtype = model, x.shape[-1], dtype
        self.x = np.asarray(x if x.ndim == 4 else x[:, None, None], dtype)
        self.initial = tree_map(lambda a: np.asarray(a, dtype), frozen.get("initial", {}))
        self.deviations = model.initialization == "deep_narrow" and bool(self.initial)
        self.base, self.column, self.carry, self.floor, self.start = 0.0, 1.0, 0.0, 0.0, 0.0
        if self.deviations:
            scale, d_out = model.scale, model.d_out
            rest = np.zeros((*self.x.shape[:-1], 1 + d_out), dtype)
            self.base = np.concatenate([np.maximum(self.x, 0), rest], -1)
            self.base[..., -d_out:] = 1
            below = np.where(self.x < 0, self.x, 0) * min(scale, np.finfo(dtype).max)
            self.start = np.concatenate([below, rest], -1)
            self.column = np.array([1 / scale] * self.d_in + [1] + [1 / scale] * d_out, dtype)
            self.carry = np.array([1.0] * self.d_in + [0] + [1] * d_out, dtype)
            self.floor = np.where(self.base > 0, -scale * np.where(self.base > 0, self.base, 1), 0)

    def outputs(self, params):
        """[n, d_out]."""
        return self._states(params)[1]

    def gradient(self, params, cotangent):
        """(f, a tree like ``params``): J^T cotangent(f)."""
        states, f = self._states(params)
        pixels = self.x.shape[1] * self.x.shape[2]
        found = {name: {"kernel": [], "bias": []} for name in ("middle", "last", "first")}

        def below(name, kernel, q, g):
            slope, ratio = self._slope(name, kernel.shape[-1])
            by_kernel, by_q = self._pull(q, kernel, g)
            found[name]["kernel"].insert(0, by_kernel * slope)
            found[name]["bias"].insert(0, g.sum((0, 1, 2)) * slope * ratio)
            return by_q

        g = np.broadcast_to(cotangent(f)[:, None, None] / pixels, (*self.x.shape[:3], f.shape[1]))
        kernel, _ = self._weights("last", params["last"])
        by_state = self.column * below("last", kernel, self._read(states[-1]), g)
        if self.deviations:
            by_state[..., -f.shape[1] :] += g
        kernels, _ = self._weights("middle", params["middle"])
        for layer in range(len(kernels) - 1, -1, -1):
            g = np.where(states[layer + 1] > self.floor, by_state, 0)
            by_q = below("middle", kernels[layer], self._read(states[layer]), g)
            by_state = self.column * by_q + self.carry * g
        g = np.where(states[0] > self.floor, by_state, 0)
        below("first", self._weights("first", params["first"])[0], self.x, g)
        shape_of = tree_map(np.shape, params)
        return f, tree_map(lambda part, shape: np.reshape(part, shape), found, shape_of)

    def tangent(self, params, direction):
        """Derivative [n, d_out] of the outputs along ``direction``."""
        states, _ = self._states(params)

        def along(name, q, dq, layer, kernel):
            slope, ratio = self._slope(name, kernel.shape[-1])
            moved = np.reshape(layer["kernel"], kernel.shape) * slope
            return self._linear(dq, kernel) + self._linear(q, moved) + layer["bias"] * slope * ratio

        kernel, _ = self._weights("first", params["first"])
        dz = along("first", self.x, np.zeros_like(self.x), direction["first"], kernel)
        dh = np.where(states[0] > self.floor, dz, 0)
        kernels, _ = self._weights("middle", params["middle"])
        for k, kernel in enumerate(kernels):
            layer = {name: array[k] for name, array in direction["middle"].items()}
            dz = along("middle", self._read(states[k]), self.column * dh, layer, kernel)
            dh = np.where(states[k + 1] > self.floor, dz + self.carry * dh, 0)
        kernel, _ = self._weights("last", params["last"])
        df = along("last", self._read(states[-1]), self.column * dh, direction["last"], kernel)
        if self.deviations:
            df = df + dh[..., -df.shape[-1] :]
        return df.mean((1, 2))

    def _states(self, params):
        """(the state that each layer but the first reads, outputs)."""
        kernel, bias = self._weights("first", params["first"])
        z = self._linear(self.x, kernel) + bias + self.start
        states = [np.maximum(z, self.floor)]
        for kernel, bias in zip(*self._weights("middle", params["middle"]), strict=True):
            h = states[-1]
            z = self.carry * h + self._linear(self._read(h), kernel) + bias
            states.append(np.maximum(z, self.floor))
        kernel, bias = self._weights("last", params["last"])
        f = self._linear(self._read(states[-1]), kernel) + bias
        if self.deviations:
            f = f + states[-1][..., -f.shape[-1] :]
        return states, f.mean((1, 2))

    def _read(self, h):
        return self.base + self.column * h

    def _slope(self, name, units):
        """The derivative of W by what is trained, by unit, and b's as a multiple of it."""
        if not self.deviations:
            return (self.model.parameter_scale if self.initial else 1.0), 1.0
        slope, scale = np.full(units, 1 / math.sqrt(self.model.depth), self.dtype), self.model.scale
        if name != "last":
            slope[self.d_in] /= scale
        return (slope / scale, 1.0) if name == "first" else (slope, 1 / scale)

    def _weights(self, name, params):
        """Kernels [..., q, q, in, out] and biases of the layers called ``name``."""
        kernel, bias = (np.asarray(params[kind], self.dtype) for kind in ("kernel", "bias"))
        slope, ratio = self._slope(name, kernel.shape[-1])
        kernel, bias = kernel * slope, bias * (slope * ratio)
        if start := self.initial.get(name):
            if self.deviations:
                features = start["kernel"] / (self.model.scale if name == "first" else 1)
                kernel[..., : self.d_in, self.d_in] += features
                bias[..., self.d_in] += start["bias"]
            else:
                kernel, bias = kernel + start["kernel"], bias + start["bias"]
        if kernel.ndim < 4 + (name == "middle"):  # an MLP's
            kernel = kernel[..., None, None, :, :]
        return kernel, bias

    def _shifts(self, q, side):
        """(dy, dx, what the filter's entry at dy, dx reads) of every entry."""
        reach, (height, width) = side // 2, q.shape[1:3]
        wide = np.pad(q, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
        for dy in range(side):
            for dx in range(side):
                yield dy, dx, wide[:, dy : dy + height, dx : dx + width]

    def _linear(self, q, kernel):
        rows = sum(
            shifted.reshape(-1, q.shape[-1]) @ kernel[dy, dx]
            for dy, dx, shifted in self._shifts(q, len(kernel))
        )
        return rows.reshape(*q.shape[:-1], -1)

    def _pull(self, q, kernel, g):
        """The derivatives by the kernel and by q, from those by what `_linear` returns."""
        rows = g.reshape(-1, g.shape[-1])
        by_kernel = np.zeros_like(kernel)
        for dy, dx, shifted in self._shifts(q, len(kernel)):
            by_kernel[dy, dx] = shifted.reshape(-1, q.shape[-1]).T @ rows
        return by_kernel, self._linear(g, kernel[::-1, ::-1].swapaxes(-1, -2))


def moved_network(shape, d_out, depth, dtype, options):
    """(model, params, frozen, x, y), away from the initialization: every weight matters.

    ``options`` are the model's fields and ``negative`` inputs, ``dark`` pixels, a ``literal`` form.
    """
    options = dict(options)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1 if options.pop("negative", False) else 0, 1, shape).astype(dtype)
    dark = options.pop("dark", False)
    if dark:
        x[:, ::3] = 0
    y = rng.standard_normal((len(x), d_out)).astype(dtype)
    literal = options.pop("literal", False)
    fields = {"scale": 20.0, "parametrization": "standard" if literal else "ntk"} | options
    model = (DeepNarrowMLP if len(shape) == 2 else DeepNarrowCNN)(depth, d_out, **fields)
    frozen = drawn(model, x, rng)
    params = frozen.pop("params")
    size = 0.02 if literal else 1.0
    params = tree_map(lambda p: (p + size * rng.standard_normal(p.shape)).astype(dtype), params)
    if dark:
        # No layer lights every second of these pixels; the others are lit further up.
        d_in = shape[-1]
        for leaf in params["first"].values():
            leaf[..., :d_in:3] = 0
        for leaf in params["middle"].values():
            leaf[..., :d_in:6] = -np.abs(leaf[..., :d_in:6])
    return model, params, tree_map(lambda a: a.astype(dtype), frozen), x, y


def assert_close(found, expected, tolerance):
    """Trees of arrays agree up to ``tolerance`` of each array's largest number."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30))


def drawn_network(arch, depth=6, d_out=2, scale=math.inf, examples=12, **fields):
    """(model, params, frozen, x, y) at the initialization, in float64."""
    rng = np.random.default_rng(0)
    shape = (examples, 3) if arch == "mlp" else (examples, 3, 4, 1)
    x, y = rng.uniform(0.1, 1, shape), rng.standard_normal((examples, d_out))
    model = (DeepNarrowMLP if arch == "mlp" else DeepNarrowCNN)(depth, d_out, scale, **fields)
    frozen = drawn(model, x, rng)
    return model, frozen.pop("params"), frozen, x, y


def explicit_kernel(model, params, frozen, x):
    """J J^T over all examples and outputs, [n k, n k], from the Jacobian itself."""
    reference, rows = Reference(model, frozen, x), []
    shape = reference.outputs(params).shape
    for unit in np.eye(math.prod(shape)):
        gradient = reference.gradient(params, lambda f, unit=unit: unit.reshape(shape))[1]
        rows.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)]))
    return np.array(rows) @ np.array(rows).T
