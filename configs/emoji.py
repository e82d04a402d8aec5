"""Real clips: the animated emoji packs, split by base emoji.

    g4v data fetch emoji --out=data/emoji
    g4v data build --config=configs/emoji.py
    g4v train --config=configs/emoji.py:autoencoder --workdir=runs/emoji/autoencoder
    g4v train --config=configs/emoji.py --workdir=runs/emoji
    g4v eval --workdir=runs/emoji
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(stage: str = "model") -> ConfigDict:
    """`stage`: "autoencoder" or "model"."""
    config = quickstart.get_config(stage)
    config.source = "data/emoji"
    config.data.records = "data/emoji-records"
    config.world = {}
    config.tokenizer.vocab_size = 1536
    config.train.update(steps=800 if stage == "autoencoder" else 2000, log_every=50, checkpoint_every=500)
    config.sample.update(steps=20)
    if stage == "autoencoder":
        config.losses = {}
    else:
        config.model.caption_window = 16  # names of emoji are longer than the built-in captions
        config.data.mixture = dict(caption=0.5, generate=0.5)
        config.data.shift = 2  # few clips: none is seen twice
        config.init = dict(autoencoder="runs/emoji/autoencoder")
        config.evaluate = dict(captions=200, meteor=False, generations=64)
    return config
