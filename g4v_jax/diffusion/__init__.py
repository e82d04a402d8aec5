"""Flow matching, denoising diffusion and their samplers, as pure functions."""
