"""Wan2.1's denoiser and autoencoder against diffusers: the same numbers from the same weights, and back."""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tiny import normal

from g4v_jax.errors import UserError
from g4v_jax.models.autoencoder import to_pixels, to_signed
from g4v_jax.models.autoencoder_wan import WanAutoencoder
from g4v_jax.weights import wan
from g4v_jax.weights.forward import FORWARD, inputs
from g4v_jax.weights.tables import Memory, load, plan, tower_shapes, unload

pytestmark = pytest.mark.usefixtures("one_device")

FAMILY = {family.architectures[0]: family for family in wan.FAMILIES}
TOLERANCE = 2e-5  # of the largest output
DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def reference(kind, **config):
    """A model of diffusers whose every parameter is random, its norms and tables too."""
    model = kind(**config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for name, x in model.named_parameters():
        value = torch.randn(x.shape, generator=draw)
        if x.ndim == 1 or name.endswith("gamma"):
            value = 0.3 * value + (0.0 if name.endswith("bias") else 1.0)
        elif "table" not in name and "pos_embed" not in name:
            value *= (x.numel() / x.shape[0]) ** -0.5
        x.copy_(value)
    return model


def arrays(model, dtype=torch.float32) -> Memory:
    """A state dict in numpy."""

    def array(x):
        x = x.to(dtype).contiguous()
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == torch.bfloat16 else x.numpy()

    return Memory({name: array(x) for name, x in model.state_dict().items()})


def module(model):
    """Our tower of a reference's config."""
    family = FAMILY[type(model).__name__]
    return family.module(**family.fields(dict(model.config)))


def run(model, given: dict) -> dict:
    """What `g4v forward` computes with a reference's weights."""
    family, ours = FAMILY[type(model).__name__], module(model)
    params = load(family, ours, arrays(model))
    forward = tiny.jit(lambda p, x: ours.apply({"params": p}, x, jnp.float32, method=FORWARD[family.tower]))
    return jax.device_get(forward(params, given))


def first(x) -> torch.Tensor:
    """Channels from last to first: [X t h w c] -> [X c t h w]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def assert_round_trip(model, dtype):
    """Every tensor finds its place and comes back bit for bit."""
    family, ours = FAMILY[type(model).__name__], module(model)
    source = arrays(model, dtype)
    back = unload(family, ours, load(family, ours, source))
    assert back.keys() == source.arrays.keys()
    for name, x in source.arrays.items():
        assert back[name].dtype == x.dtype == DTYPES[dtype] and back[name].shape == x.shape, name
        assert back[name].tobytes() == x.tobytes(), name


def assert_config_round_trip(model):
    """A config as diffusers writes it gives the same module as the one that we write, setting by setting."""
    family, ours = FAMILY[type(model).__name__], module(model)
    assert family.fits(ours) is None
    theirs, config = json.loads(model.to_json_string()), json.loads(json.dumps(family.config(ours)))
    assert family.module(**family.fields(theirs)) == family.module(**family.fields(config)) == ours
    assert config.keys() == theirs.keys() - {"_diffusers_version"}
    assert config == {key: theirs[key] if theirs[key] is not None else config[key] for key in config}


# Denoiser

SMALL = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, text_dim=24, ffn_dim=50, freq_dim=32)
TEXT = {  # kind of text-to-video -> config, size of the latents
    "odd": (dict(num_attention_heads=3, attention_head_dim=20, in_channels=5, out_channels=5), (3, 6, 10)),
    "narrow": (dict(num_attention_heads=5, attention_head_dim=14, in_channels=7, out_channels=3), (1, 2, 6)),
    "patches": (dict(patch_size=(2, 1, 3), in_channels=3, out_channels=None, freq_dim=256), (6, 5, 9)),
    "bare": (dict(cross_attn_norm=False, eps=1e-3, num_layers=1, rope_max_seq_len=9), (9, 2, 2)),
}
IMAGE = {
    "image": (dict(in_channels=9, out_channels=4, image_dim=18, added_kv_proj_dim=24), (3, 2, 6)),
    "ends": (dict(image_dim=10, added_kv_proj_dim=24, pos_embed_seq_len=14, cross_attn_norm=False), (2, 6, 2)),
}
TIMES = np.array([713.5, 999.0], np.float32)


def denoiser(kind) -> tuple[WanTransformer3DModel, tuple[int, int, int]]:
    config, size = (TEXT | IMAGE)[kind]
    return reference(WanTransformer3DModel, **SMALL | config), size


@pytest.mark.parametrize("kind", TEXT)
def test_text_to_video_predicts_what_diffusers_predicts(kind):
    model, size = denoiser(kind)
    latents, context = normal(2, *size, model.config.in_channels), normal(2, 7, 24)
    theirs = model(first(latents), torch.from_numpy(TIMES), torch.from_numpy(context)).sample
    ours = run(model, {"latents": latents, "timestep": TIMES, "context": context})
    assert_close(ours["prediction"], last(theirs))


@pytest.mark.parametrize("kind", IMAGE)
def test_image_to_video_predicts_what_diffusers_predicts(kind):
    """Diffusers takes the last 512 positions for text, and first and last frame as rows of their own."""
    model, size = denoiser(kind)
    tokens, width = model.config.pos_embed_seq_len or 5, model.config.image_dim
    latents, context, image = normal(2, *size, model.config.in_channels), normal(2, 512, 24), normal(2, tokens, width)
    rows = image.reshape(4, -1, width) if model.config.pos_embed_seq_len else image
    theirs = model(first(latents), *map(torch.from_numpy, (TIMES, context, rows))).sample
    given = {"latents": latents, "timestep": TIMES, "context": context}
    assert_close(run(model, given | {"image_context": image})["prediction"], last(theirs))
    with pytest.raises(ValueError, match="needs image_context"):
        run(model, given)


@pytest.mark.parametrize("kind", TEXT | IMAGE)
def test_the_denoisers_config_goes_there_and_back(kind):
    assert_config_round_trip(denoiser(kind)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["odd", "patches", "ends"])
def test_the_denoisers_weights_go_there_and_back(kind, dtype):
    assert_round_trip(denoiser(kind)[0], dtype)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(qk_norm=None), "qk_norm None; supported: 'rms_norm_across_heads'"),
        (dict(added_kv_proj_dim=24), "added_kv_proj_dim 24; supported: None"),
        (dict(image_dim=8), "added_kv_proj_dim None; supported: 24"),
        (dict(freq_dim=31), "freq_dim 31, attention_head_dim 12; both must be even"),
        (dict(pos_embed_seq_len=6), "pos_embed_seq_len needs an image_dim"),
        (dict(vace_layers=[0]), "unknown setting 'vace_layers'"),
    ],
)
def test_a_denoiser_that_computes_something_else_is_refused(wrong, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FAMILY["WanTransformer3DModel"].fields(SMALL | wrong)


def test_a_denoiser_that_wan_has_not_is_not_written():
    family, ours = FAMILY["WanTransformer3DModel"], module(denoiser("odd")[0])
    assert family.fits(ours.clone(absolute=True)) == "it has absolute=True"
    assert family.fits(ours.clone(prediction="noise")) == "it has prediction 'noise'"


def test_no_side_of_the_denoisers_latents_exceeds_its_positions():
    model, _ = denoiser("bare")
    with pytest.raises(ValueError, match=r"\(10, 1, 1\) patches; no side may exceed 9"):
        run(model, {"latents": normal(1, 10, 2, 2, 16), "timestep": TIMES[:1], "context": normal(1, 2, 24)})


def test_a_norm_that_diffusers_ignores_is_left():
    model, _ = denoiser("image")
    source = arrays(model)
    source.arrays["blocks.0.attn2.norm_added_q.weight"] = np.ones(24, np.float32)
    left = plan(FAMILY["WanTransformer3DModel"], module(model), source).left
    assert left == {"blocks.0.attn2.norm_added_q.weight": "diffusers does not use it either"}


def test_inputs_that_are_made_up_fit_the_denoiser():
    for kind in ("odd", "ends"):
        model, _ = denoiser(kind)
        given = inputs("denoiser", module(model))
        out = run(model, given)["prediction"]
        assert out.shape[:-1] == given["latents"].shape[:-1] and np.isfinite(out).all()


# Autoencoder

THIN = dict(base_dim=6, z_dim=3, num_res_blocks=1, latents_mean=[0.5, -1.0, 0.1], latents_std=[2.0, 0.7, 1.5])
VIDEO = {  # kind -> config, size of the video
    "wan": (dict(base_dim=12, dim_mult=[1, 2, 2, 2]), (16, 24)),
    "halved_once": (dict(dim_mult=[1, 3, 2], temperal_downsample=[True, False], decoder_base_dim=10, num_res_blocks=2), (8, 12)),
    "halved_early": (dict(dim_mult=[2, 1, 3], temperal_downsample=[True, True]), (4, 8)),
    "never_halved": (dict(base_dim=5, dim_mult=[1, 2], temperal_downsample=[False]), (6, 4)),
}


def autoencoder(kind) -> tuple[AutoencoderKLWan, tuple[int, int]]:
    config, size = VIDEO[kind]
    return reference(AutoencoderKLWan, **THIN | config), size


def video(frames, size) -> np.ndarray:
    return np.tanh(normal(2, frames, *size, 3))


@pytest.mark.parametrize(
    "kind, frames", [("wan", 9), ("halved_once", 5), ("never_halved", 5), *(("halved_early", n) for n in (1, 5, 13))]
)
def test_video_is_encoded_and_decoded_as_diffusers_does(kind, frames):
    model, size = autoencoder(kind)
    given = video(frames, size)
    ours = run(model, {"video": given})
    latents = model.encode(first(given)).latent_dist.mean
    assert_close(ours["latents"], last(latents))
    theirs = last(model.decode(latents).sample)
    assert_close(ours["reconstruction"], theirs)
    assert theirs.shape == given.shape and np.mean(np.abs(theirs) == 1) < 0.2  # clipped, where nothing is compared


def test_pixels_become_normalised_latents_and_pixels_again():
    model, size = autoencoder("halved_early")
    ours, params = module(model), load(FAMILY["AutoencoderKLWan"], module(model), arrays(model))
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, *size, 3), dtype=np.uint8)

    def there_and_back(ours, frames):
        _, log_variance = ours.encode(to_signed(frames))
        latents = ours.encode_normalised(frames)
        return log_variance, latents, ours.decode_normalised(latents)

    apply = tiny.jit(lambda x: ours.apply({"params": params}, x, method=there_and_back))
    log_variance, latents, pixels = jax.device_get(apply(frames))
    posterior = model.encode(first(np.asarray(to_signed(frames)))).latent_dist
    assert_close(log_variance, last(posterior.logvar))
    assert_close(latents, (last(posterior.mean) - [0.5, -1.0, 0.1]) / [2.0, 0.7, 1.5])
    assert (latents.dtype, pixels.dtype, pixels.shape) == (np.float32, np.uint8, frames.shape)
    expected = to_pixels(last(model.decode(posterior.mean).sample))
    assert np.abs(np.int32(pixels) - np.int32(expected)).max() <= 1  # rounded to the other side at most


@pytest.mark.parametrize("method", ["encode_normalised", "decode_normalised"])
def test_a_longer_clip_takes_no_more_memory_beside_itself_and_its_latents(method):
    """Temporaries of the compiled program for 9, 17 and 33 frames grow by less than 1 %."""
    ours, sizes = module(autoencoder("halved_early")[0]), []
    params = tower_shapes("autoencoder", ours)
    for frames in (9, 17, 33):
        shape = (1, frames, 32, 32, 3) if "encode" in method else (1, *ours.latent_shape(frames, 32, 32))
        x = jax.ShapeDtypeStruct(shape, np.uint8 if method == "encode_normalised" else np.float32)
        program = tiny.jit(lambda params, x: ours.apply({"params": params}, x, method=method)).lower(params, x)
        sizes.append(program.compile().memory_analysis().temp_size_in_bytes)
    assert 0 < max(sizes) < 1.01 * min(sizes)


def test_a_single_frame_makes_every_parameter():
    ours = module(autoencoder("wan")[0])

    def init(video):
        return ours.init(jax.random.key(0), video, method=lambda m, x: m.decode(m.encode(x)[0]))["params"]

    one = nn.meta.unbox(jax.eval_shape(init, jax.ShapeDtypeStruct((1, 1, 8, 8, 3), np.float32)))
    assert one == tower_shapes("autoencoder", ours)


def test_shapes_of_wans_latents():
    ours = WanAutoencoder()
    assert (ours.latent_shape(1, 8, 8), ours.latent_shape(81, 480, 832)) == ((1, 1, 1, 16), (21, 60, 104, 16))
    assert ours.smallest == (5, 16, 16)
    for frames, height, width in ((4, 16, 16), (5, 12, 16), (5, 16, 12)):
        with pytest.raises(ValueError, match=f"{frames} frames of {height}x{width} px; needs 1 . 4k"):
            ours.latent_shape(frames, height, width)
    with pytest.raises(ValueError, match="4 frames; needs 1 . 4k"):
        jax.eval_shape(lambda x: ours.init(jax.random.key(0), x, method="encode"), video(4, (16, 16)))


def test_the_published_config_is_the_default():
    """Wan2.1's vae/config.json."""
    published = dict(
        attn_scales=[], base_dim=96, dim_mult=[1, 2, 4, 4], dropout=0.0, num_res_blocks=2, z_dim=16,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    fields = FAMILY["AutoencoderKLWan"].fields
    assert WanAutoencoder(**fields(published)) == WanAutoencoder(**fields({})) == WanAutoencoder()


@pytest.mark.parametrize("kind", VIDEO)
def test_the_autoencoders_config_goes_there_and_back(kind):
    config, _ = VIDEO[kind]
    time, stages = config.get("temperal_downsample", [False, True, True]), config["dim_mult"]
    scales = dict(scale_factor_temporal=2 ** sum(time), scale_factor_spatial=2 ** (len(stages) - 1))
    assert_config_round_trip(reference(AutoencoderKLWan, **THIN | config | scales))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["wan", "halved_once"])
def test_the_autoencoders_weights_go_there_and_back(kind, dtype):
    assert_round_trip(autoencoder(kind)[0], dtype)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(is_residual=True), "is_residual True; supported: False"),
        (dict(patch_size=2), "patch_size 2; supported: None"),
        (dict(attn_scales=[0.5]), "attn_scales [0.5]; supported: []"),
        (dict(out_channels=12), "out_channels 12; supported: 3"),
        (dict(temperal_downsample=[True] * 3), "temperal_downsample (True, True, True); supported: one a stage"),
        (dict(temperal_downsample=[True]), "temperal_downsample (True,); supported: one a stage"),
        (dict(z_dim=4), "16 latents_mean for z_dim 4"),
        (dict(clip_output=False), "unknown setting 'clip_output'"),
    ],
)
def test_an_autoencoder_that_computes_something_else_is_refused(wrong, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FAMILY["AutoencoderKLWan"].fields(wrong)
