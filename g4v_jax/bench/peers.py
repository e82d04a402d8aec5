"""The same work by the libraries that others use: transformers, peft and diffusers, on torch.

May hold what each of them runs; nothing else in this package imports torch but the comparison of weights. Sizes come from the
config by way of the published layouts (`weights`), so that both sides have the same parameters. Each uses what its library
documents as fast: scaled-dot-product attention, torch's fused AdamW, gradients clipped as ours are.
"""

import importlib.util
from collections.abc import Callable
from functools import partial

from g4v_jax import config as configs
from g4v_jax.bench.clock import timed
from g4v_jax.build import Build
from g4v_jax.errors import UserError
from g4v_jax.models.llm import ATTENTION_LORA
from g4v_jax.train.optim import Optimizer
from g4v_jax.weights import adapter, llm, wan

TOWER = {"transformers": "llm", "peft": "llm", "diffusers": "denoiser"}  # that a library has a peer of
WORK = {"step": tuple(TOWER), "decode": ("transformers",)}
LORA_MAPS = {ours: theirs for theirs, ours in adapter.MAPS.items() if ours in ATTENTION_LORA}


def check(library: str, work: str, build: Build) -> None:
    """Raises UserError where a library is missing, or has no peer of this config's work."""
    tower = TOWER[library]
    if work == "step" and build.alone != tower:
        objective = {"llm": "language", "denoiser": "denoising"}[tower]
        raise UserError(f"bench: {library} has a peer of the objective {objective!r}, not of {build.sections.objective!r}")
    for name in {library, "torch", "transformers" if tower == "llm" else "diffusers"}:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"bench: {name} is not installed: pip install '.[parity]'")
    if tower == "llm":
        module = build.llm
        if _family(module) is None or module.added_tokens:
            raise UserError(f"bench: {library} has no language model of this config's layout")
        if work == "step" and bool(module.lora) != (library == "peft"):
            raise UserError(f"bench: {library} {'trains LoRA: set model.llm.lora' if library == 'peft' else 'knows no LoRA: compare with peft'}")
        if library == "peft" and "mlp" in module.lora:
            raise UserError("bench: peft's step trains LoRA of q, k, v and o alone")
    if work == "step" and _optimizer(build).name != "adamw":
        raise UserError(f"bench: {library}'s step takes AdamW; set optimizer.name to adamw")


def side(about: dict, build: Build) -> tuple[dict[str, int], Callable[[int], list[float]]]:
    """As `worker._side`. Raises UserError as `check` does."""
    library, work = about["side"], about["work"]
    check(library, work, build)
    import torch

    torch.manual_seed(0)
    model = _denoiser(build) if TOWER[library] == "denoiser" else _language_model(build)
    if library == "peft":
        model = _with_lora(model, build)
    count = {"parameters": sum(one.numel() for one in model.parameters())}
    if work == "decode":
        return count, partial(timed, _generate(model.eval(), build, about))
    count["learned"] = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return count, partial(timed, _step(model.train(), build, _diffuse if TOWER[library] == "denoiser" else _tell))


def _family(module):
    """The published layout of a language model, None where it has none."""
    return next((one for one in llm.FAMILIES if one.fits(module) is None), None)


def _optimizer(build: Build) -> Optimizer:
    return configs.read(Optimizer, build.sections.optimizer, "optimizer")


def _language_model(build: Build):
    import transformers

    family = _family(build.llm)
    settings = family.config(build.llm)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config._attn_implementation = "sdpa"
    return getattr(transformers, family.architectures[0])(config)


def _with_lora(model, build: Build):
    import peft

    tower = build.llm
    names = [LORA_MAPS[name] for name in tower.lora]
    config = peft.LoraConfig(
        r=tower.lora_rank, lora_alpha=tower.lora_alpha, target_modules=names, lora_dropout=tower.lora_dropout, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def _denoiser(build: Build):
    import diffusers

    family = next(one for one in wan.FAMILIES if one.tower == "denoiser")
    reason = family.fits(build.denoiser)
    if reason:
        raise UserError(f"bench: diffusers has no denoiser of this config's layout: {reason}")
    settings = {name: value for name, value in family.config(build.denoiser).items() if not name.startswith("_")}
    return getattr(diffusers, family.architectures[0]).from_config(settings)


def _step(model, build: Build, loss: Callable) -> Callable[[], None]:
    """One step of training: loss, gradients, clipping, AdamW."""
    import torch

    spec = _optimizer(build)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=spec.learning_rate, betas=(spec.b1, spec.b2), eps=spec.eps, weight_decay=spec.weight_decay, fused=True
    )
    inputs = loss(model, build)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        inputs().backward()
        torch.nn.utils.clip_grad_norm_(learned, spec.clip_norm)
        optimizer.step()

    return once


def _tell(model, build: Build) -> Callable:
    """The next token of rows of chance; the library shifts the labels itself."""
    import torch

    shape = build.shape
    tokens = torch.randint(0, build.llm.vocab_size, (shape.rows, shape.tokens))
    return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _diffuse(model, build: Build) -> Callable:
    """Velocities of noised latents, as `losses/denoising.py` has them."""
    import torch

    spec, tower, rows = build.objective.spec, build.denoiser, build.shape.rows

    def loss():
        clip, noise = (torch.randn(rows, tower.latent_channels, *spec.latents) for _ in range(2))
        context = torch.randn(rows, spec.context, tower.context_dim)
        times = torch.sigmoid(torch.randn(rows))
        t = times[:, None, None, None, None]
        made = model((1 - t) * clip + t * noise, timestep=times * 1000, encoder_hidden_states=context).sample
        return torch.nn.functional.mse_loss(made, noise - clip)

    return loss


def _generate(model, build: Build, about: dict) -> Callable[[], None]:
    import torch

    prompts = torch.randint(0, build.llm.vocab_size, (about["batch"], about["prompt"]))
    asked = torch.ones_like(prompts)

    def once() -> None:
        with torch.no_grad():
            model.generate(
                prompts, attention_mask=asked, max_new_tokens=about["new"], min_new_tokens=about["new"], do_sample=False,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip

    return once
