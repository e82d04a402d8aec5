"""How near renderings are to real clips, by encoders: distances of sets, and agreement of single clips with their own.

May hold the encoders that look at clips, and the figures made of their features; the distances are `distances`' business.

    "own"      the run's own vision tower: it was trained on such clips, so read it within one run
    "encoder"  an imported vision tower that the run need not know (`evaluate.encoder`)
    I3D        `evaluate.i3d`: KVD and FVD
    CLIP       `evaluate.clip`: CLIPSIM
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax import sharding
from g4v_jax.errors import UserError
from g4v_jax.evals import distances, i3d
from g4v_jax.evals.figures import Figure
from g4v_jax.models.vision import Vision
from g4v_jax.weights.folder import TowerFolder

BATCH = 16  # clips at a time, or as many more as the mesh needs
MIN_CLIPS = 4  # of a set, for a distance to have an interval


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A vision tower that looks at clips, frame by frame."""

    name: str  # in figures
    module: Vision
    params: dict
    mesh: jax.sharding.Mesh

    @classmethod
    def imported(cls, folder: str) -> "Encoder":
        """The vision tower of a folder of `g4v import`. Raises UserError for another tower."""
        tower = TowerFolder(Path(folder))
        if tower.family.tower != "vision":
            raise UserError(f"evaluate.encoder: {folder} is a {tower.family.tower}; give an imported vision tower")
        one = sharding.one_device()
        return cls("encoder", tower.module, tower.load(tower.shapes(one)), one)

    def frames(self, videos: np.ndarray) -> np.ndarray:
        """Clips u8 [N T H W 3] -> f32 [N T D]: each frame's features, averaged over patches."""
        rows, batch = [], -(-BATCH // self.mesh.size) * self.mesh.size
        for start in range(0, len(videos), batch):
            part = videos[start : start + batch]
            filled = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.uint8)])  # one compilation
            with jax.set_mesh(self.mesh):
                found = _frame_features(self.module, self.params, sharding.put_whole_batch(filled, self.mesh))
            rows.append(np.asarray(found)[: len(part)])
        return np.concatenate(rows)


@partial(jax.jit, static_argnums=0)
def _frame_features(module: Vision, params: dict, videos: jax.Array) -> jax.Array:
    clips, frames = videos.shape[:2]
    size = (clips * frames, module.image_size, module.image_size, 3)
    x = videos.reshape(-1, *videos.shape[2:]).astype(jnp.float32)
    x = jnp.clip(jnp.round(jax.image.resize(x, size, "bilinear")), 0, 255).astype(jnp.uint8)
    features = module.apply({"params": params}, x, jnp.float32, frames)
    return sharding.gathered(jnp.mean(features, axis=1).reshape(clips, frames, -1))


def agreement(encoder: Encoder, videos: np.ndarray, real: np.ndarray, prefix: str, biased: bool) -> dict[str, Figure]:
    """How renderings resemble the real clips that were asked for, and those of other requests; both u8 [N T H W 3].

    "{prefix}/agreement_{encoder}": mean cosine of a rendering's features with its own real clip's, both less the real
    clips' mean, which all clips share; "..._others" with each of the other real clips'. "{prefix}/frames_{encoder}_kernel"
    and, where `biased` ones are wanted, "..._frechet": distances of the sets of single frames, blind to motion. Fréchet
    distances hang on the number of clips: those of sets of other sizes tell nothing.
    """
    ours, theirs = encoder.frames(videos), encoder.frames(real)
    centre = theirs.mean((0, 1))
    a, b = (x.mean(1) - centre for x in (ours, theirs))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    cosines = a @ b.T
    figures = {f"{prefix}/agreement_{encoder.name}": Figure.mean(np.diag(cosines))}
    if len(videos) > 1:
        others = (cosines.sum(1) - np.diag(cosines)) / (len(videos) - 1)
        figures[f"{prefix}/agreement_{encoder.name}_others"] = Figure.mean(others)
    return figures | _distances(f"{prefix}/frames_{encoder.name}_", ours, theirs, biased, distances.framewise)


def video_distances(weights: str, videos: np.ndarray, real: np.ndarray, prefix: str, biased: bool) -> dict[str, Figure]:
    """"{prefix}/i3d_kernel", which is KVD, and "..._frechet", FVD, of clips u8 [N T H W 3] under I3D's `weights`.

    With few clips FVD is mostly its own bias, which KVD does not have; `biased` as for `agreement`.
    """
    params = i3d.load(weights)
    return _distances(f"{prefix}/i3d_", *(i3d.features(params, clips) for clips in (videos, real)), biased)


def check_i3d(weights: str, frames: int) -> None:
    """Raise UserError where `video_distances` could not be measured on clips of so many frames."""
    if frames < i3d.MIN_FRAMES:
        raise UserError(f"evaluate.i3d: clips of {frames} frames are shorter than the metric needs: {i3d.MIN_FRAMES} or more")
    i3d.load(weights)


def check_clip(folder: str) -> None:
    """Raise UserError where `clipsim` would find no weights."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"evaluate.clip: {folder} is no folder of CLIP as transformers keeps it; give one, or leave it empty")


def clipsim(folder: str, videos: np.ndarray, texts: Sequence[str], prefix: str) -> dict[str, Figure]:
    """"{prefix}/clipsim": cosine between CLIP's view of each frame and the text, averaged over frames (Wu et al. 2021).

    `folder`: CLIP's weights as transformers keeps them, which does the work. Raises UserError where it is not installed
    or cannot read the folder; pickled weights are not read.
    """
    try:
        import torch
        from transformers import AutoProcessor, CLIPModel
    except ImportError:
        raise UserError("evaluate.clip needs transformers and torch: pip install .[parity], or leave it empty") from None
    try:
        options = dict(local_files_only=True)
        model = CLIPModel.from_pretrained(folder, use_safetensors=True, **options).eval()
        processor = AutoProcessor.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"evaluate.clip: {folder} is no CLIP that transformers can read ({str(error)[:200]})") from None
    scores = []
    with torch.no_grad():
        for video, text in zip(videos, texts):
            inputs = processor(text=[text], images=list(video), return_tensors="pt", padding=True, truncation=True)
            out = model(**inputs)
            frames, words = (x / x.norm(dim=-1, keepdim=True) for x in (out.image_embeds, out.text_embeds))
            scores.append(float((frames @ words.T).mean()))
    return {f"{prefix}/clipsim": Figure.mean(scores)}


def _distances(name: str, ours: np.ndarray, theirs: np.ndarray, biased: bool, over: Callable | None = None) -> dict:
    """Distances with their intervals; {} for fewer than MIN_CLIPS."""
    if min(len(ours), len(theirs)) < MIN_CLIPS:
        return {}
    named = {"kernel": distances.kernel} | ({"frechet": distances.frechet} if biased else {})
    kinds = {kind: partial(over, distance=one) if over else one for kind, one in named.items()}
    return {f"{name}{kind}": distances.figure(one, ours, theirs) for kind, one in kinds.items()}
