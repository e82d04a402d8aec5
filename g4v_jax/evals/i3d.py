"""Features of clips for video distances: the logits of I3D trained on Kinetics-400.

May hold the network (Carreira & Zisserman 2017, Inflated Inception-v1, RGB), the reading of its published weights and
the way from pixels to features; what is made of the features is `distances`' business.
"""

import functools
import hashlib
import io
import os
import pickle
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax import trees
from g4v_jax.errors import UserError

SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"  # of i3d-kinetics-400.ckpt
SIZE = 224  # pixels, of the frames that the network was trained on
STRIDE = 8  # frames to one step of the last layers
MIN_FRAMES = STRIDE + 1  # the last layer averages two steps, and the first frame of a step is enough to make it
EPSILON = 1e-3  # of the batch norms that were folded into the convolutions

# Network

STEM = (64, 64, 192)
STAGES = (  # of mixed blocks; see `Mixed`
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)
POOLS = (((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)))  # windows and strides before each


def _pool(x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...]) -> jax.Array:
    return nn.max_pool(x, window, strides, "SAME")


class Unit(nn.Module):
    """A convolution with the same `taps` and `stride` in time, height and width, its batch norm folded in, and ReLU."""

    width: int
    taps: int = 1
    stride: int = 1
    relu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # full float32 also where an accelerator would take less: distances are differences of such features
        options = dict(padding="SAME", precision=jax.lax.Precision.HIGHEST, name="conv")
        y = nn.Conv(self.width, (self.taps,) * 3, (self.stride,) * 3, **options)(x)
        return nn.relu(y) if self.relu else y


class Mixed(nn.Module):
    """Four views of x side by side: 1³ taps, two times 1³ then 3³, and pooled then 1³.

    `widths`: of the first, of both maps of the second and of the third, and of the fourth.
    """

    widths: tuple[int, int, int, int, int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one, narrow_a, wide_a, narrow_b, wide_b, pooled = self.widths
        views = [
            Unit(one, name="one")(x),
            Unit(wide_a, 3, name="wide_a")(Unit(narrow_a, name="narrow_a")(x)),
            Unit(wide_b, 3, name="wide_b")(Unit(narrow_b, name="narrow_b")(x)),
            Unit(pooled, name="pooled")(_pool(x, (3, 3, 3), (1, 1, 1))),
        ]
        return jnp.concatenate(views, axis=-1)


class I3D(nn.Module):
    """Clips f32 [N T H W 3] in [-1, 1], T at least MIN_FRAMES -> logits [N classes], averaged over time."""

    classes: int = 400
    stem: tuple[int, int, int] = STEM
    stages: tuple[tuple[tuple[int, ...], ...], ...] = STAGES

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Unit(self.stem[0], 7, 2, name="stem_a")(x)
        x = _pool(x, (1, 3, 3), (1, 2, 2))
        x = Unit(self.stem[1], name="stem_b")(x)
        x = Unit(self.stem[2], 3, name="stem_c")(x)
        for number, (pool, stage) in enumerate(zip(POOLS, self.stages), start=3):
            x = _pool(x, *pool)
            for letter, widths in zip("bcdef", stage):
                x = Mixed(widths, name=f"mixed_{number}{letter}")(x)
        x = x.mean((2, 3), keepdims=True)  # 7 x 7 places, of 224 pixels
        x = (x[:, :-1] + x[:, 1:]) / 2
        return Unit(self.classes, relu=False, name="logits")(x).mean((1, 2, 3))


# Features


def features(params: dict, videos: np.ndarray, batch: int = 8, module: I3D = I3D()) -> np.ndarray:
    """Clips u8 [N T H W 3] -> f32 [N 400], the logits of I3D: the features of FVD (Unterthiner et al. 2018).

    `params` as `load` gives them. Frames are resized to 224 x 224 pixels (bilinear between the centres of pixels,
    with antialiasing where they shrink) whatever their form, and scaled to [-1, 1]; `batch` clips are in work at a
    time. Published values came from another way of resizing, and from other numbers of frames and clips: compare
    distances only where all of these are the same. Raises UserError for clips of fewer than 9 frames: the network
    makes one step of 8 frames and needs two.
    """
    if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8:
        raise ValueError(f"clips are {videos.dtype} {videos.shape}, not uint8 [N T H W 3]")
    if videos.shape[1] < MIN_FRAMES:
        raise UserError(
            f"a clip of {videos.shape[1]} frames is shorter than the metric needs: I3D takes {MIN_FRAMES} or more; "
            "generate longer clips or leave this metric out"
        )
    batch = max(1, min(batch, len(videos)))
    rows = []
    for start in range(0, len(videos), batch):
        part = videos[start : start + batch]
        filled = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.uint8)])  # one compilation
        rows.append(np.asarray(_logits(module, params, filled))[: len(part)])
    return np.concatenate(rows) if rows else np.zeros((0, module.classes), np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: I3D, params: dict, videos: jax.Array) -> jax.Array:
    x = jax.image.resize(videos.astype(jnp.float32), (*videos.shape[:2], SIZE, SIZE, 3), "bilinear")
    return module.apply({"params": params}, x / 127.5 - 1)


# Weights


def load(path: str | os.PathLike) -> dict:
    """The published weights i3d-kinetics-400.ckpt -> parameters of I3D(), float32.

    Raises UserError where the file is missing or is another one: distances are comparable under these weights alone.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"cannot read the weights of I3D ({error.strerror})"
        raise UserError(f"{path}: {reason}; bring them with g4v data fetch i3d --out=DIR") from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{path}: not the published weights of I3D; bring them with g4v data fetch i3d --out=DIR")
    return convert(unpickle(data, str(path)), I3D(), str(path))


def convert(tree: dict, module: I3D, name: str) -> dict:
    """The published tree of variables -> parameters of `module`, batch norms folded into the convolutions.

    Every tensor is used: raises UserError where one is missing, has another shape, or has no place.
    """
    held = trees.flatten(tree)

    def take(path: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = held.pop(path, None)
        if tensor is None:
            raise UserError(f"{name}: {path} is missing")
        if tensor.shape not in (shape, (1, 1, 1, 1, *shape)):  # moments lie along the channels of a clip
            raise UserError(f"{name}: {path} is {list(tensor.shape)}, not {list(shape)}")
        return tensor.reshape(shape).astype(np.float64)

    params = {}
    for path, kernel in kernels(module).items():
        theirs, outputs = _published(path), kernel[-1:]
        weight = take(f"params/{theirs}/Conv_0/kernel", kernel)
        if path == "logits":
            bias = take(f"params/{theirs}/Conv_0/bias", outputs)
        else:
            scale = 1 / np.sqrt(take(f"batch_stats/{theirs}/BatchNorm_0/var", outputs) + EPSILON)
            mean = take(f"batch_stats/{theirs}/BatchNorm_0/mean", outputs)
            weight, bias = weight * scale, take(f"params/{theirs}/BatchNorm_0/bias", outputs) - mean * scale
        params[f"{path}/conv/kernel"], params[f"{path}/conv/bias"] = np.float32(weight), np.float32(bias)
    if held:
        raise UserError(f"{name}: {len(held)} tensors have no place, the first {min(held)}")
    return trees.unflatten(params)


@functools.cache
def kernels(module: I3D) -> dict[str, tuple[int, ...]]:
    """Path of each unit -> shape [time height width in out] of its kernel."""
    clip = jax.ShapeDtypeStruct((1, MIN_FRAMES, SIZE, SIZE, 3), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), clip)["params"]
    end = "/conv/kernel"
    return {path.removesuffix(end): x.shape for path, x in trees.flatten(shapes).items() if path.endswith(end)}


_UNITS = {  # ours -> the published name; the last six within a mixed block
    "stem_a": "Conv3d_1a_7x7",
    "stem_b": "Conv3d_2b_1x1",
    "stem_c": "Conv3d_2c_3x3",
    "logits": "Logits/Conv3d_0c_1x1",
    "one": "Branch_0/Conv3d_0a_1x1",
    "narrow_a": "Branch_1/Conv3d_0a_1x1",
    "wide_a": "Branch_1/Conv3d_0b_3x3",
    "narrow_b": "Branch_2/Conv3d_0a_1x1",
    "wide_b": "Branch_2/Conv3d_0b_3x3",
    "pooled": "Branch_3/Conv3d_0b_1x1",
}


def _published(path: str) -> str:
    block, _, unit = path.rpartition("/")
    return f"{block.capitalize()}/{_UNITS[unit]}" if block else _UNITS[unit]


# Pickles of arrays, read without running anything they name


class _Dtype:
    """Stands for numpy.dtype: little-endian float32 alone."""

    def __init__(self, code, *flags):
        self.code = code

    def __setstate__(self, state):
        if (self.code, state[1]) != ("f4", "<"):
            raise pickle.UnpicklingError(f"numbers of type {state[1]!r}{self.code!r}")


class _Array:
    """Stands for an array under construction; `value` is the array once its state was given."""

    value: np.ndarray | None = None

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array of something else than numbers")
        self.value = np.frombuffer(data, "<f4").reshape(shape, order="F" if fortran else "C")


def _ndarray(*_):
    raise pickle.UnpicklingError("an array that is not made in the usual way")  # it is only ever named


def _reconstruct(*_):
    return _Array()


_STAND_INS = {  # all that a pickled array names
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    """A pickle may name nothing but what arrays are made of, and gets our own stand-ins even for that."""

    def find_class(self, module, name):
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _STAND_INS[module, name]


def unpickle(data: bytes, name: str) -> dict:
    """A pickled tree of dicts with float32 arrays at its leaves.

    Nothing that the pickle names is imported or called. Raises UserError for every other pickle and for damaged ones.
    """
    try:
        return _finished(_Unpickler(io.BytesIO(data)).load())
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{name}: not a pickle of float32 arrays alone ({error}); nothing in it was run") from error


def _finished(node) -> dict | np.ndarray:
    if isinstance(node, _Array) and node.value is not None:
        return node.value
    if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
        raise pickle.UnpicklingError(f"a {type(node).__name__}")
    return {key: _finished(value) for key, value in node.items()}
