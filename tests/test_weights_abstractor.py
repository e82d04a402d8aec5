"""mPLUG-Owl-video's tower and abstractor against their arithmetic written plainly in float64, and their tensors back.

The plain version follows the public source's computation by the public names of its tensors, one head, one frame and
one tap at a time. Weights are random: the published checkpoint is not at hand.
"""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

from g4v_jax.errors import UserError
from g4v_jax.models.abstractor import Abstractor
from g4v_jax.models.vision import Vision
from g4v_jax.weights import abstractor, tables
from g4v_jax.weights.forward import FORWARD

pytestmark = pytest.mark.usefixtures("one_device")

TOWER, SUMMARY = abstractor.FAMILIES
SIZES = {  # widths, heads, layers, image, patch, queries, the LLM's width, frames
    "wide": dict(dim=30, heads=5, layers=3, image=21, patch=7, queries=5, llm=19, frames=4, mlp=97, eps=0.01),
    "few": dict(dim=28, heads=2, layers=2, image=16, patch=5, queries=3, llm=34, frames=2, mlp=41, eps=0.03),
    "one": dict(dim=20, heads=4, layers=2, image=12, patch=6, queries=2, llm=8, frames=1, mlp=33, eps=0.02),
}
FAINT = ("query_tokens", "pre_layernorm", "vision_model.post_layernorm", "norm1", "out_proj")  # so that any eps is seen
WIDTH = 256  # the narrowest MLP that the abstractor's rounding allows: of 1 to 384


def config(s: dict) -> dict:
    return {
        "model_type": "mplug-owl",
        "num_query_tokens": s["queries"],
        "vision_config": {
            "hidden_size": s["dim"],
            "num_attention_heads": s["heads"],
            "num_hidden_layers": s["layers"],
            "intermediate_size": s["mlp"],
            "image_size": s["image"],
            "patch_size": s["patch"],
            "layer_norm_eps": s["eps"],
        },
        "visual_abstractor_config": {
            "hidden_size": s["dim"],
            "encoder_hidden_size": s["dim"],
            "num_attention_heads": s["heads"],
            "num_hidden_layers": s["layers"],
            "intermediate_size": 300,
            "layer_norm_eps": s["eps"],
        },
        "text_config": {"hidden_size": s["llm"]},
    }


def checkpoint(s: dict) -> dict[str, np.ndarray]:
    """Random tensors of both towers and of a language model, by the names of the public source."""
    dim, mlp, llm, half = s["dim"], s["mlp"], s["llm"], s["dim"] // 2
    positions = (s["image"] // s["patch"]) ** 2 + 1
    shapes = {
        "vision_model.embeddings.cls_token": (1, 1, dim),
        "vision_model.embeddings.patch_embed.weight": (dim, 3, s["patch"], s["patch"]),
        "vision_model.embeddings.position_embedding": (1, positions, dim),
        "query_tokens": (1, s["queries"], dim),
        "temporal_query_tokens": (1, s["queries"], dim),
        "abstractor.vit_eos": (1, 1, llm),
        "language_model.lm_head.weight": (11, llm),
    }

    def add(name, *weight):
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    add("vision_model.embeddings.pre_layernorm", dim)
    add("vision_model.post_layernorm", dim)
    add("abstractor.visual_fc", llm, dim)
    add("abstractor.temporal_visual_fc", llm, dim)
    for i in range(s["layers"]):
        layer = f"vision_model.encoder.layers.{i}."
        for name in ("temporal.ln", "input_layernorm", "post_attention_layernorm"):
            add(layer + name, dim)
        add(f"{layer}temporal.down_proj", half, dim, 1, 1, 1)
        add(f"{layer}temporal.conv", half, 1, 3, 1, 1)
        add(f"{layer}temporal.up_proj", dim, half, 1, 1, 1)
        add(f"{layer}self_attn.query_key_value", 3 * dim, dim)
        add(f"{layer}self_attn.dense", dim, dim)
        add(f"{layer}mlp.fc1", mlp, dim)
        add(f"{layer}mlp.fc2", dim, mlp)
        layer = f"abstractor.encoder.layers.{i}.crossattention."
        for name in ("norm1", "normk", "output.norm2"):
            add(layer + name, dim)
        for name in ("attention.query", "attention.key", "attention.value", "output.out_proj"):
            add(layer + name, dim, dim)
        add(f"{layer}output.mlp.w1", WIDTH, dim)
        add(f"{layer}output.mlp.w2", dim, WIDTH)
        add(f"{layer}output.mlp.w3", WIDTH, dim)
        add(f"{layer}output.mlp.ffn_ln", WIDTH)
    out = {}
    for number, (name, shape) in enumerate(shapes.items()):
        value = tiny.normal(*shape, seed=number)
        if name.endswith("weight"):
            norm = len(shape) == 1
            value = 1 + np.float32(0.3) * value if norm else value * np.float32(np.prod(shape[1:]) ** -0.5)
        out[name] = value * np.float32(0.02) if any(part in name for part in FAINT) else value
    return out


class Plain:
    """The arithmetic in float64, each step on the arrays that its names say."""

    def __init__(self, s: dict, tensors: dict):
        self.s = s
        self.t = {name: np.float64(value) for name, value in tensors.items()}

    def norm(self, name, x, eps):
        mean = x.mean(-1, keepdims=True)
        scaled = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
        return scaled * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def linear(self, name, x):
        weight = self.t[f"{name}.weight"]
        return x @ weight.reshape(len(weight), -1).T + self.t[f"{name}.bias"]

    def heads(self, q, k, v):
        """Lists of one [length d] a head -> [length D]."""
        out = []
        for one_q, one_k, one_v in zip(q, k, v):
            weights = np.exp(one_q @ one_k.T / np.sqrt(one_q.shape[-1]))
            out.append(weights / weights.sum(-1, keepdims=True) @ one_v)
        return np.concatenate(out, axis=-1)

    def adapter(self, layer, clip):
        """What a layer adds to a clip [T P D] before its attention; the class token is added to itself."""
        h = self.linear(f"{layer}down_proj", self.norm(f"{layer}ln", clip[:, 1:], 1e-5))
        taps, mixed = self.t[f"{layer}conv.weight"].reshape(-1, 3), np.zeros_like(h)
        for frame in range(len(h)):
            for tap in range(3):
                if 0 <= frame + tap - 1 < len(h):
                    mixed[frame] += h[frame + tap - 1] * taps[:, tap]
        mixed += self.t[f"{layer}conv.bias"]
        return np.concatenate([clip[:, :1], self.linear(f"{layer}up_proj", quick_gelu(mixed))], axis=1)

    def tower(self, frames):
        """Frames [T H W 3] of one clip -> features [T P D]."""
        s, name = self.s, "vision_model.embeddings."
        grid, size, kernel = s["image"] // s["patch"], s["patch"], self.t[f"{name}patch_embed.weight"]
        clip = np.zeros((len(frames), grid**2 + 1, s["dim"]))
        for t, i, j in np.ndindex(len(frames), grid, grid):
            patch = frames[t, i * size : (i + 1) * size, j * size : (j + 1) * size].transpose(2, 0, 1)
            clip[t, 1 + i * grid + j] = (kernel * patch).sum((1, 2, 3))
        clip[:, 0] = self.t[f"{name}cls_token"]
        clip = self.norm(f"{name}pre_layernorm", clip + self.t[f"{name}position_embedding"], s["eps"])
        for i in range(s["layers"]):
            layer = f"vision_model.encoder.layers.{i}."
            if len(frames) > 1:
                clip = clip + self.adapter(f"{layer}temporal.", clip)
            clip = np.stack([self.encoder_layer(layer, frame) for frame in clip])
        return self.norm("vision_model.post_layernorm", clip, s["eps"])

    def encoder_layer(self, layer, x):
        s = self.s
        fused = self.linear(f"{layer}self_attn.query_key_value", self.norm(f"{layer}input_layernorm", x, s["eps"]))
        width = s["dim"] // s["heads"]
        q, k, v = (
            [fused[:, (3 * h + part) * width : (3 * h + part + 1) * width] for h in range(s["heads"])]
            for part in range(3)
        )
        x = x + self.linear(f"{layer}self_attn.dense", self.heads(q, k, v))
        h = self.norm(f"{layer}post_attention_layernorm", x, s["eps"])
        return x + self.linear(f"{layer}mlp.fc2", quick_gelu(self.linear(f"{layer}mlp.fc1", h)))

    def abstractor(self, features):
        """Features [T P D] of one clip -> [Q D_llm]."""
        s, several = self.s, len(features) > 1
        queries = self.t["query_tokens"][0]
        if several:
            queries = np.concatenate([queries, self.t["temporal_query_tokens"][0]])
        for i in range(s["layers"]):
            layer = f"abstractor.encoder.layers.{i}.crossattention."
            queries = self.norm(f"{layer}norm1", queries, 1e-5)
            seen = np.concatenate([queries, self.norm(f"{layer}normk", features.reshape(-1, s["dim"]), 1e-5)])
            q, k, v = (
                np.split(self.linear(f"{layer}attention.{name}", x), s["heads"], axis=-1)
                for name, x in (("query", queries), ("key", seen), ("value", seen))
            )
            queries = queries + self.linear(f"{layer}output.out_proj", self.heads(q, k, v))
            h = self.norm(f"{layer}output.norm2", queries, 1e-5)
            gate = self.linear(f"{layer}output.mlp.w1", h)
            h = gate / (1 + np.exp(-gate)) * self.linear(f"{layer}output.mlp.w3", h)
            h = self.norm(f"{layer}output.mlp.ffn_ln", h, s["eps"])
            queries = queries + self.linear(f"{layer}output.mlp.w2", h)
        out = self.linear("abstractor.visual_fc", queries[: s["queries"]])
        if several:
            out = out + self.linear("abstractor.temporal_visual_fc", queries[s["queries"] :])
        return np.concatenate([out, self.t["abstractor.vit_eos"][0]])


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def run(family, module, params, arrays: dict) -> np.ndarray:
    """The one output of a tower, as `g4v forward` runs it."""

    def apply(params, arrays):
        return module.apply({"params": params}, arrays, np.float32, method=FORWARD[family.tower])

    (out,) = tiny.jit(apply)(params, arrays).values()
    return np.asarray(out)


@pytest.mark.parametrize("size", SIZES)
def test_the_tower_and_the_abstractor_compute_what_the_source_does(size):
    s = SIZES[size]
    tensors = checkpoint(s)
    plain = Plain(s, tensors)
    frames = tiny.normal(2, s["frames"], s["image"], s["image"], 3)
    features = np.stack([plain.tower(clip) for clip in np.float64(frames)])
    summary = np.stack([plain.abstractor(clip) for clip in features])

    def check(family, module, arrays, expected):
        params = tables.load(family, module, tables.Memory(tensors))
        out = run(family, module, params, arrays)
        assert out.shape == expected.shape
        assert np.abs(out - expected).max() <= 2e-5 * np.abs(expected).max()

    vision = Vision(**TOWER.fields(config(s)))
    check(TOWER, vision, {"frames": frames}, features)
    module = Abstractor(**SUMMARY.fields(config(s)))
    check(SUMMARY, module, {"features": np.float32(features)}, summary)
    assert module.tokens == s["queries"] + 1 == summary.shape[1]
    assert module.feature_shape == (vision.patches, vision.dim) == features.shape[2:]


@pytest.mark.parametrize("family", abstractor.FAMILIES, ids=lambda family: family.name)
def test_every_tensor_comes_back_bit_for_bit(family):
    tensors = checkpoint(SIZES["wide"])
    module = family.module(**family.fields(config(SIZES["wide"])))
    for value in tensors.values():
        value.flat[:2] = 0.0, -0.0  # fused tensors are put together by adding: zeros keep their sign
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        source = tables.Memory({name: value.astype(dtype) for name, value in tensors.items()})
        back = tables.unload(family, module, tables.load(family, module, source))
        left = tables.plan(family, module, source).left
        assert back.keys() == tensors.keys() - left.keys() and "language_model.lm_head.weight" in left
        for name, value in back.items():
            assert value.dtype == dtype and value.shape == source.shape(name), name
            assert value.tobytes() == source.read(name).tobytes(), name


def test_configs_there_and_back():
    s = SIZES["wide"]
    for family in abstractor.FAMILIES:
        for source in (config(s), {"model_type": "mplug-owl"}):
            fields = family.fields(source)
            module = family.module(**fields)
            assert family.fits(module) is None
            assert family.fields(json.loads(json.dumps(family.config(module)))) == fields
    published = SUMMARY.fields({"model_type": "mplug-owl"})  # the paper's: 64 + 1 tokens of LLaMA 7B's width
    assert published["num_queries"] == 64 and published["llm_dim"] == 4096 and published["patches"] == 257
    widths = {4096: 2816, 2816: 2816, 300: 256, 768: 512, 769: 512, 770: 768}
    for given, width in widths.items():
        assert SUMMARY.fields({"visual_abstractor_config": {"intermediate_size": given}})["mlp_dim"] == width, given


def test_what_does_not_fit_is_named():
    with pytest.raises(UserError, match="encoder_hidden_size 512 is not"):
        SUMMARY.fields({"visual_abstractor_config": {"encoder_hidden_size": 512}})
    with pytest.raises(UserError, match="vision_config.hidden_size 768 is not"):
        SUMMARY.fields({"vision_config": {"hidden_size": 768}})
    module = Abstractor(**SUMMARY.fields({}))
    assert "mlp_dim 97" in SUMMARY.fits(module.clone(mlp_dim=97))
    assert "256 patches" in SUMMARY.fits(module.clone(patches=256))
    tower = Vision(**TOWER.fields({}))
    assert TOWER.fits(tower.clone(activation="gelu")) and TOWER.fits(tower.clone(temporal=False))
    with pytest.raises(ValueError, match="need a class token"):
        tables.tower_shapes("vision", tower.clone(class_token=False))


def test_a_checkpoint_for_pictures_is_refused_as_lacking_the_temporal_parts():
    s = SIZES["wide"]
    tensors = {name: value for name, value in checkpoint(s).items() if "temporal" not in name}
    for family in abstractor.FAMILIES:
        with pytest.raises(UserError, match="tensors are missing, the first '.*temporal"):
            tables.load(family, family.module(**family.fields(config(s))), tables.Memory(tensors))


def test_a_picture_and_a_clip_have_the_same_parameters():
    for family in abstractor.FAMILIES:
        module = family.module(**family.fields(config(SIZES["few"])))

        def shapes(frames, module=module, family=family):
            arrays = {
                "frames": np.zeros((1, frames, 16, 16, 3), np.float32),
                "features": np.zeros((1, frames, 10, 28), np.float32),
            }
            init = lambda key: module.init(key, arrays, np.float32, method=FORWARD[family.tower])  # noqa: E731
            return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(init, jax.random.key(0)))

        assert shapes(1) == shapes(2)
