"""GGUF files of LLaMA, Mistral and Qwen models as a source of transformers' tensors, with their tokenizer and template.

May hold the names of that format; the reading and dequantising is the `gguf` package's. llama.cpp stores the rows of a
LLaMA's q and k in the order of interleaved rotary pairs; here they come out in the half-split order again.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from g4v_jax.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
WHOLE = {"token_embd.weight": "model.embed_tokens", "output_norm.weight": "model.norm", "output.weight": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)  # as Meta published all
LLAMA3_FACTORS = (8.0, 32.0)
SPLIT = (  # GPT-4's pre-tokenisation, as Llama 3 (digits in threes) and Qwen2 (one by one) have it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # token types of GGUF


class Gguf:
    """A GGUF file as a Source of float32 tensors under transformers' names, with `config` and `files`.

    Raises UserError for a file that is not one or is cut short, an unknown architecture, or an unknown quantisation.
    """

    def __init__(self, path: str | Path):
        import gguf

        self.path = Path(path)
        try:
            reader = gguf.GGUFReader(self.path)
            tensors = {tensor.name: tensor for tensor in reader.tensors}
            self._values = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package trusts the file: a damaged one fails in many ways
            raise UserError(f"{self.path}: not a whole GGUF file ({error})") from None
        self._dequantize = gguf.quants.dequantize
        self.architecture = self._values.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{self.path}: unknown architecture {self.architecture!r}; known: {', '.join(sorted(ARCHITECTURES))}"
            )
        self._rope_factors = tensors.pop("rope_freqs.weight", None)
        self._tensors = {self._name(name): tensor for name, tensor in tensors.items()}
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name not in TYPES:
                raise UserError(f"{self.path}: {name} is {tensor.tensor_type.name}; supported: {', '.join(TYPES)}")

    def _name(self, name: str) -> str:
        if name in WHOLE:
            return WHOLE[name] + ".weight"
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in LAYER:
            return f"model.layers.{int(parts[1])}.{LAYER[parts[2]]}.{parts[3]}"
        return name  # has no place: the plan will say so

    def names(self):
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        value = self._dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(self.shape(name))
        if self.architecture == "llama" and name.rsplit(".", 2)[-2] in ("q_proj", "k_proj"):
            heads = self._number("attention.head_count" if "q_proj" in name else "attention.head_count_kv")
            value = value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        return value

    def _number(self, key: str, default=None):
        value = self._values.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise UserError(f"{self.path}: says nothing of {self.architecture}.{key}")
        return value

    @property
    def config(self) -> dict:
        """What config.json would say."""
        heads, dim = self._number("attention.head_count"), self._number("embedding_length")
        config = dict(
            architectures=[ARCHITECTURES[self.architecture]],
            model_type=self.architecture,
            vocab_size=self.shape("model.embed_tokens.weight")[0],
            hidden_size=dim,
            intermediate_size=self._number("feed_forward_length"),
            num_hidden_layers=self._number("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._number("attention.head_count_kv", heads),
            head_dim=self._number("attention.key_length", self._number("rope.dimension_count", dim // heads)),
            rms_norm_eps=float(str(np.float32(self._number("attention.layer_norm_rms_epsilon")))),
            max_position_embeddings=self._number("context_length"),
            tie_word_embeddings="lm_head.weight" not in self._tensors,
            rope_parameters=self._rope(),
        )
        for name in ("bos", "eos"):
            token = self._values.get(f"tokenizer.ggml.{name}_token_id")
            if token is not None:
                config[f"{name}_token_id"] = token
        return config

    def _rope(self) -> dict:
        rope = {"rope_type": "default", "rope_theta": self._number("rope.freq_base", 10_000.0)}
        kind = self._number("rope.scaling.type", "none")
        if kind == "linear":
            rope |= {"rope_type": "linear", "factor": self._number("rope.scaling.factor")}
        elif kind != "none":
            raise UserError(f"{self.path}: rope scaling {kind!r}; supported: linear, Llama 3's")
        if self._rope_factors is None:
            return rope
        # Llama 3's scaling comes as the factor of every frequency: find the published setting that gives these
        from g4v_jax.nn.rope import rescale

        factors = np.asarray(self._rope_factors.data, np.float32)
        frequency = rope["rope_theta"] ** (-np.arange(len(factors), dtype=np.float32) / len(factors))
        for factor in LLAMA3_FACTORS:
            scaling = dict(kind="llama3", factor=factor, low_frequency_factor=LLAMA3["low_freq_factor"])
            scaling |= dict(high_frequency_factor=LLAMA3["high_freq_factor"])
            scaling |= dict(original_length=LLAMA3["original_max_position_embeddings"])
            if np.allclose(frequency / rescale(frequency, scaling), factors, rtol=1e-3):
                return rope | LLAMA3 | {"rope_type": "llama3", "factor": factor}
        raise UserError(f"{self.path}: its rope_freqs are not those of a published Llama 3")

    @property
    def files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json as transformers would have them; none for a SentencePiece model."""
        if self._values.get("tokenizer.ggml.model") != "gpt2":
            return {}
        tokens = self._values["tokenizer.ggml.tokens"]
        kinds = self._values["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ", 1)) for merge in self._values["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = self._pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        special = [t for t, kind in zip(tokens, kinds) if kind in (CONTROL, USER_DEFINED)]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name in ("bos", "eos", "unknown", "padding"):
            token = self._values.get(f"tokenizer.ggml.{name}_token_id")
            if token is not None:
                about[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[token]
        template = self._values.get("tokenizer.chat_template")
        if template:
            about["chat_template"] = template
        return {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps(about, indent=1).encode(),
        }

    def _pre_tokenizer(self):
        kind = self._values.get("tokenizer.ggml.pre")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if kind in ("smollm", "starcoder", "command-r"):
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
        if kind in ("llama-bpe", "qwen2"):
            split = Regex(SPLIT.format(digits="{1,3}" if kind == "llama-bpe" else ""))
            letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), letters])
        if kind in ("gpt-2", "default"):
            return plain
        raise UserError(f"{self.path}: unknown pre-tokenisation {kind!r}; known: smollm, llama-bpe, qwen2, gpt-2")
