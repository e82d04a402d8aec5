"""The same work by the libraries that others use: transformers, peft and diffusers, on torch.

May hold what each of them runs; nothing else in this package imports torch but the comparison of weights. Sizes come from the
config by way of the published layouts (`weights`), so that both sides have the same parameters. Each uses what its library
documents as fast: scaled-dot-product attention, torch's fused AdamW, gradients clipped as ours are.
"""

import importlib.util
import time
from collections.abc import Callable

from g4v_jax.build import Build
from g4v_jax.errors import UserError
from g4v_jax.weights import llm, wan

TOWER = {"transformers": "llm", "peft": "llm", "diffusers": "denoiser"}  # that a library has a peer of
WORK = {"step": tuple(TOWER), "decode": ("transformers",)}
LORA_MAPS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


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
        module, trained = build.llm, build.sections.trainable != (".*",)
        family = next((one for one in llm.FAMILIES if one.fits(module) is None), None)
        if family is None or module.added_tokens:
            raise UserError(f"bench: {library} has no language model of this config's layout")
        if work == "step" and bool(module.lora) != (library == "peft"):
            raise UserError(f"bench: {library} {'trains LoRA: set model.llm.lora' if library == 'peft' else 'knows no LoRA: compare with peft'}")
        if library == "peft" and ("mlp" in module.lora or not trained):
            raise UserError("bench: peft's step trains LoRA of q, k, v and o alone, and nothing beside it (trainable)")


def side(about: dict, build: Build) -> tuple[int, Callable[[int], list[float]]]:
    """As `worker._side`. Raises UserError as `check` does."""
    library, work = about["side"], about["work"]
    check(library, work, build)
    import torch

    torch.manual_seed(0)
    model = _denoiser(build) if TOWER[library] == "denoiser" else _language_model(build)
    if library == "peft":
        model = _with_lora(model, build)
    count = sum(parameter.numel() for parameter in model.parameters())
    if work == "decode":
        return count, _timed(_generate(model.eval(), build, about))
    return count, _timed(_step(model.train(), build, _diffuse if TOWER[library] == "denoiser" else _tell))


def _timed(once: Callable[[], None]) -> Callable[[int], list[float]]:
    def run(times: int) -> list[float]:
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - started)
        return seconds

    return run


def _language_model(build: Build):
    import transformers

    family = next(one for one in llm.FAMILIES if one.fits(build.llm) is None)
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

    spec = build.sections.optimizer
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=spec["learning_rate"], betas=(0.9, 0.95), weight_decay=spec.get("weight_decay", 0.0), fused=True
    )
    inputs = loss(model, build)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        inputs().backward()
        torch.nn.utils.clip_grad_norm_(learned, spec.get("clip_norm", 1.0))
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
