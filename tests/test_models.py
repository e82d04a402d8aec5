"""The towers, each alone: index arithmetic against loops, and what each may and may not see."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import normal

from g4v_jax.infer.decode import empty_caches, extend, unstack
from g4v_jax.models.autoencoder import TIME_STRIDE, Autoencoder, to_pixels, to_signed
from g4v_jax.models.conditioner import Conditioner
from g4v_jax.models.denoiser import Denoiser
from g4v_jax.models.llm import LLM
from g4v_jax.models.splice import query_positions, splice, take
from g4v_jax.models.vision import Vision

pytestmark = pytest.mark.usefixtures("one_device")


def pixels(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).integers(0, 256, shape, dtype=np.uint8)


def apply(module, params, *args, method=None):
    call = tiny.jit(lambda params, *args: module.apply({"params": params}, *args, method=method))
    return call(params, *args)


def random_params(module, *args) -> dict:
    """Parameters of a module, every one random."""
    shapes = nn.meta.unbox(jax.eval_shape(lambda key: module.init(key, *args), jax.random.key(0)))["params"]
    return jax.tree.map(lambda leaf: normal(*leaf.shape) / max(1, leaf.size // leaf.shape[-1]) ** 0.5, shapes)


def differs(a, b, *axes) -> np.ndarray:
    """Where two arrays differ at all, over the given axes."""
    rest = tuple(axis for axis in range(a.ndim) if axis not in axes)
    return np.any(np.asarray(a) != np.asarray(b), axis=rest)


# Splice


def test_splice_puts_each_vector_in_its_place():
    x, summary, queries = normal(2, 7, 3), normal(2, 4, 3, seed=1), normal(2, 3, seed=2)
    clip_index = np.array([[-1, 0, 1, -1, 3, -1, -1], [-1] * 7])
    query_index = np.array([[-1, -1, -1, -1, -1, 2, 3], [0, 1, -1, -1, -1, -1, -1]])
    out = splice(x, summary, clip_index, queries, query_index)
    for b, s in np.ndindex(2, 7):
        expected = x[b, s]
        if clip_index[b, s] >= 0:
            expected = summary[b, clip_index[b, s]]
        if query_index[b, s] >= 0:
            expected = queries[query_index[b, s] % 2]  # g·N + n -> n
        np.testing.assert_array_equal(out[b, s], expected)


def test_query_positions_and_take():
    index = np.full((2, 9), -1)
    index[0, [2, 3, 7, 8]] = [2, 3, 0, 1]
    index[1, [4, 5]] = [0, 1]
    assert query_positions(jnp.array(index), 4).tolist() == [[7, 8, 2, 3], [4, 5, 0, 0]]
    x, positions = normal(2, 9, 3), np.array([[7, 8, 2], [4, 4, 0]])
    out = take(x, positions)
    for b, m in np.ndindex(2, 3):
        np.testing.assert_array_equal(out[b, m], x[b, positions[b, m]])


# Vision


@pytest.mark.parametrize("class_token", [True, False])
def test_vision_cuts_a_frame_into_patches_in_raster_order(class_token):
    """With silent layers the features are the patches' projections, so they can be told pixel by pixel."""
    module = Vision(8, 4, dim=6, mlp_dim=4, num_layers=1, num_heads=2, class_token=class_token, pre_norm=False)
    frames = pixels(3, 8, 8, 3)
    params = random_params(module, frames, jnp.float32)
    for silent in (params["layers"]["attention"]["o"], params["layers"]["mlp"]["down"]):
        silent |= jax.tree.map(np.zeros_like, silent)
    out = apply(module, params, frames, method=lambda m, x: m(x, jnp.float32))
    assert out.shape == (3, module.patches, 6) == (3, 4 + class_token, 6)

    kernel = np.float64(params["patch"]["kernel"]).reshape(4, 4, 3, 6)
    for x, i, j in np.ndindex(3, 2, 2):
        expected, place = np.zeros(6), class_token + 2 * i + j
        for row, column, channel in np.ndindex(4, 4, 3):
            value = frames[x, 4 * i + row, 4 * j + column, channel] / 255
            expected += (value - module.mean[channel]) / module.std[channel] * kernel[row, column, channel]
        np.testing.assert_allclose(out[x, place], expected + params["positions"][place], atol=1e-5)
    if class_token:
        expected = np.tile(params["class"] + params["positions"][0], (3, 1))
        np.testing.assert_allclose(out[:, 0], expected, atol=1e-6)


def test_vision_sees_each_frame_alone_and_all_of_it(model):
    frames, params = pixels(2, 16, 16, 3), tiny.params()["vision"]
    touched = frames.copy()
    touched[1, 15, 15] = 255 - touched[1, 15, 15]
    run = lambda x: apply(model.vision, params, x, method=lambda m, x: m(x, jnp.float32))  # noqa: E731
    assert differs(run(frames), run(touched), 0, 1).tolist() == [[False] * 5, [True] * 5]


def test_the_convolutional_stem_gives_one_position_a_patch():
    module = Vision(16, 8, dim=8, mlp_dim=8, num_layers=1, num_heads=2, stem="conv")
    frames = pixels(2, 16, 16, 3)
    params = random_params(module, frames, jnp.float32)
    assert apply(module, params, frames, method=lambda m, x: m(x, jnp.float32)).shape == (2, 5, 8)
    assert [params[f"stem_{i}"]["kernel"].shape[-1] for i in range(3)] == [2, 4, 8]
    for wrong in (dict(stem="convolution", patch_size=8), dict(stem="conv", patch_size=6)):
        with pytest.raises(ValueError, match="conv needs a power of two"):
            Vision(24, dim=8, mlp_dim=8, num_layers=1, num_heads=2, **wrong).init(
                jax.random.key(0), pixels(1, 24, 24, 3), jnp.float32
            )


# Summarizer


def test_a_clip_becomes_as_many_tokens_as_it_has_queries_and_an_end(model):
    features, times = normal(3, 2, 5, 32), np.array([[0, 1]] * 3, np.float32)
    params = tiny.params()["summarizer"]
    tokens = apply(model.summarizer, params, features, times)
    assert tokens.shape == (3, model.summarizer.tokens, 32) == (3, model.summarizer.num_queries + 1, 32)
    np.testing.assert_array_equal(tokens[:, -1], np.tile(params["end"], (3, 1)))
    assert not np.allclose(tokens[0, 0], tokens[0, 1]) and not np.allclose(tokens[0, 0], tokens[1, 0])
    touched = features.copy()
    touched[1, 1, 4] += 1
    assert differs(tokens, apply(model.summarizer, params, touched, times), 0).tolist() == [False, True, False]


@pytest.mark.parametrize("time_encoding", [True, False])
def test_the_order_of_frames_is_told_by_their_seconds_alone(model, time_encoding):
    summarizer = model.summarizer.clone(time_encoding=time_encoding)
    features, times, params = normal(1, 4, 5, 32), np.array([[0, 0.5, 1.4, 2]], np.float32), tiny.params()["summarizer"]
    straight = apply(summarizer, params, features, times)
    inner = [0, 2, 1, 3]  # a clip lasts from its first frame to its last
    moved = apply(summarizer, params, features[:, inner], times[:, inner])
    np.testing.assert_allclose(moved, straight, atol=1e-5)
    reordered = apply(summarizer, params, features[:, inner], times)
    assert np.allclose(reordered, straight, atol=1e-5) != time_encoding


def test_any_number_of_frames_is_summarised_and_a_slower_clip_of_the_same_frames_differs(model):
    params = tiny.params()["summarizer"]
    features = normal(1, 6, 5, 32)
    for frames in (1, 2, 6):
        times = np.arange(frames, dtype=np.float32)[None]
        tokens = np.asarray(apply(model.summarizer, params, features[:, :frames], times))
        assert tokens.shape == (1, model.summarizer.tokens, 32) and np.isfinite(tokens).all()
    assert not np.allclose(tokens, apply(model.summarizer, params, features, 2 * times))


# Language model


def llm_params() -> dict:
    return tiny.params()["llm"]


def hidden(llm, x, positions, segments) -> np.ndarray:
    return np.asarray(apply(llm, llm_params(), x, positions, segments, method="hidden"))


def test_packed_rows_equal_separate_rows(model):
    lengths, x = (5, 3, 4), normal(1, 14, 32)
    segments = np.array([[1] * 5 + [2] * 3 + [3] * 4 + [0] * 2])
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])[None]
    packed = hidden(model.llm, x, positions, segments)
    start = 0
    for length in lengths:
        place = slice(start, start + length)
        alone = hidden(model.llm, x[:, place], np.arange(length)[None], np.ones((1, length), np.int32))
        np.testing.assert_allclose(packed[:, place], alone, atol=1e-5)
        start += length


def test_no_token_sees_a_later_one(model):
    x, positions, segments = normal(1, 6, 32), np.arange(6)[None], np.ones((1, 6), np.int32)
    touched = x.copy()
    touched[0, 3] += 1
    changed = differs(hidden(model.llm, x, positions, segments), hidden(model.llm, touched, positions, segments), 1)
    assert changed.tolist() == [False] * 3 + [True] * 3


def test_going_on_from_a_cache_equals_one_pass(model):
    """Two rows of different length: a padded prompt, then one token a row at a time."""
    lengths, x = np.array([6, 4]), normal(2, 8, 32)
    full = hidden(model.llm, x, np.tile(np.arange(8), (2, 1)), np.ones((2, 8), np.int32))
    layers = unstack(llm_params()["layers"])

    @tiny.jit
    def read(x, start, caches):
        x, caches = extend(model.llm, layers, x, start, caches)
        return model.llm.apply({"params": llm_params()}, x, method=lambda m, h: m.norm(h)), caches

    states, caches = read(x[:, :6], None, empty_caches(model.llm, 2, 9, jnp.float32))
    np.testing.assert_allclose(states[0], full[0, :6], atol=1e-5)
    np.testing.assert_allclose(states[1, :4], full[1, :4], atol=1e-5)
    for i in range(2):
        places = lengths + i
        states, caches = read(np.stack([x[b, places[b]] for b in range(2)])[:, None], places, caches)
        for b in range(2):
            np.testing.assert_allclose(states[b, 0], full[b, places[b]], atol=1e-5)


def test_logits_come_from_the_table_or_from_a_head(model):
    x = normal(2, 3, 32)
    tied = apply(model.llm, llm_params(), x, method="logits")
    np.testing.assert_allclose(tied, np.float64(x) @ np.float64(llm_params()["embedding"]["table"]).T, atol=1e-5)
    params = llm_params() | {"head": {"kernel": normal(32, 264)}}
    untied = apply(model.llm.clone(tied=False), params, x, method="logits")
    np.testing.assert_allclose(untied, np.float64(x) @ params["head"]["kernel"], atol=1e-4)
    assert tied.dtype == untied.dtype == jnp.float32


def test_lora_goes_where_it_is_asked_to():
    def paths(*lora):
        llm = LLM(vocab_size=8, dim=4, mlp_dim=4, num_layers=1, num_heads=2, head_dim=2, lora=lora, lora_rank=1)
        x = normal(1, 2, 4)
        init = lambda key: llm.init(key, x, np.zeros((1, 2)), np.ones((1, 2)), method="hidden")  # noqa: E731
        flat = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, jax.random.key(0)))
        return {path[-3].key for path, _ in flat if path[-2].key == "lora_a"}

    assert paths("q", "o") == {"q", "o"} and paths("mlp", "v") == {"v", "up", "gate", "down"} and paths() == set()
    with pytest.raises(ValueError, match=r"unknown map \['query'\]; known: q, k, v, o, mlp"):
        paths("query")


# Conditioner


def test_the_conditioner_chooses_a_context_for_each_slot():
    module = Conditioner(dim=3, length=2)
    states = normal(4, 2, 2, 5)
    drop, block = np.array([False, True, False, True]), np.array([False, False, True, True])
    learned = {"null": normal(2, 3, seed=1), "blocked": normal(2, 3, seed=2)}
    params = random_params(module, states, drop, block) | learned
    out = np.asarray(apply(module, params, states, drop, block))
    free = np.asarray(apply(module, params, states, np.zeros(4, bool), np.zeros(4, bool)))
    np.testing.assert_array_equal(out, [free[0], params["null"], params["blocked"], params["blocked"]])
    assert differs(free[0], free[1], 0).all()


# Autoencoder


def test_pixels_round_trip():
    values = np.arange(256, dtype=np.uint8)
    signed = np.asarray(to_signed(values))
    assert signed[0] == -1 and signed[255] == 1 and (np.diff(signed) > 0).all()
    np.testing.assert_array_equal(to_pixels(signed), values)
    np.testing.assert_array_equal(to_pixels(np.array([-3.0, 3.0])), [0, 255])  # clipped
    np.testing.assert_array_equal(to_pixels(np.array([0.001, -0.002])), [128, 127])  # rounded


def test_shapes_of_latents(model):
    autoencoder, params = model.autoencoder, tiny.params()["autoencoder"]
    assert autoencoder.latent_shape(1, 16, 16) == (1, 4, 4, 8) and autoencoder.latent_shape(9, 32, 48) == (3, 8, 12, 8)
    video = pixels(2, 9, 16, 16, 3)
    out = apply(autoencoder, params, video)
    assert out.mean.shape == out.log_variance.shape == (2, *autoencoder.latent_shape(9, 16, 16))
    assert out.video.shape == video.shape
    assert autoencoder.smallest == (5, 8, 8) and model.denoiser.smallest == (2, 4, 4)
    for frames, height, width in ((8, 16, 16), (9, 18, 16), (9, 16, 18)):
        with pytest.raises(ValueError, match=f"{frames} frames of {height}x{width} px; needs 1 . 4k"):
            autoencoder.latent_shape(frames, height, width)


def test_neither_way_does_the_autoencoder_look_ahead(model):
    """Frame 0 makes latent 0, frames 1 + 4k ... 4 + 4k make latent k + 1, and each reaches its own and later ones."""
    autoencoder, params = model.autoencoder, tiny.params()["autoencoder"]
    encode = tiny.jit(lambda x: autoencoder.apply({"params": params}, x, method="encode"))
    decode = tiny.jit(lambda z: autoencoder.apply({"params": params}, z, method="decode"))
    video, latents = normal(1, 9, 8, 8, 3), normal(1, 3, 2, 2, 8)
    before, pictures = encode(video), decode(latents)
    for frame in range(9):
        touched = video.copy()
        touched[0, frame] += 1
        first = -(-frame // TIME_STRIDE)
        for old, new in zip(before, encode(touched)):  # mean and log variance
            assert differs(old, new, 1)[: first + 1].tolist() == [False] * first + [True]
    for latent in range(3):
        touched = latents.copy()
        touched[0, latent] += 1
        first = max(0, 1 + TIME_STRIDE * (latent - 1))
        changed = differs(pictures, decode(touched), 1)
        assert not changed[:first].any() and changed[first : 1 + TIME_STRIDE * latent].all()


def test_the_decoder_lays_pixels_where_the_encoder_took_them():
    """Linear paths of the identity and silent residuals: every pixel must come back where it was."""
    width = TIME_STRIDE * 2 * 2 * 3
    module = Autoencoder(latent_channels=width, patch=2, dim=4)
    video = pixels(2, 5, 4, 6, 3)
    params = jax.tree.map(np.zeros_like, random_params(module, video))
    for half in ("encoder", "decoder"):
        params[half]["linear"]["kernel"] = np.eye(width)
    out = apply(module, params, video)
    np.testing.assert_allclose(out.video, to_signed(video), atol=1e-6)
    np.testing.assert_array_equal(out.log_variance, np.full_like(out.mean, -3.0))


def test_latents_are_normalised_by_the_statistics_and_back(model):
    autoencoder, params = model.autoencoder, tiny.params()["autoencoder"]
    video = pixels(1, 5, 16, 16, 3)
    mean, square = np.float64(params["latent_mean"]), np.float64(params["latent_square"])
    std = np.sqrt(square - mean**2)
    assert (square - mean**2 > 0.1).all()
    plain, _ = apply(autoencoder, params, to_signed(video), method="encode")
    normalised = apply(autoencoder, params, video, method="encode_normalised")
    np.testing.assert_allclose(normalised, (np.float64(plain) - mean) / std, atol=1e-4)
    expected = to_pixels(apply(autoencoder, params, plain, method="decode"))
    decoded = apply(autoencoder, params, normalised, method="decode_normalised")
    assert decoded.dtype == np.uint8 and np.abs(np.int32(decoded) - np.int32(expected)).max() <= 1


def test_the_posteriors_noise_and_the_smoothing_are_added_before_decoding(model):
    autoencoder, params = model.autoencoder, tiny.params()["autoencoder"]
    video, noise = pixels(1, 5, 16, 16, 3), normal(2, 1, 2, 4, 4, 8)
    run = tiny.jit(lambda v, n, s: autoencoder.apply({"params": params}, v, n, s))
    out = run(video, noise, 0.3)
    z = np.float64(out.mean) + np.exp(0.5 * np.float64(out.log_variance)) * noise[0] + 0.3 * noise[1]
    expected = apply(autoencoder, params, np.float32(z), method="decode")
    np.testing.assert_allclose(out.video, expected, atol=1e-4)


# Denoiser


def test_the_denoiser_starts_silent_and_does_not_stay_so():
    module = Denoiser(dim=12, mlp_dim=8, num_layers=1, num_heads=2, latent_channels=3, context_dim=5, absolute=True)
    inputs = normal(2, 2, 4, 4, 3), np.array([0.1, 0.9], np.float32), normal(2, 2, 5)
    key = jax.random.key(0, impl="unsafe_rbg")  # the quickest to compile
    params = nn.meta.unbox(tiny.jit(module.init)(key, *inputs))["params"]

    def total(head):
        out = module.apply({"params": params | {"head": head}}, *inputs)
        return jnp.sum(out), out

    gradient, out = tiny.jit(jax.grad(total, has_aux=True))(params["head"])
    np.testing.assert_array_equal(out, np.zeros((2, 2, 4, 4, 3)))
    assert np.abs(gradient["kernel"]).max() > 0


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_patches_are_cut_in_raster_order_and_laid_back(patch):
    module = Denoiser(dim=8, mlp_dim=8, num_layers=1, num_heads=2, latent_channels=3, context_dim=5, patch=patch)
    x = normal(2, 4, 6, 6, 3)
    tokens, grid = module.apply({}, x, method="_patchify")
    assert grid == tuple(n // p for n, p in zip((4, 6, 6), patch))
    for number, place in enumerate(itertools.product(*map(range, grid))):
        corner = [p * n for p, n in zip(patch, place)]
        t, h, w = (slice(start, start + n) for start, n in zip(corner, patch))
        np.testing.assert_array_equal(tokens[:, number], x[:, t, h, w].reshape(2, -1))
    np.testing.assert_array_equal(module.apply({}, tokens, grid, method="_unpatchify"), x)


def test_latents_that_do_not_divide_into_patches_are_named():
    module = Denoiser(dim=8, mlp_dim=8, num_layers=1, num_heads=2, latent_channels=3, context_dim=5)
    with pytest.raises(ValueError, match=r"latents \(2, 3, 4\) do not divide by patch \(1, 2, 2\)"):
        module.init(jax.random.key(0), normal(1, 2, 3, 4, 3), np.zeros(1), normal(1, 2, 5))


def test_times_are_embedded_on_the_references_scale(model):
    latents, context, params = normal(1, 2, 4, 4, 8), normal(1, 2, 16), tiny.params()["denoiser"]
    at_time = apply(model.denoiser, params, latents, np.array([0.25], np.float32), context)
    at_step = apply(model.denoiser, params, latents, np.array([250.0], np.float32), context, method="predict")
    np.testing.assert_array_equal(at_time, at_step)


def test_each_sample_is_denoised_alone_by_its_latents_time_and_context(model):
    params = tiny.params()["denoiser"]
    run = tiny.jit(lambda *inputs: model.denoiser.apply({"params": params}, *inputs))
    inputs = [normal(2, 2, 4, 4, 8), np.array([0.2, 0.7], np.float32), normal(2, 2, 16)]
    before = run(*inputs)
    for i in range(3):
        touched = [x.copy() for x in inputs]
        touched[i][1] += 0.1
        assert differs(before, run(*touched), 0).tolist() == [False, True], i
    touched = [x.copy() for x in inputs]
    touched[0][1, 0, 0, 0] += 1
    assert differs(before, run(*touched), 1, 2, 3)[1].all()  # every place sees every other
