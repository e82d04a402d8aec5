"""The quickstart's world with more clips and more steps, for its best figures.

    g4v data make  --config=configs/sprites.py
    g4v data build --config=configs/sprites.py
    g4v train --config=configs/sprites.py:autoencoder --workdir=runs/sprites/autoencoder
    g4v train --config=configs/sprites.py --workdir=runs/sprites
    g4v eval --workdir=runs/sprites
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(stage: str = "model") -> ConfigDict:
    """`stage`: "autoencoder" or "model"."""
    config = quickstart.get_config(stage)
    config.source = "data/sprites-long"
    config.data.records = "data/sprites-long-records"
    config.world = dict(clips=6000, hazards=1200, dialogues=3000)
    config.train.update(steps=1200 if stage == "autoencoder" else 8000, log_every=100, checkpoint_every=1000)
    config.sample.update(steps=20)
    if stage == "model":
        config.data.mixture = dict(caption=0.25, ask=0.12, generate=0.36, dialogue=0.13, refuse_clip=0.05,
                                   refuse_request=0.05, blocked=0.04)
        config.evaluate.update(questions=40, baselines=64)
        config.init = dict(autoencoder="runs/sprites/autoencoder")
        config.step = dict(ema_decay=0.999)
    return config
