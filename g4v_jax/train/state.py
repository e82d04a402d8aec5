"""The training state, and how it comes into being already sharded."""

import dataclasses
from collections.abc import Callable
from functools import cached_property

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from g4v_jax import sharding, trees
from g4v_jax.errors import UserError
from g4v_jax.types import Array


@struct.dataclass
class TrainState:
    """What a step changes. Frozen parameters are not here: they are the step's second argument."""

    step: Array  # i32 []
    trainable: dict
    opt_state: optax.OptState
    ema: dict  # moving average of some trainable leaves (a sub-tree of `trainable`)


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Shapes and shardings of a run's parameters, split into trainable and frozen, before any array exists."""

    init: Callable[[jax.Array], dict]  # key -> boxed parameters, for jit only
    mesh: Mesh
    choose: Callable[[list[str]], tuple[set[str], set[str]]]  # paths -> (trainable, those of them with an EMA)
    frozen_dtype: jnp.dtype

    @cached_property
    def boxed(self) -> dict:
        """Parameters with their logical names, as shapes."""
        with jax.set_mesh(self.mesh):
            return jax.eval_shape(lambda: self.init(jax.random.key(0)))  # traced: the mesh may be of devices not here

    @cached_property
    def shapes(self) -> dict:
        """All parameters as sharded ShapeDtypeStruct, float32. Raises UserError where the mesh does not divide one."""
        shardings = trees.flatten(sharding.named(self.mesh, sharding.parameter_specs(self.boxed)))

        def shape(path, x):
            try:
                shardings[path].shard_shape(x.shape)
            except ValueError:
                raise UserError(f"mesh: {path} {list(x.shape)} does not divide over {_split(shardings[path])}") from None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path])

        unboxed = trees.flatten(nn.meta.unbox(self.boxed))
        return trees.unflatten({path: shape(path, x) for path, x in unboxed.items()})

    @cached_property
    def _chosen(self) -> tuple[set[str], set[str]]:
        return self.choose(list(trees.flatten(nn.meta.unbox(self.boxed))))

    @property
    def trainable(self) -> set[str]:
        """Paths that gradients reach."""
        return self._chosen[0]

    @property
    def ema(self) -> set[str]:
        """Paths with a moving average."""
        return self._chosen[1]

    @property
    def trainable_shapes(self) -> dict:
        """The shapes and shardings of what gradients reach."""
        return trees.split(self.shapes, self.trainable)[0]

    @property
    def frozen_shapes(self) -> dict:
        """The frozen tree's shapes and shardings, in the dtype it is kept in."""
        _, frozen = trees.split(self.shapes, self.trainable)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, self.frozen_dtype, sharding=x.sharding), frozen)

    def state_shapes(self, optimizer: optax.GradientTransformation) -> TrainState:
        """Shapes and shardings of the whole TrainState: optimizer state follows its parameter."""
        trainable = self.trainable_shapes
        whole = jax.sharding.NamedSharding(self.mesh, PartitionSpec())
        flat = trees.flatten(trainable)

        def follow(path, leaf):
            param = _parameter_of(path, flat)
            same = param is not None and param.shape == leaf.shape
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding if same else whole)

        opt_state = jax.tree_util.tree_map_with_path(follow, jax.eval_shape(optimizer.init, trainable))
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return TrainState(step, trainable, opt_state, trees.split(trainable, self.ema)[0])

    def create(self, key: jax.Array, optimizer: optax.GradientTransformation) -> TrainState:
        """Initialise on the mesh: nothing is ever whole on one device."""

        def make(key):
            trainable, _ = trees.split(nn.meta.unbox(self.init(key)), self.trainable)
            ema, _ = trees.split(trainable, self.ema)
            ema = jax.tree.map(jnp.copy, ema)
            return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), ema)

        shardings = jax.tree.map(lambda x: x.sharding, self.state_shapes(optimizer))
        with jax.set_mesh(self.mesh):
            # runs once: compiling it well would take three times as long as it saves
            quick = {"xla_backend_optimization_level": 0}
            return jax.jit(make, out_shardings=shardings, compiler_options=quick)(key)


def _split(sharding: jax.sharding.NamedSharding) -> str:
    """Axes of the mesh that a parameter lies over, with their sizes, by dimension."""
    sizes = sharding.mesh.shape
    return ", ".join("whole" if axis is None else f"{axis} {sizes[axis]}" for axis in sharding.spec)


def _parameter_of(path: tuple, parameters: dict):
    """The parameter whose path ends the path of an optimizer-state leaf, or None (counts and the like)."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    tails = ("/".join(map(str, names[i:])) for i in range(len(names)))
    return next((parameters[tail] for tail in tails if tail in parameters), None)
