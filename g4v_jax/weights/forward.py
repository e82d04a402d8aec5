"""One tower on given arrays: what it takes, what it gives, under the names `g4v forward` reads and writes.

May hold the inputs and the pure forward function of each kind of tower; knows no files and no families.

| tower | in | out |
|---|---|---|
| llm | tokens i32 [B S] | logits f32 [B S V] |
| vision | frames f32 [B T H W 3], normalised as the reference expects | features f32 [B T P D], last hidden states |
| summarizer | features f32 [B T P D] of the tower | summary f32 [B Q D_llm] |
| denoiser | latents f32 [B t h w c], timestep f32 [B] (the reference's scale), context f32 [B N D] | prediction f32 [B t h w c] |
| autoencoder | video f32 [B T H W 3] in [-1, 1] | latents (posterior mean, not normalised), reconstruction (decoded from it) |
"""

import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax import sharding
from g4v_jax.errors import UserError


def llm(module, arrays: dict, dtype) -> dict:
    """Logits of every position; each row is one sequence."""
    tokens = arrays["tokens"]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = module.hidden(module.embed(tokens, dtype), positions, jnp.ones_like(tokens))
    return {"logits": module.logits(hidden)}


def vision(module, arrays: dict, dtype) -> dict:
    """Features of every frame."""
    frames = arrays["frames"].astype(dtype)
    features = module.features(frames.reshape(-1, *frames.shape[2:]), frames.shape[1])
    return {"features": features.reshape(*frames.shape[:2], *features.shape[1:]).astype(jnp.float32)}


def summarizer(module, arrays: dict, dtype) -> dict:
    """Summary tokens of clips whose frames are one second apart."""
    features = arrays["features"].astype(dtype)
    times = jnp.broadcast_to(jnp.arange(features.shape[1], dtype=jnp.float32), features.shape[:2])
    return {"summary": module(features, times).astype(jnp.float32)}


def denoiser(module, arrays: dict, dtype) -> dict:
    """The denoiser's own prediction; `image_context` f32 [B M D] as well where the module takes one."""
    extra = {name: arrays[name].astype(dtype) for name in ("image_context",) if name in arrays}
    latents, context = arrays["latents"].astype(dtype), arrays["context"].astype(dtype)
    prediction = module.predict(latents, arrays["timestep"].astype(jnp.float32), context, **extra)
    return {"prediction": prediction.astype(jnp.float32)}


def autoencoder(module, arrays: dict, dtype) -> dict:
    """There and back, through the posterior's mean."""
    latents, _ = module.encode(arrays["video"].astype(dtype))
    reconstruction = module.decode(latents)
    return {"latents": latents.astype(jnp.float32), "reconstruction": reconstruction.astype(jnp.float32)}


FORWARD = {function.__name__: function for function in (llm, vision, summarizer, denoiser, autoencoder)}


def example(tower: str, module) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a small input of every array that a tower takes."""
    if tower == "llm":
        return {"tokens": jax.ShapeDtypeStruct((2, 16), np.int32)}
    shapes = {
        "vision": lambda: {"frames": (1, 2, module.image_size, module.image_size, 3)},
        "summarizer": lambda: {"features": (1, 2, *module.feature_shape)},
        "denoiser": lambda: {
            "latents": (2, *module.smallest, module.latent_channels),
            "timestep": (2,),
            "context": (2, 6, module.context_dim),
        }
        | ({"image_context": (2, module.image_tokens, module.image_dim)} if module.image_dim else {}),
        "autoencoder": lambda: {"video": (1, *module.smallest, 3)},
    }[tower]()
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def inputs(tower: str, module, seed: int = 0) -> dict[str, np.ndarray]:
    """`example` filled from a seed: ordinary values of the right kind for each array."""
    draw = np.random.default_rng(seed)
    out = {}
    for name, struct in example(tower, module).items():
        if name == "tokens":
            out[name] = draw.integers(0, module.vocab_size, struct.shape).astype(np.int32)
        elif name == "timestep":
            out[name] = draw.integers(1, 999, struct.shape).astype(np.float32)
        elif name == "video":
            out[name] = draw.uniform(-1, 1, struct.shape).astype(np.float32)
        else:
            out[name] = draw.standard_normal(struct.shape).astype(np.float32)
    return out


def checked(tower: str, module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that a tower takes, in its dtypes.

    Raises UserError for one that is missing, of another rank, or of another size in an axis that the tower fixes.
    """
    free = {"frames": 2, "tokens": 2, "features": 2, "timestep": 1, "context": 2, "latents": 4, "video": 4}
    wanted = example(tower, module)
    for name, struct in wanted.items():
        if name not in arrays:
            raise UserError(f"forward: {name} is missing; a {tower} takes {', '.join(wanted)}")
        value, ndim = arrays[name], len(struct.shape)
        fixed = slice(free.get(name, 1), None)
        if value.ndim != ndim or value.shape[fixed] != struct.shape[fixed]:
            raise UserError(f"forward: {name} is {list(value.shape)}; it must be like {list(struct.shape)}")
        if name == "tokens" and (value.min(initial=0) < 0 or value.max(initial=0) >= module.vocab_size):
            raise UserError(f"forward: tokens must be 0 to {module.vocab_size - 1}")
    if len({len(arrays[name]) for name in wanted}) > 1:
        raise UserError("forward: the arrays have different numbers of rows")
    return {name: arrays[name].astype(struct.dtype) for name, struct in wanted.items()}


def run(tower: str, module, params: dict, arrays: dict[str, np.ndarray], dtype=jnp.float32) -> dict[str, np.ndarray]:
    """A tower's forward pass on given arrays, computed in `dtype` on one device."""
    with jax.set_mesh(sharding.one_device()):
        call = jax.jit(lambda p, a: module.apply({"params": p}, a, dtype, method=FORWARD[tower]))
        return {name: np.asarray(value) for name, value in call(params, arrays).items()}
