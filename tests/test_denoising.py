"""A denoiser alone: its loss by hand, and that a mesh with latents over context changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from configs import bench
from g4v_jax.build import Build
from g4v_jax.errors import UserError
from g4v_jax.losses.denoising import Denoising
from g4v_jax.plan import advice

DENOISER = dict(dim=48, mlp_dim=96, num_layers=2, num_heads=4, latent_channels=4, context_dim=24)


def config(**mesh) -> ConfigDict:
    found = bench.get_config("dit")
    found.model.denoiser = DENOISER
    found.rows.rows = 4
    found.losses.update(latents=(2, 8, 8), context=8)
    found.mesh = mesh or dict(fsdp=1)
    return found


def build(devices: int = 1, **mesh) -> Build:
    return Build(config(**mesh), tuple(jax.devices()[:devices]))


def one_step(build: Build):
    """(gradients, metrics) of the first step, on any mesh."""
    optimizer = tiny.keep_gradients()
    step = tiny.step(build, optimizer)
    with jax.set_mesh(build.mesh):
        state = build.blueprint.create(jax.random.key(1), optimizer)
        head = state.trainable["denoiser"]["head"]["kernel"]  # zero at the start: nothing before it would learn
        noise = jnp.asarray(tiny.normal(*head.shape), head.dtype)
        state.trainable["denoiser"]["head"]["kernel"] = jax.device_put(noise, head.sharding)
        batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), build.batch_shapes())
        state, metrics = step(state, {}, tiny.put(batch, build))
    return jax.device_get((state.opt_state, metrics))


def test_nothing_but_the_denoiser_is_there():
    one = build()
    assert isinstance(one.objective, Denoising) and set(one.blueprint.shapes) == {"denoiser"}
    assert one.main[0] == "denoiser" and one.length == one.patches == 2 * 4 * 4
    assert "the denoiser's layers, all kept" in " ".join(advice.largest(one, 40))
    assert 'model.denoiser.remat="full"' in advice.remedies(one)


def test_the_loss_is_the_mean_square_of_what_is_left_of_the_velocity():
    one = build()
    draws = one.objective.draw(jax.random.split(jax.random.key(0), 4))
    latents, noise, times, context = draws
    with jax.set_mesh(one.mesh):
        params = one.blueprint.create(jax.random.key(0), tiny.keep_gradients()).trainable
        found = one.objective.terms(params, None, draws, None)["generation"]
        t = times[:, None, None, None, None]
        made = one.denoiser.apply({"params": params["denoiser"]}, (1 - t) * latents + t * noise, times, context)
    expected = np.square(np.asarray(made, np.float64) - np.asarray(noise - latents, np.float64)).mean(axis=(1, 2, 3, 4)).sum()
    np.testing.assert_allclose(float(found.sum), expected, rtol=1e-5)
    assert float(found.count) == 4 and latents.shape == (4, 2, 8, 8, 4) and context.shape == (4, 8, 24)


def test_a_mesh_with_latents_over_context_changes_nothing():
    gradients, metrics = one_step(build(8, fsdp=2, context=4))
    expected, alone = one_step(build())
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    tiny.assert_close(gradients, expected, tolerance=1e-5)
    assert metrics["loss/generation"] == pytest.approx(alone["loss/generation"], rel=1e-5)


def test_frames_and_patches_that_do_not_divide_are_named():
    frames = tiny.config(rows__tokens=80)
    frames.mesh = dict(fsdp=1, context=5)
    height = tiny.config(rows__tokens=48, rows__rows=6, rows__target_size=20)
    height.mesh = dict(fsdp=1, context=3)
    for wrong, message in (
        (config(fsdp=1, context=3), "mesh.context is 3; the number of patches of a clip to render is 32, which 2 or 4 would divide"),
        (frames, "mesh.context is 5; the number of frames that a device watches"),
        (height, "mesh.context is 3; the height of rows.target_size is 20, which 2 or 4 would divide"),
    ):
        with pytest.raises(UserError, match=message):
            Build(wrong, tuple(jax.devices()[: wrong.mesh.context])).step
