"""From a config to the parts of a run: the one reader of configs.

Every part is plain Python or a pure function of arrays; nothing here touches a device until it is asked to.
"""

import dataclasses
import math
from functools import cached_property
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from g4v_jax import config as configs
from g4v_jax import sharding, trees
from g4v_jax.data.corpus import TokenizerSpec
from g4v_jax.data.pack import RowShape, single
from g4v_jax.data.pipeline import Pipeline
from g4v_jax.diffusion import ddpm
from g4v_jax.diffusion.process import process
from g4v_jax.errors import UserError, nearest
from g4v_jax.evals.spec import EvalSpec
from g4v_jax.infer.assistant import SampleSpec
from g4v_jax.losses.alignment import Alignment, AlignmentSpec
from g4v_jax.losses.denoising import Denoising, DenoisingSpec
from g4v_jax.losses.generation import GenerationSpec
from g4v_jax.losses.joint import Joint, JointSpec
from g4v_jax.losses.language import Language, LanguageSpec
from g4v_jax.losses.reconstruction import Reconstruction, ReconstructionSpec
from g4v_jax.losses.rendering import Rendering
from g4v_jax.models.abstractor import Abstractor
from g4v_jax.models.autoencoder import Autoencoder
from g4v_jax.models.autoencoder_kl import KLAutoencoder
from g4v_jax.models.autoencoder_wan import WanAutoencoder
from g4v_jax.models.conditioner import Conditioner
from g4v_jax.models.denoiser import Denoiser
from g4v_jax.models.gpt4video import GPT4Video
from g4v_jax.models.llm import LLM
from g4v_jax.models.summarizer import Summarizer
from g4v_jax.models.unet3d import UNet3D
from g4v_jax.models.vision import Vision
from g4v_jax.precision import compute_dtype
from g4v_jax.train.loop import LoopSpec
from g4v_jax.train.optim import Optimizer
from g4v_jax.train.state import Blueprint
from g4v_jax.train.step import StepSpec
from g4v_jax.weights.folder import TowerFolder, is_tower

TOWERS = {"vision", "summarizer", "llm", "conditioner", "autoencoder", "denoiser"}
SUMMARIZERS = {"summarizer": Summarizer, "abstractor": Abstractor}  # of each table the first is the default
AUTOENCODERS = {"blocks": Autoencoder, "kl": KLAutoencoder, "wan": WanAutoencoder}
DENOISERS = {"dit": Denoiser, "unet3d": UNet3D}
OBJECTIVES = {
    "joint": (Joint, JointSpec),
    "reconstruction": (Reconstruction, ReconstructionSpec),
    "alignment": (Alignment, AlignmentSpec),
    "rendering": (Rendering, GenerationSpec),
    "language": (Language, LanguageSpec),
    "denoising": (Denoising, DenoisingSpec),
}
ALONE = {"language": "llm", "denoising": "denoiser"}  # the only tower of an objective
SLOTS = {"joint": ("clips", "targets"), "alignment": ("clips",), "rendering": ("targets",)}  # that an objective needs


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes by name; `auto` is bfloat16 on accelerators and float32 on CPU."""

    compute: str = "auto"
    frozen: str = "auto"


@dataclasses.dataclass(frozen=True)
class World:
    """Size of the built-in world: training examples of each kind."""

    clips: int
    hazards: int
    dialogues: int
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Sections:
    """The top level of a config: each field is a section (or a plain value) that some part below reads."""

    model: dict
    rows: dict
    data: dict
    tokenizer: dict
    train: dict
    objective: str = "joint"
    losses: dict = dataclasses.field(default_factory=dict)
    optimizer: dict = dataclasses.field(default_factory=dict)
    step: dict = dataclasses.field(default_factory=dict)
    mesh: dict = dataclasses.field(default_factory=lambda: {"fsdp": -1})
    precision: dict = dataclasses.field(default_factory=dict)
    init: dict = dataclasses.field(default_factory=dict)  # tower -> workdir whose weights it starts from
    trainable: tuple[str, ...] = (".*",)
    ema: tuple[str, ...] = ()
    source: str = ""  # folder of clips and texts that the records are built from, or several with commas between
    world: dict = dataclasses.field(default_factory=dict)  # what `g4v data make` writes into `source`
    sample: dict = dataclasses.field(default_factory=dict)
    evaluate: dict = dataclasses.field(default_factory=dict)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Build:
    """The parts of one config. `devices`: to build the mesh from (default: all)."""

    config: ConfigDict
    devices: tuple | None = None

    @cached_property
    def sections(self) -> Sections:
        """The config's top level, checked."""
        return configs.read(Sections, self.config, "config")

    @cached_property
    def llm(self) -> LLM:
        """The language model; with the objective "language" it is all there is."""
        section = dict(self.sections.model).get("llm", {})
        added = dict(section).get("added_tokens", 0)  # a wrong type is told when the field is read
        words = self.tokenizer.vocab_size - (added if isinstance(added, int) else 0)
        return configs.read(LLM, section, "model.llm", vocab_size=words)

    @cached_property
    def denoiser(self) -> Denoiser | UNet3D:
        """The denoiser; with the objective "denoising" it is all there is, and a transformer."""
        return self._tower("denoiser", Denoiser) if self.alone else self.model.denoiser

    @property
    def alone(self) -> str | None:
        """The only tower, where the objective is of one."""
        return ALONE.get(self.sections.objective)

    @property
    def main(self) -> tuple[str, LLM | Denoiser]:
        """Name and module of the tower that most is spent on: the only one, or the language model."""
        name = self.alone or "llm"
        return name, getattr(self, name)

    @property
    def towers(self) -> dict[str, nn.Module]:
        """By name; of an objective of one tower, that one."""
        return dict([self.main]) if self.alone else {name: getattr(self.model, name) for name in sorted(TOWERS)}

    @property
    def patches(self) -> int:
        """Of one clip to render, where the denoiser is a transformer."""
        latents = self.objective.spec.latents if self.alone else self.latent_shape
        return math.prod(side // patch for side, patch in zip(latents, self.denoiser.patch))

    @property
    def length(self) -> int:
        """How many tokens of a row, or patches of a clip, the main tower reads at once."""
        return self.patches if self.alone == "denoiser" else self.shape.tokens

    def _tower(self, name: str, kind, **derived):
        """A tower of a class, or of a table of classes that its field `kind` chooses from."""
        section = dict(dict(self.sections.model).get(name, {}))
        if isinstance(kind, dict):
            chosen = section.pop("kind", next(iter(kind)))
            if chosen not in tuple(kind):
                raise UserError(f"config: model.{name}.kind: unknown {chosen!r}{nearest(str(chosen), kind)}")
            kind = kind[chosen]
        return configs.read(kind, section, f"model.{name}", **derived)

    @cached_property
    def model(self) -> GPT4Video:
        """The towers; sizes that must agree are set in one of them and follow in the others."""
        towers, rows = dict(self.sections.model), self.sections.rows
        window = towers.pop("caption_window", 0)
        if not isinstance(window, int) or window < 0:
            raise UserError(f"config: model.caption_window is {window!r}; expected a whole number of tokens")
        for name in towers.keys() - TOWERS:
            raise UserError(f"config: model has no tower {name!r}{nearest(name, TOWERS)}")

        llm = self.llm
        vision = self._tower("vision", Vision)
        autoencoder = self._tower("autoencoder", AUTOENCODERS)
        conditioner = self._tower("conditioner", Conditioner, length=window + rows["query_tokens"])
        widths = {"latent_channels": autoencoder.latent_channels, "context_dim": conditioner.dim}
        abstractor = dict(towers.get("summarizer", {})).get("kind") == "abstractor"
        patches = {"patches": vision.patches} if abstractor else {}
        summarizer = self._tower("summarizer", SUMMARIZERS, llm_dim=llm.dim, **patches)
        denoiser = self._tower("denoiser", DENOISERS, **widths)
        if denoiser.image_dim:
            raise UserError(
                "config: model.denoiser.image_dim: image-to-video denoisers can be imported, run and exported, not trained"
            )
        return GPT4Video(
            vision=vision,
            summarizer=summarizer,
            llm=llm,
            conditioner=conditioner,
            autoencoder=autoencoder,
            denoiser=denoiser,
            num_queries=rows["query_tokens"],
            caption_window=window,
            dtype=self.compute,
        )

    @cached_property
    def shape(self) -> RowShape:
        """Sizes of a packed row."""
        if self.alone:
            derived = dict.fromkeys(("summary_tokens", "query_tokens", "clip_frames", "clip_size", "target_frames", "target_size"), 1)
            derived |= dict.fromkeys(("clips", "targets", "hazards"), 0)
        else:
            derived = {"summary_tokens": self.model.summarizer.tokens, "clip_size": self.model.vision.image_size}
        return configs.read(RowShape, self.sections.rows, "rows", **derived)

    @cached_property
    def latents(self) -> tuple[int, ...]:
        """(G, t, h, w, c) of a row's targets."""
        return (self.shape.targets, *self.latent_shape)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(t, h, w, c) of one clip to render."""
        try:
            return self.model.autoencoder.latent_shape(*self.shape.target_shape)
        except ValueError as error:
            raise UserError(f"config: rows.target_frames, rows.target_size: {error}") from None

    @cached_property
    def objective(self) -> Joint | Reconstruction | Alignment | Rendering | Language:
        """What is minimised."""
        name = self.sections.objective
        if name not in OBJECTIVES:
            raise UserError(f"config: objective: unknown {name!r}{nearest(name, OBJECTIVES)}")
        kind, spec = OBJECTIVES[name]
        spec = configs.read(spec, self.sections.losses, "losses")
        chunks = getattr(spec, "chunks", 1)
        if chunks < 1 or self.shape.tokens % chunks:
            raise UserError(f"config: losses.chunks is {chunks}; rows.tokens, {self.shape.tokens}, must be a multiple of it")
        if kind is Language:
            return Language(self.llm, spec, self.compute)
        if kind is Denoising:
            return Denoising(self.denoiser, spec, self.compute)
        if kind is Reconstruction and not isinstance(self.model.autoencoder, Autoencoder):
            raise UserError("config: objective 'reconstruction' trains only a model.autoencoder of kind 'blocks'")
        for slots in SLOTS.get(name, ()):
            if not getattr(self.shape, slots):
                raise UserError(f"config: rows.{slots} is 0; objective {name!r} needs 1 at least, used or not")
        if kind is Joint and spec.keep and not self.model.llm.lora:
            raise UserError("config: losses.keep stays near the LLM with LoRA off, and model.llm.lora is empty; set it to 0")
        if kind in (Joint, Rendering, Denoising):
            try:
                process(self.denoiser.prediction, spec.time_shift)
            except ValueError as error:
                raise UserError(f"config: losses.time_shift: {error}") from None
        return kind(self.model.autoencoder if kind is Reconstruction else self.model, spec, self.latents)

    @cached_property
    def precision(self) -> Precision:
        """Dtype names."""
        return configs.read(Precision, self.sections.precision, "precision")

    @cached_property
    def tokenizer(self) -> TokenizerSpec:
        """Which tokenizer."""
        return configs.read(TokenizerSpec, self.sections.tokenizer, "tokenizer")

    @cached_property
    def world(self) -> World:
        """What `g4v data make` makes."""
        return configs.read(World, self.sections.world, "world")

    @cached_property
    def sample(self) -> SampleSpec:
        """How the trained model is used; times are shifted as in training."""
        shift = {"time_shift": self.objective.spec.time_shift} if isinstance(self.objective, Joint) else {}
        spec = configs.read(SampleSpec, self.sections.sample, "sample", **shift)
        if not self.alone and self.model.denoiser.prediction == "epsilon":
            try:
                ddpm.schedule(spec.steps)
            except ValueError as error:
                raise UserError(f"config: sample.steps: {error}") from None
        return spec

    @cached_property
    def evaluation(self) -> EvalSpec:
        """What `g4v eval` measures."""
        return configs.read(EvalSpec, self.sections.evaluate, "evaluate")

    @cached_property
    def pipeline(self) -> Pipeline:
        """How records become batches."""
        return configs.read(Pipeline, self.sections.data, "data")

    @cached_property
    def optimizer(self):
        """The optax transformation."""
        return configs.read(Optimizer, self.sections.optimizer, "optimizer").build(self.loop.steps)

    @cached_property
    def step(self) -> StepSpec:
        """How a step is taken. Raises UserError where rows, tokens or heads do not divide over micro-batches and mesh."""
        spec = configs.read(StepSpec, self.sections.step, "step")
        parts = spec.micro_batches * self.mesh.shape["replica"] * self.mesh.shape["fsdp"]
        if self.shape.rows % parts:
            raise UserError(
                f"config: rows.rows is {self.shape.rows}; it must be a multiple of {parts} "
                "(step.micro_batches x mesh.replica x mesh.fsdp)"
            )
        self._split_over_context(self.shape.rows // parts)
        if self.sections.objective != "reconstruction":
            for name, tower in self.towers.items():
                for field in ("num_heads", "num_kv_heads"):
                    heads = getattr(tower, field, None)  # a UNet's follow from its channels, and are whole
                    if heads:
                        self._divides("tensor", f"model.{name}.{field}", heads)
        return spec

    def _split_over_context(self, rows: int) -> None:
        """`rows`: of a micro-batch on one device."""
        if self.alone != "denoiser":
            self._divides("context", "rows.tokens", self.shape.tokens)
        if not self.alone:
            frames = rows * self.shape.clips * self.shape.clip_frames
            self._divides("context", "the number of frames that a device watches (of its rows, rows.clips x rows.clip_frames)", frames)
            self._divides("context", "the height of rows.target_size", self.shape.target_shape[1])
        if self.alone != "llm" and isinstance(self.denoiser, Denoiser):
            self._divides("context", "the number of patches of a clip to render", self.patches)

    def _divides(self, axis: str, name: str, length: int) -> None:
        size = self.mesh.shape[axis]
        if length % size:
            fit = [n for n in range(1, length + 1) if length % n == 0]
            near = sorted(sorted(fit, key=lambda n: abs(n - size))[:2])
            raise UserError(f"config: mesh.{axis} is {size}; {name} is {length}, which {' or '.join(map(str, near))} would divide")

    @cached_property
    def loop(self) -> LoopSpec:
        """How long, and what is written when."""
        return configs.read(LoopSpec, self.sections.train, "train")

    @cached_property
    def mesh(self) -> Mesh:
        """The device mesh."""
        return sharding.make_mesh(dict(self.sections.mesh), self.devices)

    @property
    def platform(self) -> str:
        """Of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def compute(self) -> jnp.dtype:
        """The dtype that towers compute in."""
        return compute_dtype(self.precision.compute, self.platform)

    def batch_shapes(self, rows: int | None = None):
        """A batch as ShapeDtypeStructs, sharded over the mesh."""
        shape = dataclasses.replace(self.shape, rows=rows or self.shape.rows)
        # an empty batch of one row tells dtypes and trailing sizes without holding a whole batch
        one = single([], dataclasses.replace(shape, rows=1))

        def leaf(x: np.ndarray):
            struct = jax.ShapeDtypeStruct((shape.rows, *x.shape[1:]), x.dtype)
            return struct.update(sharding=jax.sharding.NamedSharding(self.mesh, sharding.batch_spec(struct)))

        return jax.tree.map(leaf, one)

    @cached_property
    def blueprint(self) -> Blueprint:
        """Shapes and shardings of all parameters, trainable and frozen. Raises UserError for idle patterns."""
        batch = self.batch_shapes(self.mesh.shape["replica"] * self.mesh.shape["fsdp"])

        def init(key):
            return self.objective.init(key, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch))

        def choose(paths):
            trainable = trees.matching(paths, self.sections.trainable, "trainable")
            return trainable, trees.matching(trainable, self.sections.ema, "ema")

        return Blueprint(init, self.mesh, choose, compute_dtype(self.precision.frozen, self.platform))

    def sources(self) -> dict[str, Path]:
        """Tower -> workdir for every frozen tower.

        Raises UserError where a frozen tower has no weights to start from.
        """
        sources = {tower: Path(path) for tower, path in dict(self.sections.init).items()}
        for tower in sorted(self.blueprint.frozen_shapes.keys() - sources.keys()):
            raise UserError(f"config: {tower} has frozen parameters but no weights; set init.{tower} to a run's workdir")
        for tower in sorted(sources.keys() - set(self.blueprint.shapes)):
            raise UserError(f"config: init.{tower}: no such tower{nearest(tower, self.blueprint.shapes)}")
        for tower, path in sources.items():
            if is_tower(path):
                TowerFolder(path).check(self.towers[tower], f"model.{tower}")
        return sources
