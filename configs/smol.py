"""A real language model that learns to watch: SmolLM2-135M with LoRA, a DINOv2 tower, and our denoiser, on real clips.

    g4v data fetch smollm2 --out=data/smollm2
    g4v import data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out=towers/smollm2
    g4v data fetch dinov2 --out=data/dinov2
    g4v import data/dinov2/vit_s_focus.onnx --out=towers/dinov2 --layers=8 --image_size=84 \
        --ignore='decoder\\..*' --ignore='encoder\\.layer\\.(8|9|10|11)\\..*'
    g4v data fetch emoji --packs=4 --out=data/emoji
    g4v data talk --out=data/talk
    g4v data build --config=configs/smol.py
    g4v train --config=configs/smol.py:autoencoder --workdir=runs/smol/autoencoder
    g4v train --config=configs/smol.py:align --workdir=runs/smol/align
    g4v train --config=configs/smol.py --workdir=runs/smol
    g4v eval --workdir=runs/smol

    g4v data said --workdir=runs/smol --out=data/said
    g4v data build safety --llm=towers/smollm2 --out=data/safety
    g4v data build --config=configs/smol.py:safety
    g4v train --config=configs/smol.py:safety --workdir=runs/smol-safety
    g4v average runs/smol runs/smol-safety --weight=0.9 --whole=hazard --out=runs/smol-safe
    g4v eval --workdir=runs/smol-safe
    g4v eval --workdir=runs/smol --records=data/smol-safety-records --out=runs/smol/before-safety

Both imported towers stay frozen; LoRA, the summarizer, the conditioner and the denoiser learn. Beside clips it learns
to say of people's conversations what it said before (`losses.keep`), so that it still talks. `:scratch` is the same run
with the LLM from nothing; `:safety` goes on from the run and learns to decline while it rehearses what that run said of
clips, and nine tenths of the way there lies a run that declines nearly as much and forgot less. `:render` is a warm
start of the generator that the run does not use yet: to try it, set init.conditioner, init.denoiser and init.queries to
its workdir.
"""

from ml_collections import ConfigDict

from configs import emoji, sizes

STAGES = ("autoencoder", "align", "render", "model", "scratch", "safety")


def get_config(stage: str = "model") -> ConfigDict:
    """`stage`: "autoencoder", "align" (the summarizer alone), "render" (the generator alone), "model", "scratch" (an LLM
    that starts from nothing) or "safety" (goes on from "model").
    """
    if stage not in STAGES:
        raise ValueError(f"argument {stage!r}; known: {', '.join(STAGES)}")
    config = emoji.get_config("autoencoder" if stage == "autoencoder" else "model")
    config.source = "data/emoji,data/talk"
    config.data.records = "data/smol-records"
    config.tokenizer = dict(vocab_size=49_160, path="towers/smollm2")  # its words, and our marks
    config.model.vision = dict(sizes.DINOV2_SMALL, image_size=84, num_layers=8, unroll=8)
    config.model.summarizer = dict(dim=192, mlp_dim=576, num_layers=2, num_heads=4, num_queries=8,
                                   output_scale=0.1, unroll=2)
    lora = dict(lora=("q", "v"), lora_rank=16, lora_alpha=32.0)
    config.model.llm = dict(sizes.SMOLLM2_135M, added_tokens=8, unroll=30) | ({} if stage == "scratch" else lora)
    if stage == "autoencoder":
        return config
    config.data.mixture = dict(caption=0.55, generate=0.25, dialogue=0.2)
    config.data.shift = 4
    config.losses.update(keep=4.0, noises=8)  # the LLM's pass is what costs, not the denoiser's
    config.rows.update(rows=2, tokens=384, clips=4, targets=2, hazards=8)
    config.trainable = ("(?!autoencoder/|vision/|llm/).*", "llm/.*lora_[ab]", "llm/.*added.*")
    config.init = dict(llm="towers/smollm2", vision="towers/dinov2", summarizer="runs/smol/align",
                       autoencoder="runs/smol/autoencoder")
    config.optimizer.multipliers = dict(denoiser=2.5, llm=0.1)  # 2e-4 for LoRA: more, and it talks worse
    if stage == "scratch":
        config.trainable = ("(?!autoencoder/|vision/).*",)
        del config.init["llm"], config.init["summarizer"]
        config.optimizer.adamw_towers = ("llm",)
        config.losses.keep, config.optimizer.multipliers.llm = 0.0, 0.5
    config.sample.update(rows=32)
    config.evaluate = dict(captions=200, phrasings=True, questions=40, generations=32, baselines=64, hazards=64, per_kind=60)
    config.optimizer.warmup_steps = 20
    config.train.update(steps=300, log_every=10, checkpoint_every=150)
    if stage == "align":
        config.objective, config.losses, config.ema = "alignment", {}, ()
        config.data.mixture = dict(caption=1.0)
        config.rows.update(rows=4, tokens=384, clips=8, targets=1, hazards=8)
        config.trainable = ("summarizer/.*", "queries", "llm/.*added.*")
        config.init = dict(llm="towers/smollm2", vision="towers/dinov2")
        config.optimizer.update(learning_rate=1e-3, warmup_steps=20)
        config.optimizer.multipliers = {}
        config.train.update(steps=500, log_every=25, checkpoint_every=500)
    if stage == "render":
        config.objective, config.losses = "rendering", dict(time_shift=3.0, noises=4)
        config.data.mixture = dict(generate=1.0)
        config.rows.update(rows=4, tokens=384, clips=1, targets=6, hazards=8)
        config.trainable = ("denoiser/.*", "conditioner/.*", "queries", "llm/.*added.*")
        config.init = dict(llm="towers/smollm2", autoencoder="runs/smol/autoencoder")
        config.optimizer.update(warmup_steps=50, multipliers=dict(denoiser=2.5))
        config.train.update(steps=2000, log_every=50, checkpoint_every=1000)
    if stage == "safety":
        config.source = "data/emoji,data/talk,data/said,data/safety"
        config.data.records = "data/smol-safety-records"
        # by kind: most dialogues are ordinary talk, and few steps of it teach no refusal. Of clips it rehearses what it
        # said of them before: with the data's captions it would go on to learn them, and say other things of new clips
        config.data.mixture = {
            "prefer/advbench": 0.1, "prefer/advbench-reworded": 0.1, "prefer/harmful-about-clip": 0.04,
            "prefer/built-in": 0.08, "prefer/built-in-reworded": 0.08, "prefer/harmless-about-hazard": 0.04,
            "prefer/lookalike": 0.12, "prefer/lookalike-reworded": 0.12, "prefer/harmless-about-clip": 0.06,
            "prefer/conversation": 0.07, "dialogue/said": 0.3, "generate": 0.06, "refuse_clip": 0.02,
            "refuse_request": 0.03, "blocked": 0.03,
        }  # fmt: skip
        config.rows.preferences = 8
        towers = ("vision", "summarizer", "llm", "conditioner", "autoencoder", "denoiser", "queries", "hazard")
        config.init = {tower: "runs/smol" for tower in towers}
        config.losses.update(refusal=1.0, hazard=1.0, blocked=1.0, preference=1.0)
        # what the model can already do is only to be kept, so all but the hazard head learn slowly
        config.optimizer.update(learning_rate=1e-3, muon_learning_rate=8e-4, warmup_steps=10)
        config.optimizer.multipliers = dict(summarizer=0.2, llm=0.5, hazard=4.0)
        config.train.update(steps=800, checkpoint_every=400)
        config.evaluate.update(safety=30, attacks=40, attacked=("advbench", "harmbench"))
    return config
