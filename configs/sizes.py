"""Sizes of towers, by name. Numbers only."""

TINY = {  # from nothing on two CPU cores; unrolled, because a CPU runs loops slowly
    "vision": dict(image_size=32, patch_size=8, dim=64, mlp_dim=192, num_layers=2, num_heads=2, stem="conv", position_std=0.5, unroll=2,
                   mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "summarizer": dict(dim=96, mlp_dim=288, num_layers=2, num_heads=4, num_queries=4, unroll=2),
    "llm": dict(dim=128, mlp_dim=384, num_layers=2, num_heads=4, head_dim=32, unroll=2),
    "conditioner": dict(dim=128),
    "caption_window": 8,
    "autoencoder": dict(latent_channels=48, patch=8, dim=128, num_blocks=1),
    "denoiser": dict(dim=128, mlp_dim=384, num_layers=4, num_heads=4, patch=(1, 1, 1), absolute=True,
                     unroll=4),
}

# The sizes below are those of published weights: `g4v import` of these gives a tower that fits

VIT_L14 = dict(image_size=224, patch_size=14, dim=1024, mlp_dim=4096, num_layers=24, num_heads=16)  # CLIP's

OWL_VIT = dict(VIT_L14, norm_eps=1e-6, temporal=True, final_norm=True)  # mPLUG-Owl-video's: CLIP's with adapters in time

OWL_ABSTRACTOR = dict(kind="abstractor", dim=1024, mlp_dim=2816, num_layers=6, num_heads=16, num_queries=64)

SIGLIP_SO400M = dict(image_size=384, patch_size=14, dim=1152, mlp_dim=4304, num_layers=27, num_heads=16,
                     class_token=False, pre_norm=False, patch_bias=True, final_norm=True, activation="gelu_tanh",
                     norm_eps=1e-6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

DINOV2_SMALL = dict(image_size=518, patch_size=14, dim=384, mlp_dim=1536, num_layers=12, num_heads=6, pre_norm=False,
                    patch_bias=True, final_norm=True, layer_scale=1.0, activation="gelu", norm_eps=1e-6,
                    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

SUMMARIZER = dict(dim=1024, mlp_dim=4096, num_layers=6, num_heads=16, num_queries=64)  # 65 tokens a clip

LLAMA_7B = dict(dim=4096, mlp_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, norm_eps=1e-6,
                tied=False)

LLAMA2_70B = dict(dim=8192, mlp_dim=28672, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128, norm_eps=1e-5,
                  tied=False)

LLAMA3_8B = dict(dim=4096, mlp_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, rope_base=5e5,
                 norm_eps=1e-5, tied=False)

LLAMA3_70B = dict(LLAMA2_70B, rope_base=5e5)

QWEN3_8B = dict(dim=4096, mlp_dim=12288, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128,
                rope_base=1e6, norm_eps=1e-6, qk_norm="head", tied=False)

SMOLLM2_135M = dict(dim=576, mlp_dim=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, rope_base=1e5,
                    norm_eps=1e-5)

ZEROSCOPE = dict(kind="unet3d")  # the fields' defaults are ModelScope's

WAN_1B = dict(dim=1536, mlp_dim=8960, num_layers=30, num_heads=12, patch=(1, 2, 2))  # Wan2.1-T2V-1.3B

WAN_14B = dict(dim=5120, mlp_dim=13824, num_layers=40, num_heads=40, patch=(1, 2, 2))  # Wan2.1-T2V-14B
