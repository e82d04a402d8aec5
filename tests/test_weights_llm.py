"""LLM families against transformers: the same logits from the same random weights, and every tensor back bit for bit."""

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers

from g4v_jax import sharding
from g4v_jax.errors import UserError
from g4v_jax.weights import llm, tables
from g4v_jax.weights.forward import FORWARD

SMALL = dict(num_hidden_layers=3, vocab_size=61, max_position_embeddings=512)
CASES = {
    "llama 1": ("llama", dict(hidden_size=48, intermediate_size=100, num_attention_heads=6, rms_norm_eps=1e-6)),
    "llama 3": (
        "llama",
        dict(
            hidden_size=40,
            intermediate_size=72,
            num_attention_heads=10,
            num_key_value_heads=2,
            head_dim=12,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=5e5,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    "llama linear, biased": (
        "llama",
        dict(
            hidden_size=36,
            intermediate_size=50,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.5),
        ),
    ),
    "smollm2": (
        "llama",
        dict(
            hidden_size=36,
            intermediate_size=96,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=4,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e5),
            rms_norm_eps=1e-5,
        ),
    ),
    "mistral": (
        "mistral",
        dict(
            hidden_size=32,
            intermediate_size=60,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=6,
            sliding_window=7,
        ),
    ),
    "mistral, no window": (
        "mistral",
        dict(hidden_size=32, intermediate_size=60, num_attention_heads=4, num_key_value_heads=4, sliding_window=None),
    ),
    "qwen2": ("qwen2", dict(hidden_size=28, intermediate_size=44, num_attention_heads=7, num_key_value_heads=1)),
    "qwen3": (
        "qwen3",
        dict(
            hidden_size=24,
            intermediate_size=52,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=10,
            tie_word_embeddings=True,
        ),
    ),
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
FAMILIES = {family.name: family for family in llm.FAMILIES}


def reference(kind: str, changes: dict):
    """A model of transformers with every parameter random, its state dict, and our module of its config."""
    make_config, make_model = CLASSES[kind]
    config = make_config(**SMALL | changes, attn_implementation="eager")
    torch.manual_seed(0)
    model = make_model(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter.data, 1.0 if "norm" in name else 0.0, 0.3)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    module = llm.LLM(**FAMILIES[kind].fields(config.to_dict()))
    return model, state, module


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_transformers(case):
    kind, changes = CASES[case]
    model, state, module = reference(kind, changes)
    params = tables.load(FAMILIES[kind], module, tables.Memory(state))
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 40)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.double().numpy()
    with jax.set_mesh(sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])):
        run = tiny.jit(
            lambda p, t: module.apply({"params": p}, {"tokens": t}, np.float32, method=FORWARD["llm"])["logits"]
        )
        ours = np.asarray(run(params, tokens), np.float64)
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (expected, ours))
    assert np.sum(np.exp(log_p) * (log_p - log_q), -1).max() <= 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_bit_for_bit(case, dtype):
    kind, changes = CASES[case]
    _, state, module = reference(kind, changes)
    state = {name: value.astype(dtype) for name, value in state.items()}
    family = FAMILIES[kind]
    back = tables.unload(family, module, tables.load(family, module, tables.Memory(state)))
    assert back.keys() == state.keys() - ({"lm_head.weight"} if module.tied else set())
    for name, value in back.items():
        assert value.dtype == state[name].dtype and np.array_equal(value, state[name])


@pytest.mark.parametrize("case", CASES)
def test_config_comes_back(case):
    kind, changes = CASES[case]
    _, _, module = reference(kind, changes)
    config = FAMILIES[kind].config(module)
    assert llm.LLM(**FAMILIES[kind].fields(config)) == module
    assert FAMILIES[kind].fits(module) is None
    loaded = CLASSES[kind][0].from_dict(config)
    assert FAMILIES[kind].fields(loaded.to_dict()) == FAMILIES[kind].fields(config)


def test_sources_that_do_not_match():
    kind, changes = CASES["qwen3"]
    _, state, module = reference(kind, changes)
    family = FAMILIES[kind]
    with pytest.raises(UserError, match="1 tensors are missing, the first 'model.norm.weight'"):
        tables.load(family, module, tables.Memory({k: v for k, v in state.items() if k != "model.norm.weight"}))
    extra = state | {"model.extra": np.zeros(1)}
    with pytest.raises(UserError, match="no place, the first 'model.extra'; name them by --ignore"):
        tables.load(family, module, tables.Memory(extra))
    assert tables.load(family, module, tables.Memory(extra), [r"model\.ex.*"])
    wrong = state | {"model.norm.weight": np.zeros(7, np.float32)}
    with pytest.raises(UserError, match=r"model.norm.weight is \[7\], but config.json makes it \[24\]"):
        tables.load(family, module, tables.Memory(wrong))


def test_what_a_family_does_not_support():
    with pytest.raises(UserError, match="rope scaling 'yarn'; supported: linear, llama3"):
        FAMILIES["llama"].fields({"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 2}})
    with pytest.raises(UserError, match="hidden_act 'gelu'"):
        FAMILIES["llama"].fields({"model_type": "llama", "hidden_act": "gelu"})
    with pytest.raises(UserError, match="use_sliding_window"):
        FAMILIES["qwen2"].fields({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9})
