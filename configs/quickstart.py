"""The whole model on the built-in world, from raw clips to a report, in minutes on a laptop's CPU.

    bash launch/quickstart.sh

Two stages: `configs/quickstart.py:autoencoder` first, then `configs/quickstart.py` (everything else, the autoencoder
frozen). `:model,short` and `:autoencoder,short` are the same path in a few steps.
"""

from ml_collections import ConfigDict

from configs import sizes


def get_config(argument: str = "model") -> ConfigDict:
    """`argument`: the stage, "autoencoder" or "model", then ",short" for a few steps on a few clips."""
    stage, _, size = argument.partition(",")
    if stage not in ("autoencoder", "model") or size not in ("", "short"):
        raise ValueError(f"argument {argument!r}; known: autoencoder, model, each also with ,short")
    run, data = ("runs/short", "data/short") if size else ("runs/quickstart", "data/sprites")
    config = ConfigDict()
    config.seed = 0
    config.mesh = dict(replica=1, fsdp=-1, context=1, tensor=1)
    config.source = data
    config.world = dict(clips=3000, hazards=500, dialogues=1200)
    config.tokenizer = dict(vocab_size=768)
    config.model = sizes.TINY
    config.data = dict(records=f"{data}-records", mixture=dict(
        caption=0.31, generate=0.42, dialogue=0.13, refuse_clip=0.05, refuse_request=0.05, blocked=0.04))
    config.rows = dict(rows=4, tokens=256, clips=4, targets=4, hazards=9, query_tokens=4,
                       clip_frames=4, target_frames=9, target_size=32)
    config.losses = dict(caption=1.0, generation=1.0, refusal=1.0, hazard=1.0, blocked=1.0, preference=1.0, time_shift=3.0)
    config.trainable = ("(?!autoencoder/).*",)
    config.ema = ("denoiser/.*", "conditioner/.*", "queries")
    config.init = dict(autoencoder=f"{run}/autoencoder")
    config.optimizer = dict(name="muon", learning_rate=2e-3, muon_learning_rate=0.008, muon_steps=4, warmup_steps=50,
                            multipliers=dict(denoiser=2.5))
    config.step = dict(ema_decay=0.99)
    config.train = dict(steps=1200, log_every=50, checkpoint_every=300)
    config.sample = dict(steps=16, guidance=3.0)
    config.evaluate = dict(captions=200, meteor=False, questions=0, generations=200, baselines=32, hazards=64, safety=60)
    if stage == "autoencoder":
        config.objective = "reconstruction"
        config.optimizer.muon_learning_rate, config.optimizer.multipliers = 0.02, {}
        config.losses = dict(saturated_weight=5.0)
        config.trainable, config.ema, config.init = (".*",), (), {}
        config.data.mixture = dict(pixels=1.0)
        config.rows.update(rows=4, tokens=16, clips=0, targets=16, hazards=0)
        config.train.steps = 400
    if size:
        config.world = dict(clips=96, hazards=32, dialogues=96)
        config.train.update(steps=12, log_every=4, checkpoint_every=8, eval_every=6 if stage == "model" else 0)
        config.evaluate = dict(captions=16, meteor=False, questions=4, generations=16, baselines=8, hazards=8, safety=8, live=4)
    return config
