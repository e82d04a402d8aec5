"""Vision families against transformers: the same features from the same weights, and every tensor back bit for bit."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.numpy import load_file, save_file

from g4v_jax.errors import UserError
from g4v_jax.models.vision import Vision
from g4v_jax.weights import tables, vision
from g4v_jax.weights.forward import FORWARD

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = dict(num_hidden_layers=3, layer_norm_eps=0.02)  # large enough to be seen
PLAIN = dict(SMALL, hidden_size=60, num_attention_heads=4, intermediate_size=97, image_size=21, patch_size=7)
NARROW = dict(SMALL, hidden_size=42, num_attention_heads=3, intermediate_size=51, image_size=30, patch_size=6)
CUT = dict(PLAIN, image_size=40, patch_size=7)  # 5 of 40 pixels fill no patch
CASES = {  # family, transformers' model and config, what differs from its defaults
    "clip": ("clip", "CLIPVisionModel", "CLIPVisionConfig", PLAIN),
    "clip, gelu": ("clip", "CLIPVisionModel", "CLIPVisionConfig", dict(NARROW, hidden_act="gelu")),
    "siglip": ("siglip", "SiglipVisionModel", "SiglipVisionConfig", NARROW),
    "siglip, cut": ("siglip", "SiglipVisionModel", "SiglipVisionConfig", CUT),
    "siglip2": ("siglip2", "Siglip2VisionModel", "Siglip2VisionConfig", dict(PLAIN, image_size=None, num_patches=9)),
    "siglip2, finer": (
        "siglip2",
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        dict(NARROW, image_size=None, num_patches=25),
    ),
    "dinov2": ("dinov2", "Dinov2Model", "Dinov2Config", dict(PLAIN, intermediate_size=None, mlp_ratio=3)),
    "dinov2, cut": ("dinov2", "Dinov2Model", "Dinov2Config", dict(CUT, intermediate_size=None, hidden_size=36)),
    "dinov2, gated": (
        "dinov2",
        "Dinov2Model",
        "Dinov2Config",
        dict(NARROW, intermediate_size=None, mlp_ratio=2, use_swiglu_ffn=True),
    ),
}
FAMILIES = {family.name: family for family in vision.FAMILIES}
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def randomise(model) -> None:
    """Every parameter random and large enough to be seen: norms, biases and LayerScale too."""
    generator = torch.Generator().manual_seed(7)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1 and min(value.shape[:2]) > 1:
            noise *= (value.numel() / len(value)) ** -0.5
        elif "norm" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        value.data.copy_(noise)


def reference(case: str, folder):
    """(family, transformers' model with random weights, its tensors by the names it saves, its config as saved)."""
    family, model, config, changes = CASES[case]
    config = getattr(transformers, config)(**{key: value for key, value in changes.items() if value is not None})
    model = getattr(transformers, model)(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return FAMILIES[family], model, load_file(folder / "model.safetensors"), config


def run_theirs(model, frames: np.ndarray) -> np.ndarray:
    """Last hidden states of frames [X H W 3]."""
    pixels = torch.tensor(frames.transpose(0, 3, 1, 2))
    inputs = {"pixel_values": pixels}
    if isinstance(model, transformers.Siglip2VisionModel):
        size, (x, height, width, _) = model.config.patch_size, frames.shape
        cut = frames.reshape(x, height // size, size, width // size, size, 3).swapaxes(2, 3).reshape(x, -1, size**2 * 3)
        inputs = dict(
            pixel_values=torch.tensor(cut),
            pixel_attention_mask=torch.ones(cut.shape[:2], dtype=torch.int64),
            spatial_shapes=torch.tensor([[height // size, width // size]] * x),
        )
    with torch.no_grad():
        return model(**inputs).last_hidden_state.numpy()


def run_ours(module, params: dict, frames: np.ndarray) -> np.ndarray:
    """Features of frames [X H W 3], as `g4v forward` takes them: X = 1 clip of X frames."""

    def run(params, frames):
        return module.apply({"params": params}, {"frames": frames[None]}, np.float32, method=FORWARD["vision"])

    return np.asarray(tiny.jit(run)(params, frames)["features"][0])


def assert_near(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_transformers_and_come_back_as_a_checkpoint(case, tmp_path):
    family, model, tensors, config = reference(case, tmp_path)
    fields = family.fields(config)
    module = Vision(**fields)
    assert family.fits(module) is None
    assert family.fields(json.loads(json.dumps(family.config(module)))) == fields
    params = tables.load(family, module, tables.Memory(tensors))
    frames = tiny.normal(2, module.image_size, module.image_size, 3)
    theirs = run_theirs(model, frames)
    assert_near(run_ours(module, params, frames), theirs)

    neutral = {name: np.full(shape, value, np.float32) for name, (shape, value) in family.neutral(module).items()}
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "config.json").write_text(json.dumps(family.config(module)))
    weights = {name: np.ascontiguousarray(x) for name, x in tables.unload(family, module, params).items()}
    save_file(weights | neutral, tmp_path / "back" / "model.safetensors")
    back, said = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(said.values())
    np.testing.assert_array_equal(run_theirs(back.eval(), frames), theirs)


@pytest.mark.parametrize("case", ["clip", "siglip", "siglip2", "dinov2", "dinov2, gated"])
def test_every_tensor_comes_back_bit_for_bit(case, tmp_path):
    family, _, tensors, config = reference(case, tmp_path)
    module = Vision(**family.fields(config))
    for name, tensor in tensors.items():
        tensor.flat[:2] = 0.0, -0.0  # a fused tensor is put together by adding: zeros keep their sign
    for dtype in DTYPES:
        source = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        back = tables.unload(family, module, tables.load(family, module, tables.Memory(source)))
        left = {family.bare(name) for name in family.neutral(module)}
        back = {family.bare(name): value for name, value in back.items()}
        assert back.keys() == {family.bare(name) for name in source} - left
        for name, value in source.items():
            if family.bare(name) not in left:
                got = back[family.bare(name)]
                assert got.dtype == dtype and got.shape == value.shape, name
                assert got.tobytes() == value.tobytes(), name


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Siglip2"])
def test_the_vision_part_of_a_pair_is_taken_and_the_rest_left_with_a_reason(name, tmp_path):
    text = dict(SMALL, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    text |= dict(bos_token_id=1, eos_token_id=2)
    size = dict(num_patches=9) if name == "Siglip2" else dict(image_size=21)
    seen = {key: PLAIN[key] for key in PLAIN if key != "image_size"} | size
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=seen)
    model = getattr(transformers, f"{name}Model")(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    family = next(family for family in vision.FAMILIES if config["architectures"][0] in family.architectures)
    module = Vision(**family.fields(config))
    assert module.image_size == 21 and module.dim == 60
    plan = tables.plan(family, module, tables.Memory(tensors))
    assert {family.bare(name) for name in family.neutral(module)} <= {family.bare(name) for name in plan.left}
    assert plan.left["logit_scale"] == "compares pictures with texts"
    frames = tiny.normal(2, 21, 21, 3)
    params = tables.load(family, module, tables.Memory(tensors))
    assert_near(run_ours(module, params, frames), run_theirs(model.vision_model, frames))


def test_configs_say_how_pictures_are_normalised_where_the_source_does():
    for family in vision.FAMILIES:
        fields = family.fields({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "image_size": None})
        assert fields["mean"] == (0.1, 0.2, 0.3) and fields["std"] == (1.0, 1.0, 1.0), family.name
        assert family.fields(family.config(Vision(**fields))) == fields
    assert FAMILIES["siglip"].fields({})["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("clip", {"num_channels": 1}, "num_channels 1"),
        ("clip", {"hidden_act": "quick_gelo"}, "did you mean 'quick_gelu'"),
        ("clip", {"hidden_size": 50, "num_attention_heads": 4}, "does not divide by num_attention_heads 4"),
        ("siglip", {"image_size": [224, 448]}, "pictures are square"),
        ("siglip2", {"num_patches": 200}, "a square number"),
        ("dinov2", {"qkv_bias": False}, "qkv_bias"),
    ],
)
def test_configs_that_are_not_supported_are_named(family, config, message):
    with pytest.raises(UserError, match=message):
        FAMILIES[family].fields(config)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("clip", dict(stem="conv"), "stem 'conv'"),
        ("clip", dict(final_norm=True), "final_norm True"),
        ("siglip", dict(class_token=True), "class_token True"),
        ("siglip2", dict(image_size=225), "does not divide by its patch_size 16"),
        ("dinov2", dict(layer_scale=None), "no layer_scale"),
        ("dinov2", dict(gated=True), "gated by 'gelu'"),
        ("dinov2", dict(mlp_dim=777), "no whole mlp_ratio"),
        ("dinov2", dict(temporal=True), "temporal True"),
    ],
)
def test_towers_that_a_family_cannot_express_are_refused(family, changes, message):
    module = Vision(**FAMILIES[family].fields({}))
    assert FAMILIES[family].fits(module) is None
    assert message in FAMILIES[family].fits(module.clone(**changes))


def test_a_table_of_another_size_is_named():
    family = FAMILIES["dinov2"]
    module = Vision(**family.fields(dict(PLAIN, mlp_ratio=2)))
    shapes = tables.tower_shapes("vision", module)
    tensors = tables.unload(family, module, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    with pytest.raises(UserError, match=r"position_embeddings is \[1, 10, 60\], but config.json makes it \[1, 17"):
        tables.load(family, module.clone(image_size=28), tables.Memory(tensors))
