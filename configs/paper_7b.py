"""GPT4Video's sizes: ViT-L/14, the 64 + 64 query summarizer (65 tokens a clip, no frame order), LLaMA-7B with LoRA.

    g4v check --config=configs/paper_7b.py --devices=8

The towers are frozen but for LoRA on q and v (rank 16, alpha 16, dropout 0.1), the summarizer and what joins the parts;
the generator is the latent video transformer of `g4v_8b.py`. Needs the towers' weights under runs/towers.
"""

from ml_collections import ConfigDict

from configs import sizes

FROZEN = ("vision", "llm", "autoencoder")


def get_config() -> ConfigDict:
    """The 7B model on whatever mesh is there."""
    config = ConfigDict()
    config.source = "data/clips"
    config.tokenizer = dict(vocab_size=32_008)
    config.model = dict(
        vision=sizes.VIT_L14,
        summarizer=dict(sizes.ABSTRACTOR, time_encoding=False),
        llm=dict(sizes.LLAMA_7B, lora=("q", "v"), lora_rank=16, lora_alpha=16.0, lora_dropout=0.1, remat="full"),
        conditioner=dict(dim=4096),
        autoencoder=dict(latent_channels=16, patch=8, dim=384, num_blocks=4),
        denoiser=dict(sizes.WAN_1B, remat="full"),
    )
    config.data = dict(records="data/clips-records", mixture=dict(caption=0.5, generate=0.3, dialogue=0.2))
    config.rows = dict(rows=64, tokens=2048, clips=8, targets=2, hazards=16, query_tokens=64,
                       clip_frames=8, target_frames=17, target_size=256)
    config.trainable = (r"llm/.*lora_[ab]", "summarizer/.*", "conditioner/.*", "denoiser/.*", "queries", "hazard/.*")
    config.ema = ("denoiser/.*",)
    config.init = {tower: f"runs/towers/{tower}" for tower in FROZEN}
    config.optimizer = dict(name="adamw", learning_rate=1e-4, warmup_steps=500)
    config.losses = dict(time_shift=3.0)
    config.step = dict(micro_batches=1)
    config.train = dict(steps=20_000, checkpoint_every=1000)
    config.mesh = dict(replica=1, fsdp=-1, context=1, tensor=1)
    return config
