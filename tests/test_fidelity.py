"""Renderings beside real clips: the error by noise, agreement and distances by encoders, CLIPSIM beside transformers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from g4v_jax.data.pack import single
from g4v_jax.data.records import Record
from g4v_jax.data.text import Render, Turn, dialogue
from g4v_jax.diffusion.flow import Draws
from g4v_jax.errors import UserError
from g4v_jax.evals import distances, fidelity, noise
from g4v_jax.evals.videos import request
from g4v_jax.infer.assistant import Assistant, SampleSpec

BUILD = tiny.build()
SPEC = SampleSpec(rows=4, max_tokens=4, steps=2)
GENERATOR = np.random.default_rng(0)
CLIPS = {name: tiny.video(GENERATOR, 5, 16, 16) for name in "abcde"}


def record(name: str) -> Record:
    row = dict(videos=(), sha256=(), paraphrases=(), dialogue=(), hazard=False, attributes={}, kind="")
    return Record(id=name, caption=f"go {name}", **row)


RECORDS = [record(name) for name in CLIPS]


def test_the_error_at_each_noise_is_the_generation_loss_there():
    """Against the model's own training pass over one row, with the same noise and time."""
    assistant = Assistant(BUILD.model, tiny.params(), tiny.tokenizer(), BUILD.shape, SPEC, BUILD.mesh)
    figures = noise.measure(assistant, RECORDS, lambda r: CLIPS[r.id], "test")
    assert {name.split("/")[0] for name in figures} == {"denoising", "denoising_bare"}
    assert all(figure.n == 5 for figure in figures.values())
    shape = dataclasses.replace(BUILD.shape, rows=1, clips=1, targets=1, hazards=1)
    key = noise.rng.stream(SPEC.seed, "noise")
    forward = tiny.jit(lambda batch, draws: BUILD.model.apply({"params": tiny.params()}, batch, draws))
    errors = {name: [] for name in ("denoising", "denoising_bare")}
    for i, one in enumerate(RECORDS):
        turns = [*request(one, "test", i), Turn("assistant", render=Render(one.caption, CLIPS[one.id]))]
        batch = single([dialogue(turns, tiny.tokenizer(), shape)], shape)
        start = i // SPEC.rows * SPEC.rows
        own = noise.rng.row_keys(jax.random.fold_in(key, start), SPEC.rows)[i - start]
        drawn = np.asarray(jax.random.normal(own, BUILD.latent_shape))
        for name, drop in (("denoising", False), ("denoising_bare", True)):
            yes = np.ones((1, 1), bool)
            draws = Draws(np.full((1, 1, 1), 0.7, np.float32), drawn[None, None, None], yes * drop, ~yes)
            with jax.set_mesh(BUILD.mesh):
                out = forward(batch, draws)
            errors[name].append(np.mean(np.square(np.float64(out.velocity) - out.velocity_target)))
    for name, values in errors.items():
        assert figures[f"{name}/t0.7"].value == pytest.approx(np.mean(values), rel=1e-4)
    assert figures["denoising/t0.7"].value != pytest.approx(figures["denoising_bare/t0.7"].value, rel=1e-4)


@pytest.fixture(scope="module")
def encoder() -> fidelity.Encoder:
    return fidelity.Encoder("own", BUILD.model.vision, tiny.params()["vision"], BUILD.mesh)


def test_a_clip_agrees_with_itself_and_not_with_others(encoder):
    real = np.stack(list(CLIPS.values()))
    same = fidelity.agreement(encoder, real, real, "x", biased=True)
    assert same["x/agreement_own"].value == pytest.approx(1, abs=1e-5)
    assert same["x/agreement_own_others"].value < 0.5
    assert same["x/frames_own_frechet"].value == pytest.approx(0, abs=1e-4)
    turned = fidelity.agreement(encoder, np.roll(real, 1, axis=0), real, "x", biased=False)
    assert turned["x/agreement_own"].value < 0.5 and "x/frames_own_frechet" not in turned
    features = encoder.frames(real)
    assert features.shape == (5, 5, 32)
    expected = distances.framewise(features[::-1], features + 1, distances.kernel)
    other = fidelity._distances("", features[::-1], features + 1, False, distances.framewise)
    assert other["kernel"].value == pytest.approx(expected) and set(other) == {"kernel"}
    assert fidelity._distances("", features[:3], features, True) == {}


def test_an_encoder_sees_clips_of_any_size_and_number(encoder):
    colours = GENERATOR.integers(256, size=(1, 5, 1, 1, 3), dtype=np.uint8)
    small = np.broadcast_to(colours, (1, 5, 16, 16, 3))
    large = np.broadcast_to(colours, (1, 5, 40, 24, 3))
    np.testing.assert_allclose(encoder.frames(large), encoder.frames(small), atol=1e-5)
    many = np.concatenate([small] * (fidelity.BATCH + 1))
    np.testing.assert_allclose(encoder.frames(many)[-1], encoder.frames(small)[0], atol=1e-5)


def test_an_encoder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no imported tower here"):
        fidelity.Encoder.imported(str(tmp_path))


def test_clipsim_is_that_of_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=sizes | dict(vocab_size=6, max_position_embeddings=8, eos_token_id=1, bos_token_id=0),
        vision_config=sizes | dict(image_size=16, patch_size=8),
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    model.save_pretrained(tmp_path / "clip")
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    videos, texts = np.stack([CLIPS["a"], CLIPS["b"]]), ["a", "b a"]
    found = fidelity.clipsim(str(tmp_path / "clip"), videos, texts, "x")["x/clipsim"]
    expected = []
    model.requires_grad_(False)
    for video, text in zip(videos, texts):
        pixels = images(list(video), return_tensors="pt")["pixel_values"]
        out = model(**tokenizer([text], return_tensors="pt"), pixel_values=pixels)
        expected.append(float(out.logits_per_text.mean() / model.logit_scale.exp()))
    assert found.value == pytest.approx(np.mean(expected), abs=1e-5) and found.n == 2
    with pytest.raises(UserError, match="no CLIP that transformers can read"):
        fidelity.clipsim(str(tmp_path / "nothing"), videos, texts, "x")
