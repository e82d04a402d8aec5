"""mPLUG-Owl-video's vision tower and visual abstractor, the parts of it that GPT4Video takes over.

May hold their name tables and their config.json both ways. Computation: `models/vision.py` with temporal adapters and
`models/abstractor.py`, after the public source (github.com/X-PLUG/mPLUG-Owl, folder mplug_owl_video) of the checkpoint
MAGAer13/mplug-owl-llama-7b-video, which GPT4Video starts from and keeps frozen (github.com/gpt4video/GPT4Video).

Checked: against that source's arithmetic written a second time (tests). Not checked: the checkpoint's own files, which
were not at hand; its names and sizes are taken from the source. mPLUG-Owl's checkpoints for single pictures have no
temporal parts and are refused as lacking them.
"""

import math

from g4v_jax.errors import UserError
from g4v_jax.models.abstractor import Abstractor
from g4v_jax.models.vision import Vision
from g4v_jax.weights.tables import FLAT, Entry, Family, affine, kernel, part, patches, reshaped
from g4v_jax.weights.vision import DEFAULTS, PLAIN, QKV, attention, differs, sizes, written

ARCHITECTURES = ("MplugOwlForConditionalGeneration", "MplugOwlModel")
TOWER = PLAIN | dict(patch_bias=False, pre_norm=True, temporal=True)
VISION_DEFAULTS = DEFAULTS | dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
    layer_norm_eps=1e-6,
)
DEFAULT_PATCH = 14  # of the grid that an abstractor alone writes into its config
KEPT_WIDTH, WIDTH_STEP = 2816, 256  # of the abstractor's MLP: see `_width`


def _vision_entries(module: Vision) -> list[Entry]:
    embeddings, layer = "vision_model.embeddings.", "vision_model.encoder.layers.{}."
    head_dim, half = module.dim // module.num_heads, module.dim // 2
    found = [
        Entry("patch/kernel", f"{embeddings}patch_embed.weight", patches((module.patch_size, module.patch_size), 3)),
        Entry("class", f"{embeddings}cls_token", reshaped((1, 1, module.dim))),
        Entry("positions", f"{embeddings}position_embedding", reshaped((1, module.patches, module.dim))),
        *affine("pre_norm", f"{embeddings}pre_layernorm"),
        *affine("layers/temporal/norm", f"{layer}temporal.ln"),
        *affine("layers/temporal/down", f"{layer}temporal.down_proj", patches((1, 1, 1), module.dim)),
        Entry("layers/temporal/taps", f"{layer}temporal.conv.weight", patches((3, 1, 1), 1)),
        Entry("layers/temporal/bias", f"{layer}temporal.conv.bias"),
        *affine("layers/temporal/up", f"{layer}temporal.up_proj", patches((1, 1, 1), half)),
        *affine("layers/attention_norm", f"{layer}input_layernorm"),
        *attention(f"{layer}self_attn.", {"o": "dense"}),
        *affine("layers/mlp_norm", f"{layer}post_attention_layernorm"),
        *affine("layers/mlp/up", f"{layer}mlp.fc1", kernel()),
        *affine("layers/mlp/down", f"{layer}mlp.fc2", kernel()),
        *affine("norm", "vision_model.post_layernorm"),
    ]
    for index, name in enumerate(QKV):  # fused, of each head first q, then k, then v
        for leaf, theirs, layout in (("kernel", "weight", kernel()), ("bias", "bias", FLAT)):
            fused = part(layout, (module.num_heads, 3, head_dim), 1, index)
            found.append(Entry(f"layers/attention/{name}/{leaf}", f"{layer}self_attn.query_key_value.{theirs}", fused))
    return found


def _vision_fields(config: dict) -> dict:
    if config.get("model_type") == "mplug-owl":
        config = config.get("vision_config") or {}
    # the source calls quick_gelu by name, whatever hidden_act says
    fields = sizes(config | {"hidden_act": "quick_gelu"}, VISION_DEFAULTS, Vision.mean, Vision.std)
    return fields | TOWER


def _whole(**parts: dict) -> dict:
    return {"architectures": [ARCHITECTURES[0]], "model_type": "mplug-owl"} | parts


def _vision_config(module: Vision) -> dict:
    config = written(module, ARCHITECTURES[0], "mplug_owl_vision_model")
    del config["architectures"]
    return _whole(vision_config=config)


def _vision_fits(module: Vision) -> str | None:
    if module.activation != "quick_gelu":
        return f"it has activation {module.activation!r}, not 'quick_gelu'"
    if module.dim % 2:
        return f"its dim {module.dim} is odd"
    return differs(module, TOWER)


def _abstractor_entries(module: Abstractor) -> list[Entry]:
    layer = "abstractor.encoder.layers.{}.crossattention."
    queries = reshaped((1, module.num_queries, module.dim))
    return [
        Entry("spatial_queries", "query_tokens", queries),
        Entry("temporal_queries", "temporal_query_tokens", queries),
        *affine("layers/query_norm", f"{layer}norm1"),
        *affine("layers/feature_norm", f"{layer}normk"),
        *attention(layer, {name: f"attention.{long}" for name, long in QKV.items()} | {"o": "output.out_proj"}),
        *affine("layers/mlp_norm", f"{layer}output.norm2"),
        *affine("layers/gate", f"{layer}output.mlp.w1", kernel()),
        *affine("layers/up", f"{layer}output.mlp.w3", kernel()),
        *affine("layers/hidden_norm", f"{layer}output.mlp.ffn_ln"),
        *affine("layers/down", f"{layer}output.mlp.w2", kernel()),
        *affine("spatial", "abstractor.visual_fc", kernel()),
        *affine("temporal", "abstractor.temporal_visual_fc", kernel()),
        Entry("end", "abstractor.vit_eos", reshaped((1, 1, module.llm_dim))),
    ]


def _width(intermediate: int) -> int:
    """Width of the MLP: two thirds of the config's number, rounded up to 256. The source takes 2816 as it is."""
    if intermediate == KEPT_WIDTH:
        return intermediate
    return (int(2 * intermediate / 3) + WIDTH_STEP - 1) // WIDTH_STEP * WIDTH_STEP


def _abstractor_fields(config: dict) -> dict:
    own, seen, text = (
        {key: value for key, value in (config.get(name) or {}).items() if value is not None}
        for name in ("visual_abstractor_config", "vision_config", "text_config")
    )
    dim, heads = own.get("hidden_size", 1024), own.get("num_attention_heads", 16)
    for name, width in (
        ("visual_abstractor_config.encoder_hidden_size", own.get("encoder_hidden_size", 1024)),
        ("vision_config.hidden_size", seen.get("hidden_size", 1024)),
    ):
        if width != dim:
            raise UserError(f"config.json: {name} {width} is not visual_abstractor_config.hidden_size {dim}")
    if dim % heads:
        raise UserError(f"config.json: hidden_size {dim} does not divide by num_attention_heads {heads}")
    return dict(
        dim=dim,
        mlp_dim=_width(own.get("intermediate_size", 4096)),
        num_layers=own.get("num_hidden_layers", 6),
        num_heads=heads,
        num_queries=config.get("num_query_tokens", 64),
        llm_dim=text.get("hidden_size", 4096),
        patches=(seen.get("image_size", 224) // seen.get("patch_size", DEFAULT_PATCH)) ** 2 + 1,
        norm_eps=float(own.get("layer_norm_eps", 1e-6)),
    )


def _abstractor_config(module: Abstractor) -> dict:
    """Of the other towers it says what the abstractor has to know: their own configs go over it."""
    kept = module.mlp_dim == KEPT_WIDTH
    return _whole(
        visual_abstractor_config=dict(
            model_type="mplug_owl_visual_abstract",
            hidden_size=module.dim,
            encoder_hidden_size=module.dim,
            intermediate_size=KEPT_WIDTH if kept else module.mlp_dim * 3 // 2,
            num_hidden_layers=module.num_layers,
            num_attention_heads=module.num_heads,
            layer_norm_eps=module.norm_eps,
        ),
        num_query_tokens=module.num_queries,
        text_config=dict(hidden_size=module.llm_dim),
        vision_config=dict(
            hidden_size=module.dim,
            image_size=math.isqrt(module.patches - 1) * DEFAULT_PATCH,
            patch_size=DEFAULT_PATCH,
        ),
    )


def _abstractor_fits(module: Abstractor) -> str | None:
    if module.mlp_dim % WIDTH_STEP:
        return f"its mlp_dim {module.mlp_dim} does not divide by {WIDTH_STEP}"
    if math.isqrt(module.patches - 1) ** 2 != module.patches - 1:
        return f"its {module.patches} patches are not a square and a class token"
    return None


FAMILIES = (
    Family(
        name="mplug_owl_vision",
        tower="vision",
        architectures=ARCHITECTURES,
        module=Vision,
        fields=_vision_fields,
        config=_vision_config,
        fits=_vision_fits,
        entries=_vision_entries,
        left=lambda module: {
            r"(abstractor\..*|(temporal_)?query_tokens)": "the abstractor",
            r"language_model\..*": "the language model",
        },
        prefix=r"(vision_model\.)?",
    ),
    Family(
        name="mplug_owl_abstractor",
        tower="summarizer",
        architectures=ARCHITECTURES,
        module=Abstractor,
        fields=_abstractor_fields,
        config=_abstractor_config,
        fits=_abstractor_fits,
        entries=_abstractor_entries,
        left=lambda module: {r"vision_model\..*": "the vision tower", r"language_model\..*": "the language model"},
        prefix=r"(abstractor\.)?",
    ),
)
