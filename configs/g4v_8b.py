"""The model this project is for: SigLIP so400m, Qwen3-8B, and a Wan2.1-1.3B-shaped denoiser.

    g4v check --config=configs/g4v_8b.py --devices=8

The LLM carries LoRA on every map; summaries know the time of each frame. Needs the towers' weights under runs/towers.
"""

from ml_collections import ConfigDict

from configs import paper_7b, sizes


def get_config() -> ConfigDict:
    """The 8B model on whatever mesh is there."""
    config = paper_7b.get_config()
    config.tokenizer.vocab_size = 151_944
    config.model.vision = dict(sizes.SIGLIP_SO400M, image_size=378)
    config.model.summarizer = dict(sizes.ABSTRACTOR)
    config.model.llm = dict(
        sizes.QWEN3_8B, lora=("q", "k", "v", "o", "mlp"), lora_rank=64, lora_alpha=64.0, remat="full"
    )
    config.rows.update(clip_frames=16, target_frames=33)
    config.optimizer.learning_rate = 2e-4
    return config
