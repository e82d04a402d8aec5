"""LLMs as transformers lays them out: LLaMA 1/2/3 and SmolLM2, Mistral, Qwen2/2.5, Qwen3.

May hold their name table (one serves all) and their config.json both ways. Computation: `models/llm.py`, which agrees
with transformers' `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` and `Qwen3ForCausalLM`.
"""

from g4v_jax.errors import UserError
from g4v_jax.models.llm import LLM
from g4v_jax.weights.tables import FLAT, SAME, Entry, Family, kernel

DEFAULTS = {  # what transformers takes where config.json says nothing
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
OTHERS = {
    "llama": {},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
}
LLAMA3_KEYS = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}


def _entries(module: LLM) -> list[Entry]:
    entries = [Entry("embedding/table", "model.embed_tokens.weight"), Entry("norm/scale", "model.norm.weight")]
    if not module.tied:
        entries.append(Entry("head/kernel", "lm_head.weight", kernel()))
    layer = "model.layers.{}."
    for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        entries.append(Entry(f"layers/{ours}/scale", f"{layer}{theirs}.weight", SAME))
    for name in ("q", "k", "v", "o"):
        theirs = f"{layer}self_attn.{name}_proj"
        entries.append(Entry(f"layers/attention/{name}/kernel", f"{theirs}.weight", kernel(2 if name == "o" else 1)))
        if module.out_bias if name == "o" else module.qkv_bias:
            entries.append(Entry(f"layers/attention/{name}/bias", f"{theirs}.bias", FLAT))
    if module.qk_norm:
        for name in ("q_norm", "k_norm"):
            entries.append(Entry(f"layers/attention/{name}/scale", f"{layer}self_attn.{name}.weight"))
    for name in ("gate", "up", "down"):
        entries.append(Entry(f"layers/mlp/{name}/kernel", f"{layer}mlp.{name}_proj.weight", kernel()))
        if module.mlp_bias:
            entries.append(Entry(f"layers/mlp/{name}/bias", f"{layer}mlp.{name}_proj.bias", FLAT))
    return entries


def _left(module: LLM) -> dict[str, str]:
    left = {r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed from the config"}
    if module.tied:
        left[r"lm_head\.weight"] = "tied: the same as the embedding"
    return left


def _fields(config: dict) -> dict:
    kind = config.get("model_type")
    given = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    config = DEFAULTS | OTHERS[kind] | given
    heads = config["num_attention_heads"]
    if config["hidden_act"] != "silu":
        raise UserError(f"config.json: hidden_act {config['hidden_act']!r}; supported: silu")
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    if kind != "mistral" and window is not None:
        raise UserError("config.json: use_sliding_window mixes kinds of layers, which is not supported")
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    qkv_bias = kind == "qwen2" or config["attention_bias"]
    return dict(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_base=float(rope.get("rope_theta", config["rope_theta"])),
        rope_scaling=_scaling(rope),
        sliding_window=window,
        norm_eps=config["rms_norm_eps"],
        qk_norm="head" if kind == "qwen3" else None,
        qkv_bias=qkv_bias,
        out_bias=qkv_bias and kind != "qwen2",
        mlp_bias=config["mlp_bias"] if kind == "llama" else False,
        tied=config["tie_word_embeddings"],
    )


def _scaling(rope: dict) -> dict | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": float(rope["factor"])}
    if kind == "llama3":
        return {"kind": "llama3"} | {ours: float(rope[theirs]) for ours, theirs in LLAMA3_KEYS.items()}
    raise UserError(f"config.json: rope scaling {kind!r}; supported: linear, llama3")


def _config(kind: str, architecture: str):
    def config(module: LLM) -> dict:
        rope = {"rope_theta": module.rope_base, "rope_type": "default"}
        if module.rope_scaling:
            scaling = dict(module.rope_scaling)
            rope["rope_type"] = scaling.pop("kind")
            rope |= {LLAMA3_KEYS[name]: value for name, value in scaling.items()}
            if "original_max_position_embeddings" in rope:
                rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
        out = dict(
            architectures=[architecture],
            model_type=kind,
            vocab_size=module.vocab_size + module.added_tokens,
            hidden_size=module.dim,
            intermediate_size=module.mlp_dim,
            num_hidden_layers=module.num_layers,
            num_attention_heads=module.num_heads,
            num_key_value_heads=module.num_kv_heads or module.num_heads,
            head_dim=module.head_dim,
            hidden_act="silu",
            rms_norm_eps=module.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=module.tied,
        )
        if kind in ("llama", "qwen3"):
            out["attention_bias"] = module.qkv_bias
        if kind == "llama":
            out["mlp_bias"] = module.mlp_bias
        if kind == "mistral":
            out["sliding_window"] = module.sliding_window
        return out

    return config


def _fits(kind: str):
    def fits(module: LLM) -> str | None:
        if module.qk_norm != ("head" if kind == "qwen3" else None):
            return f"it has qk_norm {module.qk_norm!r}"
        if module.sliding_window is not None and kind != "mistral":
            return f"it has sliding_window {module.sliding_window}"
        bias = (module.qkv_bias, module.out_bias)
        if bias not in {"mistral": [(False, False)], "qwen2": [(True, False)]}.get(kind, [(False,) * 2, (True,) * 2]):
            return f"it has qkv_bias, out_bias {bias}"
        if module.mlp_bias and kind != "llama":
            return "it has mlp_bias"
        return None

    return fits


FAMILIES = tuple(
    Family(
        name=kind,
        tower="llm",
        architectures=(architecture,),
        module=LLM,
        fields=_fields,
        config=_config(kind, architecture),
        fits=_fits(kind),
        entries=_entries,
        left=_left,
    )
    for kind, architecture in (
        ("llama", "LlamaForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
    )
)
