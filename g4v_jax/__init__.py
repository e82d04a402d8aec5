"""A video-language model in JAX that watches, describes and renders short clips."""
