"""Steps of one tower that can be compared with other libraries on a CPU.

    g4v bench step --config=configs/bench.py:llm --against=transformers
    g4v bench step --config=configs/bench.py:lora --against=peft
    g4v bench step --config=configs/bench.py:dit --against=diffusers
    g4v bench decode --config=configs/bench.py:llm --against=transformers

`llm` is SmolLM2-135M's shape on 4 rows of 256 tokens, `lora` the same with a frozen base, `dit` a transformer of Wan2.1's kind
with 30 million parameters on 4 clips of 512 patches. float32, AdamW. Weights and data are of chance: nothing is meant to be
trained.
"""

from ml_collections import ConfigDict

from configs import sizes

STAGES = ("llm", "lora", "dit")


def get_config(stage: str = "llm") -> ConfigDict:
    """`stage`: one of STAGES."""
    if stage not in STAGES:
        raise ValueError(f"argument {stage!r}; known: {', '.join(STAGES)}")
    config = ConfigDict()
    config.objective = "language"
    config.tokenizer = dict(vocab_size=49_152)
    config.model = dict(llm=dict(sizes.SMOLLM2_135M, unroll=30))
    config.data = dict(records="data/none", mixture=dict(dialogue=1.0))
    config.rows = dict(rows=4, tokens=256)
    config.losses = dict(chunks=1)
    config.optimizer = dict(name="adamw", learning_rate=3e-4, warmup_steps=10, weight_decay=0.1, clip_norm=1.0)
    config.train = dict(steps=1000)
    if stage == "lora":
        config.model.llm.update(lora=("q", "v"), lora_rank=16, lora_alpha=32.0)
        config.losses.chunks = 4  # of a head that does not learn, which then costs nothing but a loop
        config.trainable = ("llm/.*lora_[ab]",)
        config.init = dict(llm="towers/smollm2")
    if stage == "dit":
        config.objective = "denoising"
        config.model = dict(denoiser=dict(dim=384, mlp_dim=1536, num_layers=12, num_heads=6, latent_channels=16, context_dim=512,
                                          unroll=12))
        config.rows = dict(rows=4, tokens=1)
        config.losses = dict(latents=(8, 16, 16), context=64)
    return config
