"""Which program computes attention: splash attention on TPUs, cuDNN's flash attention on GPUs, plain XLA elsewhere.

May hold the choice, and the calls of kernels that others keep. None of them holds the scores of all queries and keys in
memory, as the plain path does.
"""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import NamedSharding, PartitionSpec

from g4v_jax import sharding
from g4v_jax.errors import UserError, nearest

KERNELS = ("auto", "plain", "splash", "cudnn")
BEST = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}  # by platform
WORTH = 256**2  # auto takes a kernel where there are at least so many scores a head, of
FEWEST = 32  # queries and keys at least: fewer would be padding above all
LANES = 128  # lengths that splash attention takes are multiples of it
BLOCKS = (512, 384, 256, LANES)  # of queries and of keys, the largest that divides their number
COPIES = 4  # of the queries' gradient, one a block of keys, are held at most to make all gradients from one look at the scores
SAVED = "attention"  # name of what the backward pass needs, for a remat policy

log = logging.getLogger(__name__)


@struct.dataclass
class Packed:
    """Which keys a query of a packed row may look at: those of its segment, if causal not after it, within a window.

    `segments` i32 [B S], of queries and keys. `window`: of the keys before and at the query only the last so many.
    """

    segments: jax.Array
    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)

    def allowed(self) -> jax.Array:
        """The same as bool [B S S], True where a key may be looked at."""
        mask = self.segments[:, :, None] == self.segments[:, None, :]
        if self.causal:
            mask &= jnp.tril(jnp.ones(mask.shape[-2:], bool))
        return mask if self.window is None else mask & jnp.triu(jnp.ones(mask.shape[-2:], bool), 1 - self.window)


def choose(asked: str, platform: str, q: jax.Array, k: jax.Array, mask: Packed | jax.Array | None) -> str:
    """"plain", "splash" or "cudnn" for q [B S H d] and k [B T H_kv d] on a platform; told once.

    A mask that is an array belongs to decoding, where there is one query: always plain. Raises UserError where a kernel is
    asked for that cannot run; auto then takes the plain path and warns.
    """
    if asked not in KERNELS:
        raise UserError(f"attention {asked!r} is not known{nearest(asked, KERNELS)}")
    if asked == "plain" or not (mask is None or isinstance(mask, Packed)):
        return "plain"
    name = BEST.get(platform, "plain") if asked == "auto" else asked
    if asked == "auto" and name != "plain" and not _worth(q.shape[1], k.shape[1]):
        return "plain"
    reason = None if name == "plain" else _hindrance(name, platform, q)
    if reason and asked != "auto":
        raise UserError(f"attention {name!r} cannot run: {reason}; use auto or plain")
    if platform != "none":  # where only arithmetic is counted
        _tell(f"attention: plain instead of {name}: {reason}" if reason else f"attention: {name} on {platform}", bool(reason))
    return "plain" if reason else name


def _worth(queries: int, keys: int) -> bool:
    return queries * keys >= WORTH and min(queries, keys) >= FEWEST


def _hindrance(name: str, platform: str, q: jax.Array) -> str | None:
    """Why a kernel cannot run, or None."""
    if BEST.get(platform) != name:
        return f"it is made for {'TPUs' if name == 'splash' else 'NVIDIA GPUs'}, and this is {platform}"
    if name == "cudnn":
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"it computes in bfloat16 or float16, not in {q.dtype} (precision.compute)"
        if q.shape[-1] % 8 or q.shape[-1] > 128:
            return f"heads are {q.shape[-1]} wide; it takes multiples of 8 up to 128"
        if not _has_cudnn():
            return "cuDNN is not on this machine"
    return None


def _has_cudnn() -> bool:
    from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version  # JAX has no public name for it

    try:
        return bool(check_cudnn_version())
    except RuntimeError:
        return False


@functools.cache
def _tell(message: str, warn: bool) -> None:
    log.log(logging.WARNING if warn else logging.INFO, message)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Packed | None) -> jax.Array:
    """cuDNN's flash attention through JAX; shapes as in `attention.attend`."""
    allowed = None if mask is None else mask.allowed()[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=allowed, implementation="cudnn")


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Packed | None,
    axes: tuple[str | None, ...],
    interpret: bool = False,
) -> jax.Array:
    """Splash attention (JAX's kernel for TPUs; Dao 2023 with blocks that a mask empties left out) on every device's part.

    Shapes as in `attention.attend`. `axes`: logical names of the rows, of the queries' length, of their heads and of the keys'
    heads; keys are whole along their length. Lengths that are no multiple of the kernel's blocks are padded. `interpret` runs it
    without a TPU, for tests. Needs `jax.set_mesh`.
    """
    rows_axis, length_axis, heads_axis, kv_heads_axis = axes
    length, keys = q.shape[1], k.shape[1]
    queries_over, heads_over = sharding.shards(length_axis), sharding.shards(heads_axis)
    more = _missing(length, LANES * queries_over), _missing(keys, LANES)
    ids = None
    if mask is not None or any(more):
        segments = jnp.zeros(q.shape[:2], jnp.int32) if mask is None else mask.segments
        others = jnp.zeros(k.shape[:2], jnp.int32) if mask is None else mask.segments
        # an added key is of no query's segment; an added query looks where the last one does: a query without any key
        # would make infinities that the backward pass cannot multiply away
        ids = (jnp.pad(segments, ((0, 0), (0, more[0])), "edge"), jnp.pad(others, ((0, 0), (0, more[1])), constant_values=-1))
    q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x, extra in ((q, more[0]), (k, more[1]), (v, more[1])))
    blocks = _blocks(q.shape[1] // queries_over, k.shape[1])
    same = mask is None or not mask.causal  # on every device: JAX cannot split a mask that allows all
    if same:
        shape, shards, heads = (q.shape[1] // queries_over, k.shape[1]), (1, 1), q.shape[2] // heads_over
    else:
        shape, shards, heads = (q.shape[1], k.shape[1]), (heads_over, queries_over), q.shape[2]
    kernel = splash_kernel.make_splash_mha(
        splash_mask.MultiHeadMask([_mask(shape, mask, shards[1])] * heads),
        block_sizes=blocks,
        head_shards=shards[0],
        q_seq_shards=shards[1],
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    mesh = jax.sharding.get_abstract_mesh()
    spec = sharding.activation_spec

    def part(kernel, q, k, v, ids):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
        ids = None if ids is None else splash_kernel.SegmentIds(*ids)
        return jax.vmap(kernel)(q, k, v, ids).transpose(0, 2, 1, 3)

    out = jax.shard_map(
        part,
        in_specs=(
            PartitionSpec() if same else kernel.manual_sharding_spec(NamedSharding(mesh, spec(heads_axis, length_axis))),
            spec(rows_axis, length_axis, heads_axis, None),
            spec(rows_axis, None, kv_heads_axis, None),
            spec(rows_axis, None, kv_heads_axis, None),
            PartitionSpec() if ids is None else (spec(rows_axis, length_axis), spec(rows_axis, None)),
        ),
        out_specs=spec(rows_axis, length_axis, heads_axis, None),
        check_vma=False,
    )(kernel, q, k, v, ids)
    return out[:, :length]


def _mask(shape: tuple[int, int], mask: Packed | None, shards: int) -> splash_mask.Mask:
    if mask is None or not mask.causal:
        if mask is not None and mask.window is not None:
            raise ValueError("a window needs a causal mask")
        return splash_mask.FullMask(shape)
    if mask.window is None:
        return splash_mask.CausalMask(shape, shard_count=shards)
    return splash_mask.LocalMask(shape, (mask.window - 1, 0), 0, shard_count=shards)


def _blocks(queries: int, keys: int) -> splash_kernel.BlockSizes:
    q, kv = (next(block for block in BLOCKS if length % block == 0) for length in (queries, keys))
    once = keys // kv <= COPIES
    return splash_kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=None if once else q, block_kv_dq=None if once else kv, use_fused_bwd_kernel=once,
    )  # fmt: skip


def _missing(length: int, unit: int) -> int:
    return math.ceil(length / unit) * unit - length
