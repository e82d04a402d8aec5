"""Comparing an imported or exported tower with the reference library, on fixed inputs, where that library is installed.

May hold how each reference class is loaded and called; nothing else imports torch.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from g4v_jax import trees
from g4v_jax.weights.convert import Published, export_tower
from g4v_jax.weights.folder import TowerFolder
from g4v_jax.weights.forward import inputs, run
from g4v_jax.weights.leaves import Leaves, merged
from g4v_jax.weights.tables import Family, tower_shapes

LIMIT = 1 << 30  # bytes of float32 weights: beyond, a comparison would hold more than a conversion may
LIBRARIES = {"llm": "transformers", "vision": "transformers", "denoiser": "diffusers", "autoencoder": "diffusers"}


def compare(published: Path, tower: TowerFolder) -> dict:
    """An imported tower beside what it came from.

    Both run on `forward.inputs`, in float32 -> {"reference", "outputs": {name: relative error}, "relative_error"} with
    errors max |ours - theirs| / max |theirs|; or {"skipped": why}.
    """
    return _compare(published, tower.family, tower.module, tower.load_whole)


def compare_export(published: Path, leaves: Leaves, family: Family, module, dtype: np.dtype | None) -> dict:
    """An exported tower beside the leaves it was made of, rounded as the files are; as `compare`."""
    leaves, module = merged(leaves, module)

    def params():
        paths = trees.flatten(tower_shapes(family.tower, module))
        rounded = {path: leaves.read(path, None).astype(dtype or leaves.dtype(path)) for path in paths}
        return trees.unflatten({path: jnp.asarray(value, jnp.float32) for path, value in rounded.items()})

    return _compare(published, family, module, params)


def compare_adapter(adapter: Path, leaves: Leaves, family: Family, module) -> dict:
    """A PEFT folder over its base, which peft loads from a folder that is gone afterwards, beside a tower's leaves with
    LoRA; as `compare`."""
    plain = module.clone(parent=None, lora=(), lora_rank=0, added_tokens=0)
    own = module.clone(parent=None, added_tokens=0)

    def params():
        paths = trees.flatten(tower_shapes(family.tower, own))
        return trees.unflatten({path: jnp.asarray(leaves.read(path, None), jnp.float32) for path in paths})

    def reference(arrays: dict) -> dict[str, np.ndarray]:
        import peft
        import torch
        import transformers

        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "base"
            export_tower(leaves, family, plain, base, str(adapter), Published(), LIMIT)
            model = getattr(transformers, family.architectures[0]).from_pretrained(
                base, dtype=torch.float32, attn_implementation="eager"
            )
            model = peft.PeftModel.from_pretrained(model, adapter).eval()
            with torch.no_grad():
                return {"logits": model(input_ids=torch.from_numpy(arrays["tokens"]).long()).logits.numpy()}

    return _compared(("peft", "torch", "transformers"), reference, family, own, params)


def _compare(published: Path, family: Family, module, params: Callable[[], dict]) -> dict:
    if published.suffix == ".onnx":
        return _compared(("onnxruntime",), lambda arrays: _graph(published, arrays), family, module, params)
    library = LIBRARIES.get(family.tower)
    if library is None:
        return {"skipped": f"no library computes a {family.name}"}
    return _compared((library, "torch"), lambda arrays: _reference(family, published, arrays), family, module, params)


def _compared(needed: tuple[str, ...], reference: Callable, family: Family, module, params: Callable[[], dict]) -> dict:
    """What `compare` gives, by a reference that needs these packages, the first of which is named."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"{' and '.join(missing)} not installed (pip install g4v_jax[parity])"}
    size = 4 * trees.count(tower_shapes(family.tower, module))
    if size > LIMIT:
        return {"skipped": f"{size / 2**30:.1f} GiB of weights would be held twice; the limit is {LIMIT / 2**30:.0f} GiB"}
    arrays = inputs(family.tower, module)
    theirs = reference(arrays)
    if theirs is None:
        return {"skipped": "the graph was exported for pictures of another size"}
    ours = run(family.tower, module, params(), arrays)
    errors = {name: float(np.abs(ours[name] - value).max() / np.abs(value).max()) for name, value in theirs.items()}
    return {"reference": needed[0], "outputs": errors, "relative_error": max(errors.values())}


def _graph(published: Path, arrays: dict) -> dict[str, np.ndarray] | None:
    """The last hidden state inside an ONNX graph; None where it does not take pictures of this size."""
    import onnx
    import onnxruntime

    from g4v_jax.weights.onnx import OnnxGraph

    model = onnx.load(published, load_external_data=False)
    last, pictures = OnnxGraph(published).last, model.graph.input[0]
    del model.graph.output[:]
    model.graph.output.add().name = last
    for axis in pictures.type.tensor_type.shape.dim:
        axis.dim_param = f"free_{axis.dim_value}"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a size that it does not take is told by us
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    frames = arrays["frames"]
    pixels = frames.reshape(-1, *frames.shape[2:]).transpose(0, 3, 1, 2)
    try:
        features = session.run([last], {pictures.name: pixels})[0]
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
        return None
    return {"features": features.reshape(*frames.shape[:2], *features.shape[1:])}


def _reference(family: Family, published: Path, arrays: dict) -> dict[str, np.ndarray]:
    import torch

    kind, name = family.tower, family.architectures[0]
    folder, options = str(published), {}
    if published.is_file():
        folder, options = str(published.parent), {"gguf_file": published.name}
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}
    with torch.no_grad():
        if LIBRARIES[kind] == "transformers":
            import transformers

            kind_of = getattr(transformers, name)
            model = kind_of.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options).eval()
            if kind == "llm":
                return {"logits": model(tensors["tokens"].long()).logits.numpy()}
            frames = tensors["frames"].flatten(0, 1).permute(0, 3, 1, 2)
            table = getattr(model.config, "image_size", None)
            resized = {} if family.name == "dinov2" or table in (None, frames.shape[-1]) else {"interpolate_pos_encoding": True}
            features = model(pixel_values=frames, **resized).last_hidden_state
            return {"features": features.reshape(*arrays["frames"].shape[:2], *features.shape[1:]).numpy()}
        import diffusers

        model = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32).eval()
        if kind == "denoiser":
            latents = tensors["latents"].permute(0, 4, 1, 2, 3)
            extra = {"encoder_hidden_states_image": tensors["image_context"]} if "image_context" in tensors else {}
            out = model(latents, timestep=tensors["timestep"], encoder_hidden_states=tensors["context"], **extra).sample
            return {"prediction": out.permute(0, 2, 3, 4, 1).numpy()}
        video = tensors["video"].permute(0, 4, 1, 2, 3)
        if "temperal_downsample" in model.config:
            mean = model.encode(video).latent_dist.mean
            decoded = model.decode(mean).sample
        else:  # of images: frames one by one
            frames = video.transpose(1, 2).flatten(0, 1)
            mean = model.encode(frames).latent_dist.mean
            decoded = model.decode(mean).sample
            mean, decoded = (x.unflatten(0, (video.shape[0], -1)).transpose(1, 2) for x in (mean, decoded))
        return {"latents": mean.permute(0, 2, 3, 4, 1).numpy(), "reconstruction": decoded.permute(0, 2, 3, 4, 1).numpy()}
