"""Repeating one block by `lax.scan`: one compiled body whatever the depth, with rematerialisation by name."""

import flax.linen as nn
import jax

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan(block: type[nn.Module], num_layers: int, remat: str, unroll: int, shared: int, **fields) -> nn.Module:
    """Return a module that runs `num_layers` copies of `block(**fields)`, parameters stacked on a leading axis.

    The block's call is `(x, layer, *shared) -> (x, layer_output)`: `layer` is a tree with a leading layer axis
    (or None), `shared` that many arguments that every layer sees whole. `unroll` layers make one turn of the loop:
    on a CPU, where a loop's body runs up to 4 x slower, all of them should. Raises KeyError for an unknown policy.
    """
    policy = REMAT[remat]
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
