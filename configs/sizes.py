"""Sizes of towers, by name. Numbers only."""

TINY = {
    "vision": dict(patch_size=8, image_size=32, dim=96, mlp_dim=288, num_layers=2, num_heads=4, stem="conv",
                   mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "summarizer": dict(dim=96, mlp_dim=288, num_layers=2, num_heads=4, num_queries=4),
    "llm": dict(dim=128, mlp_dim=384, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=32),
    "conditioner": dict(dim=128),
    "autoencoder": dict(latent_channels=16, patch=4, widths=(32, 96)),
    "denoiser": dict(dim=192, mlp_dim=576, num_layers=4, num_heads=6, patch=(1, 2, 2), prediction="x0"),
}
