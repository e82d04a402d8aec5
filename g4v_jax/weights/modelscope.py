"""The paper's generator as diffusers lays it out: `UNet3DConditionModel` (ModelScope, ZeroScope) and `AutoencoderKL`.

May hold their name tables and their config.json both ways. Computation: `models/unet3d.py` and
`models/autoencoder_kl.py`.
"""

from g4v_jax.errors import UserError
from g4v_jax.models.autoencoder_kl import KLAutoencoder
from g4v_jax.models.unet3d import UNet3D
from g4v_jax.weights.settings import given, require
from g4v_jax.weights.tables import FLAT, Entry, Family, affine, conv, kernel

UNET = {  # what diffusers takes where config.json says nothing
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
    "up_block_types": ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1024,
    "attention_head_dim": 64,
    "num_attention_heads": None,
    "time_cond_proj_dim": None,
}
KL = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
ATTENDS = {True: ("CrossAttnDownBlock3D", "CrossAttnUpBlock3D"), False: ("DownBlock3D", "UpBlock3D")}


def _given(config: dict, defaults: dict) -> dict:
    """`given`, lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given(config, defaults).items()}


def _divides(config: dict) -> None:
    """Raises UserError where channels do not divide into groups."""
    channels, groups = config["block_out_channels"], config["norm_num_groups"]
    if not groups or any(width % groups for width in channels):
        raise UserError(f"config.json: block_out_channels {channels} do not divide by norm_num_groups {groups}")


# Parts of both tables


def _residual(path: str, name: str, shortcut: bool, time: bool) -> list[Entry]:
    entries = [
        *affine(f"{path}/norm_in", f"{name}.norm1"),
        *affine(f"{path}/in", f"{name}.conv1", conv()),
        *affine(f"{path}/norm_out", f"{name}.norm2"),
        *affine(f"{path}/out", f"{name}.conv2", conv()),
    ]
    if time:
        entries += affine(f"{path}/time", f"{name}.time_emb_proj", kernel())
    if shortcut:
        entries += affine(f"{path}/shortcut", f"{name}.conv_shortcut", conv())
    return entries


def _attention(path: str, name: str, bias: bool) -> list[Entry]:
    entries = affine(f"{path}/o", f"{name}.to_out.0", kernel(2))
    for part in "qkv":
        entries += affine(f"{path}/{part}", f"{name}.to_{part}", kernel(), FLAT if bias else None)
    return entries


# UNet


def _unet_fields(config: dict) -> dict:
    config = _given(config, UNET)
    require(
        config,
        out_channels=config["in_channels"],
        downsample_padding=1,
        mid_block_scale_factor=1,
        num_attention_heads=None,
        time_cond_proj_dim=None,
    )
    if config["act_fn"] not in ("silu", "swish"):
        raise UserError(f"config.json: act_fn {config['act_fn']!r}; supported: 'silu'")
    down, channels, head_dim = config["down_block_types"], config["block_out_channels"], config["attention_head_dim"]
    for kind in down:
        if not any(kind == names[0] for names in ATTENDS.values()):
            raise UserError(f"config.json: down_block_types {kind!r}; supported: {[n[0] for n in ATTENDS.values()]}")
    attention = tuple(kind == ATTENDS[True][0] for kind in down)
    require(config, up_block_types=tuple(ATTENDS[attends][1] for attends in reversed(attention)))
    if len(down) != len(channels):
        raise UserError(f"config.json: block_out_channels {channels} and down_block_types {down} differ in length")
    _divides(config)
    if not isinstance(head_dim, int) or head_dim > min([channels[-1], *(c for c, a in zip(channels, attention) if a)]):
        raise UserError(f"config.json: attention_head_dim {head_dim!r}; supported: one number that all levels hold")
    if channels[0] % 2:
        raise UserError(f"config.json: block_out_channels {channels}; the first must be even")
    return dict(
        latent_channels=config["in_channels"],
        context_dim=config["cross_attention_dim"],
        channels=channels,
        attention=attention,
        num_layers=config["layers_per_block"],
        head_dim=head_dim,
        groups=config["norm_num_groups"],
        norm_eps=config["norm_eps"],
        prediction="epsilon",
    )


def _unet_config(module: UNet3D) -> dict:
    return {
        "_class_name": "UNet3DConditionModel",
        "in_channels": module.latent_channels,
        "out_channels": module.latent_channels,
        "down_block_types": [ATTENDS[attends][0] for attends in module.attention],
        "up_block_types": [ATTENDS[attends][1] for attends in reversed(module.attention)],
        "block_out_channels": list(module.channels),
        "layers_per_block": module.num_layers,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_num_groups": module.groups,
        "norm_eps": module.norm_eps,
        "cross_attention_dim": module.context_dim,
        "attention_head_dim": module.head_dim,
    }


def _unet_fits(module: UNet3D) -> str | None:
    if module.prediction != "epsilon":
        return f"prediction is {module.prediction!r}, and ModelScope's denoiser predicts the noise"
    return None


def _transformer(path: str, name: str) -> list[Entry]:
    block = f"{name}.transformer_blocks.0"
    entries = [
        *affine(f"{path}/norm", f"{name}.norm"),
        *affine(f"{path}/in", f"{name}.proj_in", kernel()),
        *affine(f"{path}/mlp/up", f"{block}.ff.net.0.proj", kernel()),
        *affine(f"{path}/mlp/down", f"{block}.ff.net.2", kernel()),
        *affine(f"{path}/out", f"{name}.proj_out", kernel()),
    ]
    for i in (1, 2, 3):
        entries += affine(f"{path}/norm_{i}", f"{block}.norm{i}")
    for i in (1, 2):
        entries += _attention(f"{path}/attention_{i}", f"{block}.attn{i}", bias=False)
    return entries


def _layer(path: str, block: str, number: int, shortcut: bool, attends: bool) -> list[Entry]:
    entries = _residual(f"{path}/residual", f"{block}.resnets.{number}", shortcut, time=True)
    for i in range(4):
        part = f"{block}.temp_convs.{number}.conv{i + 1}"
        entries += affine(f"{path}/time_conv/norm_{i}", f"{part}.0")
        entries += affine(f"{path}/time_conv/conv_{i}", f"{part}.{3 if i else 2}", conv())  # the first has no dropout
    if attends:
        entries += _transformer(f"{path}/space", f"{block}.attentions.{number}")
        entries += _transformer(f"{path}/time", f"{block}.temp_attentions.{number}")
    return entries


def _unet_entries(module: UNet3D) -> list[Entry]:
    levels, width = list(enumerate(module.channels)), module.channels[0]
    entries = [
        *affine("time_in", "time_embedding.linear_1", kernel()),
        *affine("time_out", "time_embedding.linear_2", kernel()),
        *affine("in", "conv_in", conv()),
        *_transformer("time_first", "transformer_in"),
        *_layer("middle_0", "mid_block", 0, False, True),
        *_layer("middle_1", "mid_block", 1, False, False),
        *affine("norm", "conv_norm_out"),
        *affine("out", "conv_out", conv()),
    ]
    skips = [width]
    for i, channels in levels:
        for j in range(module.num_layers):
            entries += _layer(f"down_{i}_{j}", f"down_blocks.{i}", j, width != channels, module.attention[i])
            width = channels
            skips.append(width)
        if i < len(levels) - 1:
            entries += affine(f"down_{i}", f"down_blocks.{i}.downsamplers.0.conv", conv())
            skips.append(width)
    for i, channels in reversed(levels):
        block = f"up_blocks.{len(levels) - 1 - i}"
        for j in range(module.num_layers + 1):
            shortcut = width + skips.pop() != channels
            entries += _layer(f"up_{i}_{j}", block, j, shortcut, module.attention[i])
            width = channels
        if i:
            entries += affine(f"up_{i}", f"{block}.upsamplers.0.conv", conv())
    return entries


# Autoencoder


def _kl_fields(config: dict) -> dict:
    config = _given(config, KL)
    levels = len(config["block_out_channels"])
    require(
        config,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        act_fn="silu",
        shift_factor=None,
        latents_mean=None,
        latents_std=None,
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=True,
    )
    _divides(config)
    return dict(
        latent_channels=config["latent_channels"],
        channels=config["block_out_channels"],
        num_layers=config["layers_per_block"],
        groups=config["norm_num_groups"],
        scaling_factor=config["scaling_factor"],
    )


def _kl_config(module: KLAutoencoder) -> dict:
    levels = len(module.channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(module.channels),
        "layers_per_block": module.num_layers,
        "act_fn": "silu",
        "latent_channels": module.latent_channels,
        "norm_num_groups": module.groups,
        "scaling_factor": module.scaling_factor,
    }


def _kl_entries(module: KLAutoencoder) -> list[Entry]:
    levels = list(enumerate(module.channels))
    entries = [
        *affine("encoder/moments", "quant_conv", conv()),
        *affine("decoder/latents", "post_quant_conv", conv()),
    ]
    for half in ("encoder", "decoder"):
        middle = f"{half}.mid_block"
        entries += affine(f"{half}/in", f"{half}.conv_in", conv()) + affine(f"{half}/out", f"{half}.conv_out", conv())
        entries += affine(f"{half}/norm", f"{half}.conv_norm_out")
        entries += affine(f"{half}/middle/norm", f"{middle}.attentions.0.group_norm")
        entries += _attention(f"{half}/middle/attention", f"{middle}.attentions.0", bias=True)
        for i in (0, 1):
            entries += _residual(f"{half}/middle/residual_{i}", f"{middle}.resnets.{i}", False, time=False)
    width = module.channels[0]
    for i, channels in levels:
        for j in range(module.num_layers):
            name = f"encoder.down_blocks.{i}.resnets.{j}"
            entries += _residual(f"encoder/down_{i}_{j}", name, width != channels, time=False)
            width = channels
        if i < len(levels) - 1:
            entries += affine(f"encoder/down_{i}", f"encoder.down_blocks.{i}.downsamplers.0.conv", conv())
    for i, channels in reversed(levels):
        block = f"decoder.up_blocks.{len(levels) - 1 - i}"
        for j in range(module.num_layers + 1):
            entries += _residual(f"decoder/up_{i}_{j}", f"{block}.resnets.{j}", width != channels, time=False)
            width = channels
        if i:
            entries += affine(f"decoder/up_{i}", f"{block}.upsamplers.0.conv", conv())
    return entries


FAMILIES = (
    Family(
        name="modelscope-denoiser",
        tower="denoiser",
        architectures=("UNet3DConditionModel",),
        module=UNet3D,
        fields=_unet_fields,
        config=_unet_config,
        fits=_unet_fits,
        entries=_unet_entries,
    ),
    Family(
        name="kl-autoencoder",
        tower="autoencoder",
        architectures=("AutoencoderKL",),
        module=KLAutoencoder,
        fields=_kl_fields,
        config=_kl_config,
        fits=lambda module: None,
        entries=_kl_entries,
        renamed={  # files from before diffusers 0.17
            r"(attentions\.0\.)query\.": r"\1to_q.",
            r"(attentions\.0\.)key\.": r"\1to_k.",
            r"(attentions\.0\.)value\.": r"\1to_v.",
            r"(attentions\.0\.)proj_attn\.": r"\1to_out.0.",
        },
    ),
)
