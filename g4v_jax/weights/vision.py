"""Vision towers as transformers lays them out: CLIP, SigLIP, SigLIP 2 and DINOv2.

May hold their name tables and their config.json both ways. Computation: `models/vision.py`, whose features agree with
`last_hidden_state` of transformers' `CLIPVisionModel`, `SiglipVisionModel`, `Siglip2VisionModel` (on the square grid of
its table) and `Dinov2Model`. What makes pooled outputs is left.

How a picture is normalised stands in preprocessor_config.json, not in config.json: `image_mean` and `image_std` are
taken from the config where it has them, and are written into it; transformers does not look at them there.
"""

import math
from collections.abc import Callable

import numpy as np

from g4v_jax.errors import UserError, nearest
from g4v_jax.models.vision import Vision
from g4v_jax.weights.tables import SAME, Entry, Family, Layout, affine, kernel, part, patches, reshaped

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
PLAIN = dict(  # what a tower of any family is, unless the family says otherwise
    stem="patch",
    patch_bias=True,
    class_token=True,
    temporal=False,
    pre_norm=False,
    final_norm=True,
    layer_scale=None,
    gated=False,
)
CLIP = PLAIN | dict(patch_bias=False, pre_norm=True, final_norm=False)
SIGLIP = PLAIN | dict(class_token=False)
DEFAULTS = dict(  # what transformers takes where config.json says nothing
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
)
HALVES = (0.5, 0.5, 0.5)
QKV = dict(q="query", k="key", v="value")
RESIZABLE = ("clip", "siglip", "dinov2")  # families whose table transformers resizes bicubically
MAX_RATIO = 64  # of DINOv2's whole mlp_ratio; published ones are 4


def side(config: dict, key: str) -> int:
    """`image_size` or `patch_size`: a number, or two that are the same. Raises UserError for others."""
    values = config[key] if isinstance(config[key], (list, tuple)) else [config[key]]
    if len(set(values)) != 1 or not isinstance(values[0], int) or values[0] < 1:
        raise UserError(f"config.json: {key} {config[key]!r}; supported: one whole number, pictures are square")
    return values[0]


def activation(config: dict) -> str:
    """Our name of `hidden_act`. Raises UserError for one that we do not have."""
    theirs = config["hidden_act"]
    if theirs not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {theirs!r}{nearest(str(theirs), ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def sizes(config: dict, defaults: dict, mean: tuple, std: tuple) -> dict:
    """Fields that every family has, from a tower's own part of config.json. Raises UserError for what cannot be."""
    config = defaults | {key: value for key, value in config.items() if value is not None}
    if config["num_channels"] != 3:
        raise UserError(f"config.json: num_channels {config['num_channels']!r}; supported: 3")
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    if dim % heads:
        raise UserError(f"config.json: hidden_size {dim} does not divide by num_attention_heads {heads}")
    return dict(
        image_size=side(config, "image_size"),
        patch_size=side(config, "patch_size"),
        dim=dim,
        mlp_dim=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        activation=activation(config),
        norm_eps=float(config["layer_norm_eps"]),
        mean=tuple(map(float, config.get("image_mean", mean))),
        std=tuple(map(float, config.get("image_std", std))),
    )


def own(config: dict) -> dict:
    """The vision tower's part of a config.json, which may be that of a whole pair of towers."""
    if config.get("model_type") not in ("clip", "siglip", "siglip2"):
        return config
    normalised = {key: config[key] for key in ("image_mean", "image_std") if key in config}
    return normalised | (config.get("vision_config") or {}) | (config.get("vision_config_dict") or {})


def written(module: Vision, architecture: str, model_type: str) -> dict:
    """config.json of what `sizes` reads."""
    return dict(
        architectures=[architecture],
        model_type=model_type,
        hidden_size=module.dim,
        intermediate_size=module.mlp_dim,
        num_hidden_layers=module.num_layers,
        num_attention_heads=module.num_heads,
        num_channels=3,
        image_size=module.image_size,
        patch_size=module.patch_size,
        hidden_act=next(theirs for theirs, ours in ACTIVATIONS.items() if ours == module.activation),
        layer_norm_eps=module.norm_eps,
        image_mean=list(module.mean),
        image_std=list(module.std),
    )


def differs(module: Vision, structure: dict, *but: str) -> str | None:
    """The first field, other than `but`, in which a tower is not of a structure."""
    for name, value in structure.items():
        if name not in but and getattr(module, name) != value:
            return f"it has {name} {getattr(module, name)!r}, not {value!r}"
    return None


def attention(layer: str, names: dict[str, str]) -> list[Entry]:
    """Entries of a layer's four projections: our names -> theirs within `layer`."""
    both = {name: kernel(2 if name == "o" else 1) for name in names}
    return [entry for name, x in both.items() for entry in affine(f"layers/attention/{name}", layer + names[name], x)]


# CLIP and SigLIP: the same names but for the spelling of CLIP's norm


def _pair_entries(patch: Callable[[Vision], Layout]):
    def entries(module: Vision) -> list[Entry]:
        embeddings, layer = "vision_model.embeddings.", "vision_model.encoder.layers.{}."
        found = [
            Entry("patch/kernel", f"{embeddings}patch_embedding.weight", patch(module)),
            Entry("positions", f"{embeddings}position_embedding.weight"),
            *affine("layers/attention_norm", f"{layer}layer_norm1"),
            *attention(f"{layer}self_attn.", dict(q="q_proj", k="k_proj", v="v_proj", o="out_proj")),
            *affine("layers/mlp_norm", f"{layer}layer_norm2"),
            *affine("layers/mlp/up", f"{layer}mlp.fc1", kernel()),
            *affine("layers/mlp/down", f"{layer}mlp.fc2", kernel()),
        ]
        if module.class_token:
            found.append(Entry("class", f"{embeddings}class_embedding"))
        if module.patch_bias:
            found.append(Entry("patch/bias", f"{embeddings}patch_embedding.bias"))
        if module.pre_norm:
            found += affine("pre_norm", "vision_model.pre_layrnorm")
        if module.final_norm:
            found += affine("norm", "vision_model.post_layernorm")
        return found

    return entries


def _convolution(module: Vision) -> Layout:
    return patches((module.patch_size, module.patch_size), 3)


def _pair_left(module: Vision) -> dict[str, str]:
    left = {
        r"text_model\..*": "the text tower",
        r"(text|visual)_projection\.weight": "compares pictures with texts",
        r"logit_(scale|bias)": "compares pictures with texts",
        r"embeddings\.position_ids": "numbers from 0",
    }
    if module.final_norm:
        return left | {r"head\..*": "makes the pooled output"}
    return left | {r"post_layernorm\.(weight|bias)": "makes the pooled output"}


def _clip_neutral(module: Vision) -> dict[str, tuple[tuple[int, ...], float]]:
    norm = "vision_model.post_layernorm."
    return {f"{norm}weight": ((module.dim,), 1.0), f"{norm}bias": ((module.dim,), 0.0)}


def _siglip_neutral(module: Vision) -> dict[str, tuple[tuple[int, ...], float]]:
    dim, mlp = module.dim, module.mlp_dim
    shapes = {
        "probe": (1, 1, dim),
        "attention.in_proj_weight": (3 * dim, dim),
        "attention.in_proj_bias": (3 * dim,),
        "attention.out_proj.weight": (dim, dim),
        "attention.out_proj.bias": (dim,),
        "layernorm.weight": (dim,),
        "layernorm.bias": (dim,),
        "mlp.fc1.weight": (mlp, dim),
        "mlp.fc1.bias": (mlp,),
        "mlp.fc2.weight": (dim, mlp),
        "mlp.fc2.bias": (dim,),
    }
    return {f"vision_model.head.{name}": (x, float(name == "layernorm.weight")) for name, x in shapes.items()}


def _clip_fields(config: dict) -> dict:
    defaults = DEFAULTS | dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    return sizes(own(config), defaults, Vision.mean, Vision.std) | CLIP


def _siglip_fields(config: dict) -> dict:
    defaults = DEFAULTS | dict(patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    return sizes(own(config), defaults, HALVES, HALVES) | SIGLIP


def _siglip2_fields(config: dict) -> dict:
    """Pictures are square and as large as the table: there resizing it to the picture changes nothing."""
    config = own(config)
    count = config.get("num_patches") or 256
    grid = math.isqrt(count)
    if grid**2 != count:
        raise UserError(f"config.json: num_patches {count}; supported: a square number")
    fields = _siglip_fields(config | {"image_size": grid})
    return fields | {"image_size": grid * fields["patch_size"]}


def _siglip2_config(module: Vision) -> dict:
    config = written(module, "Siglip2VisionModel", "siglip2_vision_model")
    del config["image_size"]
    return config | {"num_patches": module.patches}


def _siglip2_fits(module: Vision) -> str | None:
    if module.image_size % module.patch_size:
        return f"its image_size {module.image_size} does not divide by its patch_size {module.patch_size}"
    return differs(module, SIGLIP)


# DINOv2


def _dino_entries(module: Vision) -> list[Entry]:
    embeddings, layer = "embeddings.", "encoder.layer.{}."
    found = [
        *affine("patch", f"{embeddings}patch_embeddings.projection", _convolution(module)),
        Entry("class", f"{embeddings}cls_token", reshaped((1, 1, module.dim))),
        Entry("positions", f"{embeddings}position_embeddings", reshaped((1, module.patches, module.dim))),
        *affine("layers/attention_norm", f"{layer}norm1"),
        *attention(f"{layer}attention.", {name: f"attention.{long}" for name, long in QKV.items()}),
        *attention(f"{layer}attention.", {"o": "output.dense"}),
        Entry("layers/attention_scale", f"{layer}layer_scale1.lambda1"),
        *affine("layers/mlp_norm", f"{layer}norm2"),
        Entry("layers/mlp_scale", f"{layer}layer_scale2.lambda1"),
        *affine("norm", "layernorm"),
    ]
    if not module.gated:
        found += affine("layers/mlp/up", f"{layer}mlp.fc1", kernel())
        return found + affine("layers/mlp/down", f"{layer}mlp.fc2", kernel())
    for index, name in enumerate(("gate", "up")):
        for leaf, theirs, layout in (("kernel", "weight", kernel()), ("bias", "bias", SAME)):
            fused = part(layout, (2, module.mlp_dim), 0, index)
            found.append(Entry(f"layers/mlp/{name}/{leaf}", f"{layer}mlp.weights_in.{theirs}", fused))
    return found + affine("layers/mlp/down", f"{layer}mlp.weights_out", kernel())


def _dino_width(dim: int, ratio: float, gated: bool) -> int:
    """Width of the MLP; a gated one has two thirds of the plain one's, rounded up to eights."""
    width = int(dim * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _dino_ratio(module: Vision) -> int | None:
    ratios = range(1, MAX_RATIO + 1)
    return next((r for r in ratios if _dino_width(module.dim, r, module.gated) == module.mlp_dim), None)


def _dino_fields(config: dict) -> dict:
    config = {key: value for key, value in config.items() if value is not None}
    if not config.get("qkv_bias", True):
        raise UserError("config.json: qkv_bias false is not supported")
    gated, ratio = config.get("use_swiglu_ffn", False), config.get("mlp_ratio", 4)
    defaults = DEFAULTS | dict(patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6)
    fields = sizes(config, defaults, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) | PLAIN
    fields |= dict(gated=gated, layer_scale=float(config.get("layerscale_value", 1.0)))
    return fields | dict(
        mlp_dim=_dino_width(fields["dim"], ratio, gated), activation="silu" if gated else fields["activation"]
    )


def _dino_config(module: Vision) -> dict:
    config = written(module, "Dinov2Model", "dinov2")
    del config["intermediate_size"]
    if module.gated:
        config["hidden_act"] = "gelu"  # not looked at
    return config | dict(
        mlp_ratio=_dino_ratio(module), use_swiglu_ffn=module.gated, layerscale_value=module.layer_scale
    )


def _dino_fits(module: Vision) -> str | None:
    if module.layer_scale is None:
        return "it has no layer_scale"
    if module.gated and module.activation != "silu":
        return f"it is gated by {module.activation!r}, not by 'silu'"
    if _dino_ratio(module) is None:
        return f"no whole mlp_ratio makes its mlp_dim {module.mlp_dim} of its dim {module.dim}"
    return differs(module, PLAIN, "layer_scale", "gated")


def _pair(name: str, architectures: tuple[str, ...], fields, config, fits, patch, neutral) -> Family:
    return Family(
        name=name,
        tower="vision",
        architectures=architectures,
        module=Vision,
        fields=fields,
        config=config,
        fits=fits,
        entries=_pair_entries(patch),
        left=_pair_left,
        prefix=r"(vision_model\.)?",  # transformers 5 leaves it out where the tower stands alone, and reads both
        neutral=neutral,
    )


class Resized:
    """A source whose table of positions is that of square pictures of another size, as transformers resizes it when it
    runs: bicubic (Keys 1981, a = -3/4), half-pixel centres, no antialiasing; the class token keeps its place."""

    def __init__(self, source, name: str, grid: int, class_token: bool):
        self._source, self._name, self._grid, self._class = source, name, grid, int(class_token)
        self.names, self.dtype = source.names, source.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        return (*shape[:-2], self._grid**2 + self._class, shape[-1]) if name == self._name else shape

    def read(self, name: str) -> np.ndarray:
        value = self._source.read(name)
        if name != self._name:
            return value
        first, table = np.split(value, [self._class], axis=-2)
        old = math.isqrt(table.shape[-2])
        weights = bicubic(old, self._grid)
        square = table.reshape(old, old, -1).astype(np.float64)
        square = np.einsum("ia,jb,abd->ijd", weights, weights, square).astype(value.dtype)
        return np.concatenate([first, square.reshape(*value.shape[:-2], -1, value.shape[-1])], axis=-2)


def bicubic(old: int, new: int) -> np.ndarray:
    """What each of `new` points along a line takes of `old` ones, f64 [new old]; edges are repeated."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        x = np.abs(places - (first + offset))
        near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
        np.add.at(weights, (np.arange(new), np.clip(first + offset, 0, old - 1)), np.where(x <= 1, near, far))
    return weights


FAMILIES = (
    _pair(
        "clip",
        ("CLIPVisionModel", "CLIPModel", "CLIPVisionModelWithProjection"),
        _clip_fields,
        lambda module: written(module, "CLIPVisionModel", "clip_vision_model"),
        lambda module: differs(module, CLIP),
        _convolution,
        _clip_neutral,
    ),
    _pair(
        "siglip",
        ("SiglipVisionModel", "SiglipModel"),
        _siglip_fields,
        lambda module: written(module, "SiglipVisionModel", "siglip_vision_model"),
        lambda module: differs(module, SIGLIP),
        _convolution,
        _siglip_neutral,
    ),
    _pair(
        "siglip2",
        ("Siglip2VisionModel", "Siglip2Model"),
        _siglip2_fields,
        _siglip2_config,
        _siglip2_fits,
        lambda module: kernel(),
        _siglip_neutral,
    ),
    Family(
        name="dinov2",
        tower="vision",
        architectures=("Dinov2Model", "Dinov2ForImageClassification"),
        module=Vision,
        fields=_dino_fields,
        config=_dino_config,
        fits=_dino_fits,
        entries=_dino_entries,
        left=lambda module: {r"embeddings\.mask_token": "hides patches in pre-training", r"classifier\..*": "a head"},
        prefix=r"(dinov2\.)?",
        neutral=lambda module: {"embeddings.mask_token": ((1, module.dim), 0.0)},
    ),
)
