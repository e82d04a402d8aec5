"""Models whose training speed is published, to see what a plan's bound is worth.

    g4v plan --config=configs/published.py:v5e-16b --topology=v5e:16x16
    bash launch/calibrate.sh        # all of them, published MFU beside the bound

Model FLOPs utilisation and settings as published: MaxText's own models in bfloat16 on sequences of 2,048 from its tables for v5e and
v5p on one slice (AI-Hypercomputer/maxtext, MaxText/configs/v5e and v5p); its Llama-2-70B on v5p (the same, llama2_70b.sh); its
Llama-3.1 on v6e and MaxDiffusion's Wan2.1-14B on v5p, 81 frames of 1280 x 720, from AI-Hypercomputer/tpu-recipes. Where they keep
other things for the backward pass than any of our policies does, the nearest stands here; where more than fits beside what we keep,
rows are taken in parts. Nothing here is meant to be trained.
"""

from ml_collections import ConfigDict

from configs import llama2_7b, sizes

# MaxText's own. A model of scale 2^k has a base of 2,048 channels, 16 heads of 128, MLPs of 7,168 and 16 layers, whose heads and
# MLPs, channels and layers double in turn.
SCALED = {  # name: (scale, rows a chip, tensor, micro-batches, remat)
    "v5e-16b": (16, 6, 1, 1, "full"),
    "v5e-32b": (32, 4, 1, 1, "full"),
    "v5e-64b": (64, 2, 1, 2, "full"),
    "v5p-32b": (32, 7, 4, 4, "dots"),
    "v5p-64b": (64, 3, 4, 4, "dots"),
    "v5p-128b": (128, 1, 8, 4, "dots"),
}
LLAMAS = {  # name: (sizes, words, tokens a row, rows a chip, micro-batches, remat)
    "v5p-llama2-70b": (sizes.LLAMA2_70B, 32_000, 4096, 4, 4, "dots"),
    "v6e-llama3.1-8b": (sizes.LLAMA3_8B, 128_256, 8192, 4, 1, "offload"),
    "v6e-llama3.1-70b": (sizes.LLAMA3_70B, 128_256, 8192, 5, 1, "offload"),
}
RUNS = {  # name: (topology, chips, published MFU)
    "v5e-16b": ("v5e:16x16", 256, 0.6110),
    "v5e-32b": ("v5e:16x16", 256, 0.6686),
    "v5e-64b": ("v5e:16x16", 256, 0.5990),
    "v5p-32b": ("v5p:4x4x4", 64, 0.7147),
    "v5p-64b": ("v5p:4x4x4", 64, 0.7031),
    "v5p-128b": ("v5p:4x4x8", 128, 0.6868),
    "v5p-llama2-70b": ("v5p:4x4x4", 64, 0.654),
    "v6e-llama3.1-8b": ("v6e:16x16", 256, 0.455),
    "v6e-llama3.1-70b": ("v6e:16x16", 256, 0.503),
    "v5p-wan-14b": ("v5p:2x2x2", 8, 0.296),
}
STAGES = tuple(RUNS)


def get_config(run: str) -> ConfigDict:
    """`run`: one of RUNS."""
    if run not in RUNS:
        raise ValueError(f"argument {run!r}; known: {', '.join(RUNS)}")
    config, chips = llama2_7b.get_config(), RUNS[run][1]
    if run in SCALED:
        scale, rows, tensor, micro_batches, remat = SCALED[run]
        turns, rest = divmod(scale.bit_length() - 1, 3)
        heads, channels = 2 ** (turns + (rest > 0)), 2 ** (turns + (rest > 1))
        config.model.llm = dict(
            dim=2048 * channels, mlp_dim=7168 * heads, num_layers=16 * 2**turns, num_heads=16 * heads, num_kv_heads=16 * heads,
            head_dim=128, tied=False, norm_eps=1e-5, remat=remat,
        )  # fmt: skip
        config.rows.rows = rows * chips
        config.mesh.tensor, config.step.micro_batches = tensor, micro_batches
    elif run in LLAMAS:
        llm, words, tokens, rows, micro_batches, remat = LLAMAS[run]
        config.step.micro_batches = micro_batches
        config.model.llm = dict(llm, remat=remat)
        config.tokenizer = dict(vocab_size=words)
        config.rows = dict(rows=rows * chips, tokens=tokens)
        config.losses.chunks = tokens // 2048  # scores over so many words would not fit whole
    else:
        config.objective = "denoising"
        config.model = dict(denoiser=dict(sizes.WAN_14B, latent_channels=16, context_dim=4096, remat="offload"))
        config.rows = dict(rows=chips, tokens=1)
        config.losses = dict(latents=(21, 90, 160), context=512)
        config.init = {}
    return config
