"""GGUF files: written by the `gguf` package as llama.cpp lays them out, read back as transformers' tensors."""

import gguf
import numpy as np
import pytest
from test_weights_llm import FAMILIES, reference
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from g4v_jax.errors import UserError
from g4v_jax.nn.rope import angles as rope_angles
from g4v_jax.weights import tables
from g4v_jax.weights.convert import import_tower
from g4v_jax.weights.gguf import LAYER, TYPES, WHOLE, Gguf

HEADS, KV_HEADS, DIM, VOCAB = 4, 2, 256, 64


def theirs(name: str) -> str:
    """Our family's name of a tensor as GGUF has it."""
    if name in (whole + ".weight" for whole in WHOLE.values()):
        return next(key for key, value in WHOLE.items() if value + ".weight" == name)
    _, _, layer, rest = name.split(".", 3)
    room, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{next(key for key, value in LAYER.items() if value == room)}.{kind}"


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a half-split q or k in the order of interleaved pairs."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    _, state, _ = reference(
        "llama",
        dict(
            hidden_size=DIM,
            intermediate_size=DIM,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            vocab_size=VOCAB,
            num_hidden_layers=2,
            tie_word_embeddings=True,
        ),
    )
    state.pop("lm_head.weight")
    return state


def write(path, state, kind: str, architecture="llama", base=10_000.0, **extra) -> dict[str, np.ndarray]:
    """A GGUF file of the state, matrices quantised as `kind` -> what it holds, dequantised."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(DIM)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(base)
    for key, value in extra.items():
        writer.add_string(key, value)
    quantization, held = gguf.GGMLQuantizationType[kind], {}
    for name, value in state.items():
        if name == "rope_freqs.weight":
            writer.add_tensor(name, value)
            continue
        matrix = value.ndim == 2
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = permuted(value, heads) if heads and architecture == "llama" else value
        if matrix and kind != "F32":
            try:
                data = gguf.quants.quantize(stored, quantization)
            except NotImplementedError:  # K-quants can only be read: any bytes are blocks of one
                block, size = gguf.GGML_QUANT_SIZES[quantization]
                draw = np.random.default_rng(len(name))
                data = draw.integers(0, 60, (stored.shape[0], stored.shape[1] // block * size), np.uint8)
            plain = gguf.quants.dequantize(data, quantization).astype(np.float32)
            if heads and architecture == "llama":
                plain = plain.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            held[name] = plain
            writer.add_tensor(theirs(name), data, raw_dtype=quantization)
        else:
            held[name] = value
            writer.add_tensor(theirs(name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_every_quantisation_comes_out_as_the_package_reads_it(state, tmp_path, kind):
    assert kind in TYPES
    held = write(tmp_path / "x.gguf", state, kind)
    source = Gguf(tmp_path / "x.gguf")
    assert set(source.names()) == held.keys()
    for name, value in held.items():
        assert source.shape(name) == value.shape
        np.testing.assert_array_equal(source.read(name), value)
    tower, report = import_tower(tmp_path / "x.gguf", tmp_path / "tower")
    assert len(report.rows) == len(held) and tower.module.tied and tower.module.num_kv_heads == KV_HEADS
    kernel = tower.file.read("layers/mlp/up/kernel", 1)
    np.testing.assert_array_equal(kernel, held["model.layers.1.mlp.up_proj.weight"].T)


def test_unpermuted_rows_are_what_transformers_computes_with(state, tmp_path):
    """The same logits as from the state that the file was made of."""
    write(tmp_path / "x.gguf", state, "F32")
    source = Gguf(tmp_path / "x.gguf")
    for name in state:
        np.testing.assert_array_equal(source.read(name), state[name], err_msg=name)
    module = FAMILIES["llama"].module(**FAMILIES["llama"].fields(source.config))
    tables.load(FAMILIES["llama"], module, source)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_found_in_the_factors_of_its_frequencies(state, tmp_path, factor):
    """llama.cpp keeps what Llama 3's scaling divides each frequency by; transformers computes the same frequencies."""
    rope = dict(rope_type="llama3", factor=factor, rope_theta=500_000.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=8192)
    config = LlamaConfig(hidden_size=DIM, num_attention_heads=HEADS, rope_parameters=rope, max_position_embeddings=131_072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500_000.0 ** (-np.arange(0, DIM // HEADS, 2, dtype=np.float32) / (DIM // HEADS))
    factors = (plain / scaled.numpy()).astype(np.float32)
    assert factors.min() == pytest.approx(1) and factors.max() == pytest.approx(factor)
    write(tmp_path / "x.gguf", state | {"rope_freqs.weight": factors}, "F32", base=500_000.0)
    source = Gguf(tmp_path / "x.gguf")
    assert source.config["rope_parameters"] == rope and set(source.names()) == state.keys()
    module = FAMILIES["llama"].module(**FAMILIES["llama"].fields(source.config))
    ours = rope_angles(np.array([1]), DIM // HEADS, module.rope_base, module.rope_scaling)
    np.testing.assert_allclose(ours[0], scaled.numpy(), rtol=1e-5)


def test_factors_of_no_published_scaling_are_refused(state, tmp_path):
    write(tmp_path / "x.gguf", state | {"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)}, "F32")
    with pytest.raises(UserError, match="rope_freqs are not those of a published Llama 3"):
        Gguf(tmp_path / "x.gguf").config


def test_files_that_are_refused(state, tmp_path):
    write(tmp_path / "x.gguf", state, "F32", architecture="gptx")
    with pytest.raises(UserError, match="unknown architecture 'gptx'; known: llama, qwen2, qwen3"):
        Gguf(tmp_path / "x.gguf")
    write(tmp_path / "y.gguf", state, "F32")
    data = (tmp_path / "y.gguf").read_bytes()
    (tmp_path / "z.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="z.gguf: not a whole GGUF file"):
        Gguf(tmp_path / "z.gguf")
    write(tmp_path / "w.gguf", state, "Q3_K")
    with pytest.raises(UserError, match="is Q3_K; supported: F32, F16"):
        Gguf(tmp_path / "w.gguf")
