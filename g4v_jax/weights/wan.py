"""Wan2.1 as diffusers lays it out: the denoiser `WanTransformer3DModel` and the autoencoder `AutoencoderKLWan`.

May hold their name tables and their config.json both ways. Computation: `models/denoiser.py` and
`models/autoencoder_wan.py`.
"""

from g4v_jax.errors import UserError
from g4v_jax.models.autoencoder_wan import LATENT_MEAN, LATENT_STD, WanAutoencoder
from g4v_jax.models.denoiser import Denoiser
from g4v_jax.weights.settings import given, require
from g4v_jax.weights.tables import FLAT, SAME, Entry, Family, affine, conv, interleaved, kernel, patches, reshaped

DENOISER = {  # what diffusers takes where config.json says nothing
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}

AUTOENCODER = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": (False, True, True),
    "dropout": 0.0,
    "latents_mean": LATENT_MEAN,
    "latents_std": LATENT_STD,
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}


# Denoiser


def _denoiser_fields(config: dict) -> dict:
    config = given(config, DENOISER)
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    dim, image_dim = heads * head_dim, config["image_dim"]
    require(config, qk_norm="rms_norm_across_heads", added_kv_proj_dim=dim if image_dim else None)
    if config["freq_dim"] % 2 or head_dim % 2:
        raise UserError(f"config.json: freq_dim {config['freq_dim']}, attention_head_dim {head_dim}; both must be even")
    if config["pos_embed_seq_len"] and not image_dim:
        raise UserError("config.json: pos_embed_seq_len needs an image_dim")
    fields = dict(
        dim=dim,
        mlp_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
        num_heads=heads,
        latent_channels=config["in_channels"],
        context_dim=config["text_dim"],
        out_channels=None if config["out_channels"] == config["in_channels"] else config["out_channels"],
        patch=tuple(config["patch_size"]),
        prediction="velocity",
        absolute=False,
        cross_norm=config["cross_attn_norm"],
        time_features=config["freq_dim"],
        max_side=config["rope_max_seq_len"],
        image_dim=image_dim or 0,
        image_positions=config["pos_embed_seq_len"] is not None,
        norm_eps=config["eps"],
    )
    return fields | ({"image_tokens": config["pos_embed_seq_len"]} if fields["image_positions"] else {})


def _denoiser_config(module: Denoiser) -> dict:
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(module.patch),
        "num_attention_heads": module.num_heads,
        "attention_head_dim": module.dim // module.num_heads,
        "in_channels": module.latent_channels,
        "out_channels": module.out_channels or module.latent_channels,
        "text_dim": module.context_dim,
        "freq_dim": module.time_features,
        "ffn_dim": module.mlp_dim,
        "num_layers": module.num_layers,
        "cross_attn_norm": module.cross_norm,
        "qk_norm": "rms_norm_across_heads",
        "eps": module.norm_eps,
        "image_dim": module.image_dim or None,
        "added_kv_proj_dim": module.dim if module.image_dim else None,
        "rope_max_seq_len": module.max_side,
        "pos_embed_seq_len": module.image_tokens if module.image_positions else None,
    }


def _denoiser_fits(module: Denoiser) -> str | None:
    if module.absolute:
        return "it has absolute=True"
    if module.prediction != "velocity":
        return f"it has prediction {module.prediction!r}"
    return None


def _denoiser_entries(module: Denoiser) -> list[Entry]:
    embedder, head_dim = "condition_embedder", module.dim // module.num_heads
    entries = [
        *affine("patch", "patch_embedding", patches(module.patch, module.latent_channels)),
        *affine("time_in", f"{embedder}.time_embedder.linear_1", kernel()),
        *affine("time_out", f"{embedder}.time_embedder.linear_2", kernel()),
        *affine("time_modulation", f"{embedder}.time_proj", kernel()),
        *affine("context_in", f"{embedder}.text_embedder.linear_1", kernel()),
        *affine("context_out", f"{embedder}.text_embedder.linear_2", kernel()),
        *affine("head", "proj_out", kernel()),
        Entry("head_modulation", "scale_shift_table", reshaped((1, 2, module.dim))),
        Entry("layers/modulation", "blocks.{}.scale_shift_table", reshaped((1, 6, module.dim))),
        *affine("layers/mlp/up", "blocks.{}.ffn.net.0.proj", kernel()),
        *affine("layers/mlp/down", "blocks.{}.ffn.net.2", kernel()),
    ]
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
    image = {"image_k": "add_k_proj", "image_v": "add_v_proj", "image_k_norm": "norm_added_k"}
    for ours, theirs in (("attention", "attn1"), ("cross_attention", "attn2")):
        for part, name in (names | image if ours == "cross_attention" and module.image_dim else names).items():
            path, name = f"layers/{ours}/{part}", f"blocks.{{}}.{theirs}.{name}"
            rotated = ours == "attention" and part[0] in "qk"

            def layout(base):
                return interleaved(base, head_dim) if rotated else base

            if part.endswith("norm"):
                entries.append(Entry(f"{path}/scale", f"{name}.weight", layout(SAME)))
            else:
                entries += affine(path, name, layout(kernel(2 if part == "o" else 1)), layout(FLAT))
    if module.cross_norm:
        entries.append(Entry("layers/cross_norm/scale", "blocks.{}.norm2.weight"))
        entries.append(Entry("layers/cross_norm/bias", "blocks.{}.norm2.bias"))
    if module.image_dim:
        name = f"{embedder}.image_embedder"
        entries += affine("image/in", f"{name}.ff.net.0.proj", kernel()) + affine("image/out", f"{name}.ff.net.2", kernel())
        for ours, theirs in (("norm_in", "norm1"), ("norm_out", "norm2")):
            entries.append(Entry(f"image/{ours}/scale", f"{name}.{theirs}.weight"))
            entries.append(Entry(f"image/{ours}/bias", f"{name}.{theirs}.bias"))
    if module.image_positions:
        shape = (1, module.image_tokens, module.image_dim)
        entries.append(Entry("image/positions", f"{embedder}.image_embedder.pos_embed", reshaped(shape)))
    return entries


# Autoencoder


def _autoencoder_fields(config: dict) -> dict:
    config = given(config, AUTOENCODER)
    require(config, is_residual=False, patch_size=None, attn_scales=[], dropout=0.0, in_channels=3, out_channels=3)
    time, channels = tuple(config["temperal_downsample"]), config["z_dim"]
    if len(time) != len(config["dim_mult"]) - 1 or sum(time) > 2:
        raise UserError(f"config.json: temperal_downsample {time}; supported: one a stage but the last, at most two true")
    for key in ("latents_mean", "latents_std"):
        if len(config[key]) != channels:
            raise UserError(f"config.json: {len(config[key])} {key} for z_dim {channels}")
    return dict(
        latent_channels=channels,
        dim=config["base_dim"],
        decoder_dim=config["decoder_base_dim"],
        multipliers=tuple(config["dim_mult"]),
        num_blocks=config["num_res_blocks"],
        time_downsample=time,
        latent_mean=tuple(config["latents_mean"]),
        latent_std=tuple(config["latents_std"]),
    )


def _autoencoder_config(module: WanAutoencoder) -> dict:
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": module.dim,
        "decoder_base_dim": module.decoder_dim,
        "z_dim": module.latent_channels,
        "dim_mult": list(module.multipliers),
        "num_res_blocks": module.num_blocks,
        "attn_scales": [],
        "temperal_downsample": list(module.time_downsample),
        "dropout": 0.0,
        "latents_mean": list(module.latent_mean),
        "latents_std": list(module.latent_std),
        "is_residual": False,
        "in_channels": 3,
        "out_channels": 3,
        "patch_size": None,
        "scale_factor_temporal": module.time_stride,
        "scale_factor_spatial": module.patch,
    }


def _scale(path: str, name: str, dim: int, axes: int = 3) -> Entry:
    return Entry(f"{path}/scale", f"{name}.gamma", reshaped((dim,) + (1,) * axes))


def _conv(path: str, name: str) -> list[Entry]:
    return affine(path, name, conv(), SAME)


def _pointwise(path: str, name: str, inputs: int, axes: int = 3) -> list[Entry]:
    """A convolution of one tap, which is a linear map to us."""
    return affine(path, name, patches((1,) * axes, inputs))


def _residual(path: str, name: str, inputs: int, dim: int) -> list[Entry]:
    entries = [_scale(f"{path}/norm_1", f"{name}.norm1", inputs), _scale(f"{path}/norm_2", f"{name}.norm2", dim)]
    entries += _conv(f"{path}/conv_1", f"{name}.conv1") + _conv(f"{path}/conv_2", f"{name}.conv2")
    return entries + (_pointwise(f"{path}/short", f"{name}.conv_shortcut", inputs) if inputs != dim else [])


def _resample(path: str, name: str, time: bool) -> list[Entry]:
    return _conv(f"{path}/space", f"{name}.resample.1") + (_conv(f"{path}/time", f"{name}.time_conv") if time else [])


def _half(side: str, dim: int, last: int) -> list[Entry]:
    """What encoder and decoder share: both ends, and the middle of width `dim`."""
    middle = f"{side}.mid_block"
    attention = f"{middle}.attentions.0"
    return [
        *_conv(f"{side}/in", f"{side}.conv_in"),
        *_conv(f"{side}/out", f"{side}.conv_out"),
        _scale(f"{side}/norm", f"{side}.norm_out", last),
        *_residual(f"{side}/middle/block_0", f"{middle}.resnets.0", dim, dim),
        *_residual(f"{side}/middle/block_1", f"{middle}.resnets.1", dim, dim),
        _scale(f"{side}/middle/norm", f"{attention}.norm", dim, axes=2),
        *_pointwise(f"{side}/middle/qkv", f"{attention}.to_qkv", dim, axes=2),
        *_pointwise(f"{side}/middle/out", f"{attention}.proj", dim, axes=2),
    ]


def _autoencoder_entries(module: WanAutoencoder) -> list[Entry]:
    widths, number = [module.dim * m for m in (1, *module.multipliers)], 0
    entries = _half("encoder", widths[-1], widths[-1])
    entries += _pointwise("encoder/latent", "quant_conv", 2 * module.latent_channels)
    for i, (inputs, dim) in enumerate(zip(widths, widths[1:])):
        for j in range(module.num_blocks):
            entries += _residual(f"encoder/stage_{i}_block_{j}", f"encoder.down_blocks.{number}", inputs, dim)
            inputs, number = dim, number + 1
        if i < len(module.time_downsample):
            time = module.time_downsample[i]
            entries += _resample(f"encoder/stage_{i}_down", f"encoder.down_blocks.{number}", time)
            number += 1

    widths = [(module.decoder_dim or module.dim) * m for m in (module.multipliers[-1], *module.multipliers[::-1])]
    entries += _half("decoder", widths[0], widths[-1])
    entries += _pointwise("decoder/latent", "post_quant_conv", module.latent_channels)
    for i, (inputs, dim) in enumerate(zip(widths, widths[1:])):
        inputs = inputs // 2 if i else inputs  # each doubling of the size halves the channels
        for j in range(module.num_blocks + 1):
            entries += _residual(f"decoder/stage_{i}_block_{j}", f"decoder.up_blocks.{i}.resnets.{j}", inputs, dim)
            inputs = dim
        if i < len(module.time_downsample):
            time = module.time_downsample[::-1][i]
            entries += _resample(f"decoder/stage_{i}_up", f"decoder.up_blocks.{i}.upsamplers.0", time)
    return entries


FAMILIES = (
    Family(
        name="wan-denoiser",
        tower="denoiser",
        architectures=("WanTransformer3DModel",),
        module=Denoiser,
        fields=_denoiser_fields,
        config=_denoiser_config,
        fits=_denoiser_fits,
        entries=_denoiser_entries,
        left=lambda module: {r"blocks\.\d+\.attn2\.norm_added_q\.weight": "diffusers does not use it either"},
    ),
    Family(
        name="wan-autoencoder",
        tower="autoencoder",
        architectures=("AutoencoderKLWan",),
        module=WanAutoencoder,
        fields=_autoencoder_fields,
        config=_autoencoder_config,
        fits=lambda module: None,
        entries=_autoencoder_entries,
    ),
)
