"""Denoising diffusion against diffusers, and the paper's UNet and autoencoder as a config's: trained and rendered."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from tiny import normal

from g4v_jax import trees
from g4v_jax.build import Build
from g4v_jax.data.text import Render, Turn
from g4v_jax.diffusion import ddpm
from g4v_jax.diffusion.process import Diffusion, Flow, process
from g4v_jax.errors import UserError
from g4v_jax.infer.assistant import Assistant, SampleSpec
from g4v_jax.models.autoencoder import Autoencoder
from g4v_jax.models.autoencoder_kl import KLAutoencoder
from g4v_jax.models.denoiser import Denoiser
from g4v_jax.models.unet3d import UNet3D
from g4v_jax.train.state import TrainState

STEPS = 40


def scheduler(steps: int | None = None) -> diffusers.DDIMScheduler:
    """DDIM as the published UNets set it."""
    made = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    if steps:
        made.set_timesteps(steps)
    return made


# The process


def test_the_noise_schedule_is_the_published_one():
    np.testing.assert_allclose(ddpm.alphas(), scheduler().alphas_cumprod, rtol=1e-5)


def test_latents_are_noised_as_diffusers_does():
    x0, noise, steps = normal(6, 2, 3, 4), normal(6, 2, 3, 4, seed=1), np.array([0, 1, 37, 500, 998, 999])
    path = process("epsilon")
    ours = path.interpolate(x0, noise, np.float32(steps / 999))
    expected = scheduler().add_noise(*map(torch.from_numpy, (x0, noise, steps)))
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    share = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[steps].reshape(6, 1, 1, 1)
    np.testing.assert_allclose(ours, share**0.5 * np.float64(x0) + (1 - share) ** 0.5 * np.float64(noise), atol=1e-6)
    np.testing.assert_array_equal(path.target(x0, noise), noise)
    np.testing.assert_array_equal(path.estimate(noise, x0, steps), noise)


def test_every_timestep_is_as_likely_and_survives_being_a_time():
    times = np.asarray(process("epsilon").times(jax.random.key(0), (100_000,)))
    steps = np.round(times * 999).astype(int)
    np.testing.assert_allclose(times, steps / 999.0, atol=1e-6)  # half a step is 5e-4
    counts = np.bincount(steps, minlength=1000)
    assert len(counts) == 1000 and counts.min() > 50 and counts.max() < 160  # 100 each, ten standard deviations
    assert abs(steps.mean() - 499.5) < 4 * 289 / 100_000**0.5


def wave(x, t):
    """A nonlinear stand-in for a network, in numpy, torch or jax alike."""
    return x * (0.5 + t) - x * x * 0.05 + t


@pytest.mark.parametrize("steps", [1, 7, 25, 600, 999])
def test_ddim_takes_the_steps_of_diffusers(steps):
    noise, reference = normal(2, 3, 4), scheduler(steps)
    np.testing.assert_array_equal(ddpm.schedule(steps), reference.timesteps)
    seen = []
    ours = process("epsilon").sample(lambda x, t: wave(x, t[:, None, None]), noise, steps)
    reference.alphas_cumprod = torch.from_numpy(ddpm.alphas())  # in float64, so that only our rounding is measured
    reference.final_alpha_cumprod = reference.alphas_cumprod[0]
    x = torch.from_numpy(np.float64(noise))
    for step in reference.timesteps:
        seen.append(int(step))
        x = reference.step(wave(x, step / 999), step, x).prev_sample
    assert len(seen) == steps and seen == sorted(seen, reverse=True)
    assert np.abs(np.asarray(ours) - x.numpy()).max() <= 2e-5 * np.abs(x.numpy()).max()


def test_exact_noise_leads_back_to_the_data():
    """Where the data are one point, the exact noise takes any number of steps to it, but for the last step's share."""
    point, noise = normal(1, 5), normal(8, 5, seed=1)
    share = jnp.float32(ddpm.alphas())

    def epsilon(x, t):
        now = share[jnp.round(t * 999).astype(int)][:, None]
        return (x - now**0.5 * point) / (1 - now) ** 0.5

    for steps in (3, 50):
        out = process("epsilon").sample(epsilon, noise, steps)
        assert np.abs(out - point).max() < 0.1  # √(1 - ā_0) is 0.03


def test_the_process_follows_from_the_prediction():
    assert process("epsilon") == Diffusion() and process("x0", 3.0) == Flow("x0", 3.0)
    with pytest.raises(ValueError, match="are not shifted; got 2.0"):
        process("epsilon", 2.0)
    for steps in (0, 1000):
        with pytest.raises(ValueError, match=f"{steps} sampling steps; must be in 1 ... 999"):
            ddpm.schedule(steps)


# The paper's pair in a config


def config(**changes):
    """`tiny.config` with the UNet and the image autoencoder in it."""
    paper = tiny.config(rows__target_frames=2, rows__target_size=8, losses__drop_rate=0.1)
    paper.model.autoencoder = dict(kind="kl", channels=(8, 16), num_layers=1, groups=4)
    paper.model.denoiser = dict(
        kind="unet3d", channels=(8, 16), attention=(False, False), num_layers=1, head_dim=4, groups=4, dropout=0.0
    )
    paper.trainable = ("denoiser/.*", "conditioner/.*", "queries")
    paper.mesh = dict(fsdp=2, tensor=2)
    paper.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return paper


@pytest.fixture(scope="module")
def build() -> Build:
    return Build(config(), tuple(jax.devices()[:4]))


@pytest.fixture(scope="module")
def trained(build):
    """(all parameters after some steps on one batch, the metrics of every step), on a mesh that splits the UNet."""
    with jax.set_mesh(build.mesh):
        draw = np.random.default_rng(0)

        def weights(path, shape):
            """As a module would start, but much faster: the UNet's last map is silent."""
            if path.startswith("denoiser/out/"):
                return np.zeros(shape.shape, np.float32)
            if path.endswith("/scale"):
                return np.ones(shape.shape, np.float32)
            fan_in = np.prod(shape.shape[:-1]) if path.endswith("/kernel") else 16
            return draw.normal(0, fan_in**-0.5, shape.shape).astype(np.float32)

        blueprint = build.blueprint
        params = {path: weights(path, shape) for path, shape in trees.flatten(blueprint.shapes).items()}
        trainable, frozen = trees.split(trees.unflatten(params), blueprint.trainable)
        ema, _ = trees.split(trainable, blueprint.ema)
        state = TrainState(np.zeros((), np.int32), trainable, build.optimizer.init(trainable), ema)

        def put(tree, shapes):
            return jax.tree.map(lambda x, shape: jax.device_put(jnp.array(x), shape.sharding), tree, shapes)

        state, frozen = put(state, blueprint.state_shapes(build.optimizer)), put(frozen, blueprint.frozen_shapes)
        batch, history = tiny.put(tiny.batch(0, build.shape, ("generate",)), build), []
        step = tiny.step(build, build.optimizer, build.step)
        for _ in range(STEPS):
            state, metrics = step(state, frozen, batch)
            history.append(metrics)
        return jax.device_get(trees.merge(state.trainable, frozen)), jax.device_get(history)


def test_kinds_choose_the_modules(build):
    model = build.model
    assert isinstance(model.denoiser, UNet3D) and isinstance(model.autoencoder, KLAutoencoder)
    assert model.denoiser.latent_channels == 4 and model.denoiser.context_dim == 16
    assert build.latents == (2, 2, 4, 4, 4)
    plain = tiny.build().model
    assert isinstance(plain.denoiser, Denoiser) and isinstance(plain.autoencoder, Autoencoder)
    named = Build(tiny.config(model__denoiser__kind="dit", model__autoencoder__kind="blocks")).model
    assert named == plain and plain.denoiser.context_dim == 16


def test_a_batch_is_learned(trained):
    """Noise is predicted at random timesteps: at first as zero, whose error is one, and soon far better."""
    _, history = trained
    losses = np.array([metrics["loss/generation"] for metrics in history])
    assert np.isfinite(losses).all() and losses[0] == pytest.approx(1.0, abs=0.1)
    assert losses[-10:].mean() < 0.5 * losses[0]


def test_the_trained_pair_renders(build, trained):
    spec = SampleSpec(rows=2, steps=3)
    one = Build(config(mesh=dict(fsdp=1)), tuple(jax.devices()[:1]))
    assistant = Assistant(one.model, trained[0], tiny.tokenizer(), one.shape, spec, one.mesh)
    dialogues = [[Turn("user", "hi"), Turn("assistant", "", render=Render(text))] for text in ("red", "a dot")]
    clips, closed = assistant.render(dialogues, gate=False)
    assert clips.shape == (2, 2, 8, 8, 3) and clips.dtype == np.uint8 and not closed.any()
    assert clips.std() > 1 and (clips[0] != clips[1]).any()


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(model__denoiser__kind="unet"), "model.denoiser.kind: unknown 'unet'; did you mean 'unet3d'"),
        (dict(model__autoencoder__kind="k"), "model.autoencoder.kind: unknown 'k'; did you mean 'kl'"),
        (dict(model__denoiser__dim=8), "model.denoiser has no field 'dim'"),
        (dict(model__denoiser__context_dim=8), "model.denoiser.context_dim follows from other fields"),
        (dict(losses__time_shift=3.0), "losses.time_shift: times of a denoiser that predicts epsilon are not shifted"),
        (dict(sample__steps=1000), "sample.steps: 1000 sampling steps; must be in 1 ... 999"),
        (dict(objective="reconstruction", losses={}), "'reconstruction' trains only .* of kind 'blocks'"),
        (dict(rows__target_size=9), "rows.target_size: autoencoder: frames of 9x9 px; needs k·2 px"),
    ],
)
def test_what_a_config_gets_wrong(changes, message):
    changed = config()
    changed.sample = {}
    with changed.unlocked():
        changed.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    wrong = Build(changed, tuple(jax.devices()[:4]))
    with pytest.raises(UserError, match=message):
        _ = wrong.model, wrong.objective, wrong.sample
