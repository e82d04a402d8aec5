"""Layers with random parameters, and how near to a reference in float64 they must come."""

import flax.linen as nn
import jax
import numpy as np
from tiny import normal


def init(module, *args, **kwargs) -> dict:
    """Parameters of a module, every one random."""
    shapes = nn.meta.unbox(jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0)))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def apply(module, params, *args, **kwargs):
    return jax.jit(lambda p: module.apply({"params": p}, *args, **kwargs))(params)


def close(actual, expected, scale=1.0):
    """Equal to float32's accuracy, relative to the largest value expected."""
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * scale * max(1.0, np.abs(expected).max()))


def double(tree):
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)
