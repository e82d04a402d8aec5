"""The paper's UNet and autoencoder against diffusers: the same outputs from the same random weights, and all back."""

import inspect

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from tiny import normal

from g4v_jax import sharding
from g4v_jax.errors import UserError
from g4v_jax.models.autoencoder import to_pixels
from g4v_jax.weights import modelscope, tables
from g4v_jax.weights.forward import FORWARD

UNETS = {
    "two levels": (
        dict(
            block_out_channels=(12, 24),
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        [(5, 6, 4), (1, 2, 2)],
    ),
    "three levels, odd sides": (
        dict(
            block_out_channels=(12, 24, 24),
            down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
            layers_per_block=2,
            norm_num_groups=3,
            norm_eps=1e-4,
        ),
        [(3, 7, 5), (1, 6, 9)],
    ),
    "heads that do not fill the channels": (
        dict(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
            up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
            layers_per_block=1,
            norm_num_groups=2,
            in_channels=3,
            out_channels=3,
        ),
        [(3, 5, 3)],
    ),
}
KLS = {
    "two levels": (
        dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=3),
        [(3, 6, 10)],
    ),
    "three levels, odd sides": (
        dict(block_out_channels=(12, 24, 24), layers_per_block=2, norm_num_groups=3, scaling_factor=0.5),
        [(1, 9, 14), (5, 8, 4)],
    ),
}
FAMILIES = {family.tower: family for family in modelscope.FAMILIES}
CLASSES = {"denoiser": diffusers.UNet3DConditionModel, "autoencoder": diffusers.AutoencoderKL}


def reference(tower: str, changes: dict):
    """A model of diffusers with every parameter random, its state dict, and our module of its config."""
    changes = dict(changes)
    if tower == "denoiser":
        changes |= dict(attention_head_dim=6, cross_attention_dim=10)
    else:
        for side, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
            changes[f"{side}_block_types"] = (kind,) * len(changes["block_out_channels"])
    model = CLASSES[tower](**changes).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():  # the last of the convolutions over time too: it starts silent
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        scale = parameter.ndim == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter.data, 1.0 if scale else 0.0, fan_in**-0.5)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    family = FAMILIES[tower]
    return model, state, family.module(**family.fields(dict(model.config)))


def run(tower: str, module, params: dict, arrays: dict) -> dict:
    """`FORWARD[tower]` in float64 copies."""
    with jax.set_mesh(sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])):
        forward = tiny.jit(lambda p, a: module.apply({"params": p}, a, np.float32, method=FORWARD[tower]))
        return jax.tree.map(lambda x: np.asarray(x, np.float64), forward(params, arrays))


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def close(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", UNETS)
def test_the_unet_agrees_with_diffusers(case):
    changes, sizes = UNETS[case]
    model, state, module = reference("denoiser", changes)
    params = tables.load(FAMILIES["denoiser"], module, tables.Memory(state))
    for size in sizes:
        arrays = dict(
            latents=normal(2, *size, module.latent_channels),
            timestep=np.array([999, 37], np.float32),
            context=normal(2, 7, module.context_dim),
        )
        with torch.no_grad():
            out = model(
                channels_first(arrays["latents"]),
                torch.from_numpy(arrays["timestep"]).long(),
                torch.from_numpy(arrays["context"]),
            ).sample
        close(run("denoiser", module, params, arrays)["prediction"], np.moveaxis(out.double().numpy(), 1, -1))


def test_a_time_of_one_is_the_last_timestep(one_device):
    _, state, module = reference("denoiser", UNETS["two levels"][0])
    params = tables.load(FAMILIES["denoiser"], module, tables.Memory(state))
    latents, context = normal(2, 1, 2, 2, 4), normal(2, 3, 10)
    call = tiny.jit(lambda p, x, t, c: module.apply({"params": p}, x, t, c))
    predict = tiny.jit(lambda p, x, t, c: module.apply({"params": p}, x, t, c, method="predict"))
    ours = call(params, latents, np.array([1.0, 0.0], np.float32), context)
    np.testing.assert_allclose(ours, predict(params, latents, np.array([999.0, 0.0], np.float32), context), atol=1e-5)


def test_remat_changes_no_gradient(one_device):
    level = dict(block_out_channels=(6,), down_block_types=("DownBlock3D",), up_block_types=("UpBlock3D",))
    _, state, module = reference("denoiser", level | dict(layers_per_block=1, norm_num_groups=2))
    params = tables.load(FAMILIES["denoiser"], module, tables.Memory(state))
    inputs = normal(1, 2, 2, 2, 4), np.array([0.3], np.float32), normal(1, 3, 10)

    def gradient(module):
        loss = lambda p: (module.apply({"params": p}, *inputs) ** 2).sum()  # noqa: E731
        return tiny.jit(jax.grad(loss))(params)

    tiny.assert_close({"denoiser": gradient(module.clone(remat="full"))}, {"denoiser": gradient(module)}, 1e-5)


def test_dropout_is_on_where_a_key_is_given(one_device):
    _, state, module = reference("denoiser", UNETS["two levels"][0])
    params = tables.load(FAMILIES["denoiser"], module, tables.Memory(state))
    inputs = normal(1, 2, 2, 2, 4), np.array([0.3], np.float32), normal(1, 3, 10)
    call = tiny.jit(lambda key: module.apply({"params": params}, *inputs, rngs={"dropout": key}))
    assert np.abs(call(jax.random.key(0)) - call(jax.random.key(1))).max() > 1e-3


@pytest.mark.parametrize("case", KLS)
def test_the_autoencoder_agrees_with_diffusers_frame_by_frame(case):
    changes, sizes = KLS[case]
    model, state, module = reference("autoencoder", changes)
    params = tables.load(FAMILIES["autoencoder"], module, tables.Memory(state))
    for size in sizes:
        video = np.tanh(normal(2, *size, 3))
        with torch.no_grad():
            posterior = model.encode(channels_first(video.reshape(-1, *size[1:], 3))).latent_dist
            decoded = model.decode(posterior.mean).sample
        expected = [np.moveaxis(x.double().numpy(), 1, -1) for x in (posterior.mean, posterior.logvar, decoded)]
        out = run("autoencoder", module, params, {"video": video})
        mean, log_variance, decoded = (x.reshape(2, size[0], *x.shape[1:]) for x in expected)
        close(out["latents"], mean)
        close(out["reconstruction"], decoded)
        with jax.set_mesh(sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])):
            encode = tiny.jit(lambda p, v: module.apply({"params": p}, v, method="encode"))
            close(np.asarray(encode(params, video)[1], np.float64), log_variance)


def test_latents_are_scaled_for_the_denoiser_and_back(one_device):
    _, state, module = reference("autoencoder", KLS["two levels"][0])
    params = tables.load(FAMILIES["autoencoder"], module, tables.Memory(state))
    video = np.random.default_rng(0).integers(0, 256, (1, 2, 6, 6, 3), dtype=np.uint8)
    call = lambda method: tiny.jit(lambda p, x: module.apply({"params": p}, x, method=method))  # noqa: E731
    latents = call("encode_normalised")(params, video)
    mean, _ = call("encode")(params, np.float32(video) / 127.5 - 1)
    assert latents.shape == (1, *module.latent_shape(2, 6, 6)) == (1, 2, 3, 3, 3)
    np.testing.assert_allclose(latents, 0.18215 * mean, atol=1e-5)
    pixels = call("decode_normalised")(params, latents)
    assert pixels.dtype == np.uint8 and pixels.shape == video.shape
    assert np.abs(np.int32(pixels) - np.int32(to_pixels(call("decode")(params, mean)))).max() <= 1
    with pytest.raises(ValueError, match="frames of 7x7 px; needs k·2 px"):
        module.latent_shape(2, 7, 7)


ALL = [("denoiser", case) for case in UNETS] + [("autoencoder", case) for case in KLS]


def changes_of(tower: str, case: str) -> dict:
    return (UNETS if tower == "denoiser" else KLS)[case][0]


@pytest.mark.parametrize("tower,case", ALL)
def test_every_tensor_comes_back_bit_for_bit(tower, case):
    _, state, module = reference(tower, changes_of(tower, case))
    family = FAMILIES[tower]
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        cast = {name: value.astype(dtype) for name, value in state.items()}
        back = tables.unload(family, module, tables.load(family, module, tables.Memory(cast)))
        assert back.keys() == cast.keys()
        for name, value in back.items():
            assert value.dtype == dtype and np.array_equal(value, cast[name]), name


@pytest.mark.parametrize("tower,case", ALL)
def test_config_comes_back(tower, case):
    model, _, module = reference(tower, changes_of(tower, case))
    family = FAMILIES[tower]
    config = family.config(module)
    assert family.module(**family.fields(config)) == module and family.fits(module) is None
    again = CLASSES[tower].from_config(config)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_attention_names_of_older_files():
    _, state, module = reference("autoencoder", KLS["two levels"][0])
    family = FAMILIES["autoencoder"]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(name):
        for new, name_then in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{name_then}.")
        return name

    aged = {older(name): value for name, value in state.items()}
    assert len(aged.keys() - state.keys()) == 16
    new, aged = (tables.load(family, module, tables.Memory(x)) for x in (state, aged))
    jax.tree.map(np.testing.assert_array_equal, new, aged)


def test_the_defaults_are_those_of_the_published_models():
    assert FAMILIES["denoiser"].fields({"_class_name": "UNet3DConditionModel"}) == dict(
        latent_channels=4,
        context_dim=1024,
        channels=(320, 640, 1280, 1280),
        attention=(True, True, True, False),
        num_layers=2,
        head_dim=64,
        groups=32,
        norm_eps=1e-5,
        prediction="epsilon",
    )
    for kind, defaults in ((diffusers.UNet3DConditionModel, modelscope.UNET), (diffusers.AutoencoderKL, modelscope.KL)):
        parameters = inspect.signature(kind.__init__).parameters
        assert {name: parameters[name].default for name in parameters if name != "self"} == defaults


@pytest.mark.parametrize(
    "tower,config,message",
    [
        ("denoiser", dict(act_fn="gelu"), "act_fn 'gelu'; supported: 'silu'"),
        ("denoiser", dict(mid_block_scale_factor=2), "mid_block_scale_factor 2; supported: 1"),
        ("denoiser", dict(out_channels=8), "out_channels 8; supported: 4"),
        ("denoiser", dict(down_block_types=["AttnDownBlock3D"]), "down_block_types 'AttnDownBlock3D'"),
        ("denoiser", dict(up_block_types=["UpBlock3D"] * 4), "up_block_types .*supported"),
        ("denoiser", dict(block_out_channels=[32, 64]), "differ in length"),
        ("denoiser", dict(norm_num_groups=7), "do not divide by norm_num_groups 7"),
        ("denoiser", dict(attention_head_dim=[8, 8, 8, 8]), "attention_head_dim"),
        ("denoiser", dict(motion=True), "unknown setting 'motion' = True"),
        ("autoencoder", dict(shift_factor=0.1), "shift_factor 0.1; supported: None"),
        ("autoencoder", dict(use_quant_conv=False), "use_quant_conv False; supported: True"),
        ("autoencoder", dict(down_block_types=["AttnDownEncoderBlock2D"]), "down_block_types"),
    ],
)
def test_what_is_not_supported(tower, config, message):
    with pytest.raises(UserError, match=message):
        FAMILIES[tower].fields(config)


def test_the_denoiser_that_cannot_be_written():
    module = reference("denoiser", UNETS["two levels"][0])[2]
    assert "predicts the noise" in FAMILIES["denoiser"].fits(module.clone(prediction="velocity"))
