"""Parts of the 8B model, each trained alone, to set beside the step that trains all of them at once.

    g4v plan --config=configs/g4v_8b.py              --topology=v5p:4x4x16 --config.rows.rows=256
    g4v plan --config=configs/g4v_8b_parts.py:watch  --topology=v5p:4x4x16 --config.rows.rows=256
    g4v plan --config=configs/g4v_8b_parts.py:read   --topology=v5p:4x4x16 --config.rows.rows=256
    g4v plan --config=configs/g4v_8b_parts.py:render --topology=v5p:4x4x16 --config.rows.rows=256

`watch`: vision and summarizer; `read`: the LLM with its LoRA; `render`: autoencoder, conditioner and denoiser. Same rows, clips,
precision and rematerialisation as the whole.
"""

from ml_collections import ConfigDict

from configs import g4v_8b

STAGES = ("watch", "read", "render")


def get_config(part: str) -> ConfigDict:
    """`part`: one of STAGES."""
    if part not in STAGES:
        raise ValueError(f"argument {part!r}; known: {', '.join(STAGES)}")
    config = g4v_8b.get_config()
    config.ema, config.data.mixture = (), dict(caption=1.0)
    if part == "watch":
        config.objective, config.losses = "alignment", {}
        config.trainable = ("summarizer/.*", "queries")
        config.init = {tower: config.init[tower] for tower in ("vision", "llm")}
    if part == "read":
        config.objective, config.losses = "language", {}
        config.model = dict(llm=config.model.llm)
        config.rows = dict(rows=config.rows.rows, tokens=config.rows.tokens)
        config.trainable = ("llm/.*lora_[ab]", "llm/.*added.*")
        config.init = dict(llm=config.init["llm"])
    if part == "render":
        config.objective, config.losses = "rendering", dict(time_shift=3.0)
        config.trainable = ("conditioner/.*", "denoiser/.*", "queries")
        config.init = {tower: config.init[tower] for tower in ("llm", "autoencoder", "denoiser")}
    return config
