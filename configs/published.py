"""Language models whose training speed is published, to see what a plan's bound is worth.

    g4v plan --config=configs/published.py:v5e-16b --topology=v5e:16x16
    bash launch/calibrate.sh        # all of them, published MFU beside the bound

MaxText's own models on TPUs, bfloat16, sequences of 2,048: MFU from its tables for v5e and v5p on one slice, rows a chip, mesh
and rematerialisation from the scripts that they were measured with (AI-Hypercomputer/maxtext, MaxText/configs/v5e and v5p).
A model of scale 2^k has a base of 2,048 channels, 16 heads of 128, MLPs of 7,168 and 16 layers, whose heads and MLPs, channels and
layers double in turn. Nothing here is meant to be trained.
"""

from ml_collections import ConfigDict

from configs import llama2_7b

# name: (topology, chips, published MFU, scale, rows a chip, tensor, remat)
RUNS = {
    "v5e-16b": ("v5e:16x16", 256, 0.6110, 16, 6, 1, "full"),
    "v5e-32b": ("v5e:16x16", 256, 0.6686, 32, 4, 1, "full"),
    "v5e-64b": ("v5e:16x16", 256, 0.5990, 64, 2, 1, "full"),
    "v5p-32b": ("v5p:4x4x4", 64, 0.7147, 32, 7, 4, "dots"),
    "v5p-64b": ("v5p:4x4x4", 64, 0.7031, 64, 3, 4, "dots"),
    "v5p-128b": ("v5p:4x4x8", 128, 0.6868, 128, 1, 8, "dots"),
}
STAGES = tuple(RUNS)


def get_config(run: str) -> ConfigDict:
    """`run`: one of RUNS."""
    if run not in RUNS:
        raise ValueError(f"argument {run!r}; known: {', '.join(RUNS)}")
    _, chips, _, scale, rows, tensor, remat = RUNS[run]
    turns, rest = divmod(scale.bit_length() - 1, 3)
    heads, channels = 2 ** (turns + (rest > 0)), 2 ** (turns + (rest > 1))
    config = llama2_7b.get_config()
    config.model.llm = dict(
        dim=2048 * channels, mlp_dim=7168 * heads, num_layers=16 * 2**turns, num_heads=16 * heads, num_kv_heads=16 * heads,
        head_dim=128, tied=False, norm_eps=1e-5, remat=remat,
    )  # fmt: skip
    config.rows.rows = rows * chips
    config.mesh.tensor = tensor
    return config
