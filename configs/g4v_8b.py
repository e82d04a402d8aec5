"""The model this project is for: SigLIP so400m, Qwen3-8B, and Wan2.1-1.3B with its video autoencoder.

    g4v import siglip-so400m-patch14-384          --out=towers/g4v/vision
    g4v import Qwen3-8B                           --out=towers/g4v/llm
    g4v import Wan2.1-T2V-1.3B-Diffusers/vae      --out=towers/g4v/autoencoder
    g4v import Wan2.1-T2V-1.3B-Diffusers/transformer --out=towers/g4v/denoiser
    g4v check --config=configs/g4v_8b.py --devices=8

The LLM carries LoRA on every map; summaries know the time of each frame; the summarizer, the conditioner and the whole
denoiser learn.
"""

from ml_collections import ConfigDict

from configs import paper_7b, sizes

TOWERS = ("vision", "llm", "autoencoder", "denoiser")


def get_config() -> ConfigDict:
    """The 8B model on whatever mesh is there."""
    config = paper_7b.get_config()
    config.tokenizer.vocab_size = 151_944
    config.model = dict(
        vision=sizes.SIGLIP_SO400M,
        summarizer=sizes.SUMMARIZER,
        llm=dict(sizes.QWEN3_8B, added_tokens=8, lora=("q", "k", "v", "o", "mlp"), lora_rank=64, lora_alpha=64.0,
                 remat="full"),
        conditioner=dict(dim=4096),
        autoencoder=dict(kind="wan"),
        denoiser=dict(sizes.WAN_1B, remat="full"),
    )
    config.rows = dict(config.rows, clip_frames=16, target_frames=33, target_size=(256, 256))  # a pair: so flags can set one
    config.trainable = (*config.trainable, "summarizer/.*", "denoiser/.*")
    config.ema = ("denoiser/.*",)
    config.init = {tower: f"towers/g4v/{tower}" for tower in TOWERS}
    config.losses = dict(time_shift=3.0)
    config.sample.guidance = 5.0
    config.optimizer = dict(name="adamw", learning_rate=2e-4, warmup_steps=500)
    config.train.steps = 20_000
    return config
