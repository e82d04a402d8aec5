"""The whole model on the built-in world, from raw clips to a report, on a laptop's CPU.

    bash launch/quickstart.sh

Two stages: `configs/quickstart.py:autoencoder` first, then `configs/quickstart.py` (the model, autoencoder frozen).
"""

from ml_collections import ConfigDict

from configs import sizes

AUTOENCODER = "runs/quickstart/autoencoder"


def get_config(stage: str = "model") -> ConfigDict:
    """`stage`: "autoencoder" or "model"."""
    config = ConfigDict()
    config.seed = 0
    config.source = "data/sprites"
    config.world = dict(clips=2400, hazards=500, dialogues=1200)
    config.tokenizer = dict(vocab_size=768)
    config.model = sizes.TINY
    config.data = dict(records="data/sprites-records", mixture=dict(
        caption=0.34, generate=0.34, dialogue=0.16, refuse_clip=0.05, refuse_request=0.06, blocked=0.05))
    config.rows = dict(rows=8, tokens=256, clips=3, targets=3, hazards=8, query_tokens=4,
                       clip_frames=5, target_frames=9, target_size=32)
    config.trainable = ("(?!autoencoder/).*",)
    config.ema = ("denoiser/.*", "conditioner/.*", "queries")
    config.init = dict(autoencoder=AUTOENCODER)
    config.optimizer = dict(name="muon", learning_rate=2e-3, muon_learning_rate=0.02, warmup_steps=50)
    config.step = dict(ema_decay=0.99)
    config.train = dict(steps=600, log_every=20, checkpoint_every=200)
    config.sample = dict(steps=20, guidance=2.0)
    if stage == "autoencoder":
        config.objective = "reconstruction"
        config.trainable, config.ema, config.init = (".*",), (), {}
        config.data.mixture = dict(pixels=1.0)
        config.rows.update(rows=2, tokens=8, clips=0, targets=8, hazards=0)
        config.train.steps = 500
    return config
