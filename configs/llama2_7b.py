"""Llama-2-7B alone, everything trained: for comparisons with trainers of language models.

    g4v import Llama-2-7b-hf --out=towers/llama2
    g4v plan --config=configs/llama2_7b.py --topology=v5e:16x16

One row of 2,048 tokens a chip on 256 chips, as the published runs of this size have it; AdamW in float32. Sizes: Touvron et
al. 2023b, 6,738,415,616 parameters.
"""

from ml_collections import ConfigDict

from configs import sizes


def get_config() -> ConfigDict:
    """The language model on whatever mesh is there."""
    config = ConfigDict()
    config.objective = "language"
    config.source = "data/talk"
    config.tokenizer = dict(vocab_size=32_000, path="towers/llama2")
    config.model = dict(llm=dict(sizes.LLAMA_7B, norm_eps=1e-5, remat="full", attention="auto"))
    config.data = dict(records="data/talk-records", mixture=dict(dialogue=1.0))
    config.rows = dict(rows=256, tokens=2048)
    config.losses = dict(chunks=1)
    config.init = dict(llm="towers/llama2")
    config.optimizer = dict(name="adamw", learning_rate=3e-4, warmup_steps=500, weight_decay=0.1)
    config.step = dict(micro_batches=1)
    config.train = dict(steps=10_000, checkpoint_every=1000)
    config.mesh = dict(replica=1, fsdp=-1, context=1, tensor=1)
    return config
