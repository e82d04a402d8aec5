"""The paper's model: ViT-L/14, the 64 + 64 query abstractor (65 tokens a clip), LLaMA-7B with LoRA, ZeroScope.

    g4v import mplug-owl-llama-7b-video --tower=vision      --out=towers/paper/vision
    g4v import mplug-owl-llama-7b-video --tower=summarizer  --out=towers/paper/summarizer
    g4v import llama-7b                                     --out=towers/paper/llm
    g4v import zeroscope_v2_576w/unet                       --out=towers/paper/denoiser
    g4v import zeroscope_v2_576w/vae                        --out=towers/paper/autoencoder
    g4v check --config=configs/paper_7b.py --devices=8

As in GPT4Video's release (github.com/gpt4video/GPT4Video, configs/config.py and models/gpt4video.py): every tower is
frozen, LoRA on q and v (rank 16, alpha 16, dropout 0.1), 8 frames a clip, Adam at 1e-4 without warmup or weight decay,
times 0.85 after each epoch. There the generator reads the caption through its own text encoder; here it reads the LLM's
states, so the conditioner and the queries learn too. The UNet's 320 channels divide over fsdp up to 64: on more devices
give the rest to replica and tensor. An epoch is taken for 1,000 steps: set `decay_steps` to yours.
"""

from ml_collections import ConfigDict

from configs import sizes

FROZEN = ("vision", "summarizer", "llm", "autoencoder", "denoiser")


def get_config() -> ConfigDict:
    """The 7B model on whatever mesh is there."""
    config = ConfigDict()
    config.source = "data/clips"
    config.tokenizer = dict(vocab_size=32_008)
    config.model = dict(
        vision=sizes.OWL_VIT,
        summarizer=sizes.OWL_ABSTRACTOR,
        llm=dict(sizes.LLAMA_7B, added_tokens=8, lora=("q", "v"), lora_rank=16, lora_alpha=16.0, lora_dropout=0.1,
                 remat="full"),
        conditioner=dict(dim=1024),
        autoencoder=dict(kind="kl"),
        denoiser=dict(sizes.ZEROSCOPE, remat="full"),
    )
    config.data = dict(records="data/clips-records", mixture=dict(caption=0.5, generate=0.3, dialogue=0.2))
    config.rows = dict(rows=64, tokens=2048, clips=8, targets=2, hazards=16, query_tokens=64,
                       clip_frames=8, target_frames=16, target_size=256)
    config.trainable = (r"llm/.*lora_[ab]", "llm/.*added.*", "conditioner/.*", "queries", "hazard/.*")
    config.init = {tower: f"towers/paper/{tower}" for tower in FROZEN}
    config.optimizer = dict(name="adamw", learning_rate=1e-4, warmup_steps=0, schedule="stepwise", decay=0.85,
                            decay_steps=1000, b1=0.9, b2=0.999)
    config.sample = dict(steps=50, guidance=9.0)
    config.step = dict(micro_batches=1)
    config.train = dict(steps=10_000, checkpoint_every=1000)
    config.mesh = dict(replica=1, fsdp=-1, context=1, tensor=1)
    return config
