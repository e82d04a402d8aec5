"""Repeating one block by `lax.scan`: one compiled body whatever the depth, with rematerialisation by name.

May hold what runs layers, and how their parameters lie: stacked, or one by one; and one module gone over an axis in a loop.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from g4v_jax.errors import UserError, nearest
from g4v_jax.nn.kernels import SAVED
from g4v_jax.trees import flatten, unflatten

LAYERS = "layers/"  # where a tower's stacked parameters are
RESIDUAL = "residual"  # name of what a layer is given
REMAT = {  # what a layer keeps for the backward pass, beside what it is given
    "none": None,  # all
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),  # what attention gave, so that it is not done again
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # nothing; what it is given waits in host memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def residual(x: jax.Array) -> jax.Array:
    """Marks what a layer is given, for the policy "offload"; every block that `scan` repeats begins with it."""
    return checkpoint_name(x, RESIDUAL)


def policy_of(remat: str):
    """The policy of a name, None for "none". Raises UserError for an unknown one."""
    if remat not in REMAT:
        raise UserError(f"remat {remat!r} is not known{nearest(remat, REMAT)}")
    return REMAT[remat]


def one_by_one(module: nn.Module, function: Callable, x: jax.Array) -> jax.Array:
    """function(module, x[:, i]) of every i in a loop, [B M ...] -> [B M ...]: no more than one of the M is worked on."""
    step = nn.scan(
        lambda module, carry, one: (carry, function(module, one)),
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
    )
    return step(module, (), x)[1]


def scan(block: type[nn.Module], num_layers: int, remat: str, unroll: int, shared: int, **fields) -> nn.Module:
    """Return a module that runs `num_layers` copies of `block(**fields)`, parameters stacked on a leading axis.

    The block's call is `(x, layer, *shared) -> (x, layer_output)`: `layer` is a tree with a leading layer axis
    (or None), `shared` that many arguments that every layer sees whole. `unroll` layers make one turn of the loop:
    on a CPU, where a loop's body runs up to 4 x slower, all of them should. Raises UserError for an unknown policy.
    """
    policy = policy_of(remat)
    if policy is not None:
        block = nn.remat(block, policy=policy, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0,) + (nn.broadcast,) * shared,
        length=num_layers,
        unroll=min(unroll, num_layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(**fields)


def apart(params: dict, towers: dict[str, nn.Module]) -> dict:
    """Parameters with the stacks of those `towers` whose layers are all unrolled as tuples of layers; `params` is emptied.

    For one CPU: a jitted function that is given them so, and begins with `stacked`, reads each layer where it lies, while XLA's
    compiler for CPUs copies each layer out of a stack first, and keeps the copy for the backward pass.
    """
    flat = flatten(params)
    params.clear()  # leaf by leaf: the two never lie in memory together
    for path, leaf in flat.items():
        tower, _, rest = path.partition("/")
        if rest.startswith(LAYERS) and towers[tower].unroll >= towers[tower].num_layers:
            flat[path] = tuple(leaf)
    return unflatten(flat)


def stacked(params: dict) -> dict:
    """What `apart` took apart, as it was."""
    flat = flatten(params)
    return unflatten({path: jnp.stack(leaf) if isinstance(leaf, tuple) else leaf for path, leaf in flat.items()})
