"""Measuring: our step alone, by the loop and by tower; turns with other libraries; what is refused."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import bench, quickstart
from g4v_jax.bench import peers, report, turns
from g4v_jax.bench.step import Step, chance_batch
from g4v_jax.build import Build
from g4v_jax.cli import main
from g4v_jax.errors import UserError

LLM = dict(dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, unroll=2)
DENOISER = dict(dim=48, mlp_dim=96, num_layers=2, num_heads=4, latent_channels=4, context_dim=24)


def small(stage: str) -> ConfigDict:
    """A stage of the config with towers that take no time."""
    config = bench.get_config(stage)
    config.tokenizer.vocab_size = 128
    config.mesh = dict(fsdp=1)
    if stage == "dit":
        config.model.denoiser = DENOISER
        config.losses.update(latents=(2, 4, 4), context=8)
        return config
    lora = {name: value for name, value in config.model.llm.items() if name.startswith("lora")}
    config.model.llm = LLM | lora
    config.rows.update(rows=2, tokens=16)
    return config


def built(config: ConfigDict) -> Build:
    return Build(config, tuple(jax.devices()[:1]))


def test_a_batch_of_chance_fills_every_slot_of_the_whole_model():
    build = built(quickstart.get_config("model"))
    batch = chance_batch(build)
    shape = build.shape
    assert np.all(batch.clip_mask) and np.all(batch.gen_mask) and np.all(batch.segments == 1)
    row = batch.clip_index[0]
    assert sorted(row[row >= 0]) == list(range(shape.clips * shape.summary_tokens))
    row = batch.query_index[0]
    assert sorted(row[row >= 0]) == list(range(shape.targets * shape.query_tokens))
    assert batch.tokens.max() < build.llm.vocab_size and batch.tokens.max() > build.llm.vocab_size // 2
    jax.tree.map(lambda x, shape: np.testing.assert_equal((x.shape, x.dtype), (shape.shape, shape.dtype)), batch, build.batch_shapes())
    config = quickstart.get_config("model")
    config.rows.tokens = 16
    with pytest.raises(UserError, match="rows.tokens is 16; its .* targets take"):
        chance_batch(built(config))


@pytest.mark.parametrize("stage, tower", [("llm", "llm"), ("lora", "llm"), ("dit", "denoiser")])
def test_a_step_alone_by_the_loop_and_by_tower(stage, tower):
    step = Step(built(small(stage)))
    before = jax.device_get(jax.tree.leaves(step.state.trainable)[0])
    figures = report.of_step(step, pairs=2, steps=3)
    assert len(figures["seconds"]) == 6 and min(figures["seconds"]) > 0
    assert len(figures["loop"]) == 2 and figures["loop_over_step"]["least"] > 0
    assert 0 <= figures["outside_step"] < 1
    assert figures["mfu"] is None  # nothing is published of this machine
    assert sum(figures["towers"].values()) == pytest.approx(1)
    assert {tower, "optimizer"} <= set(figures["towers"])
    assert int(step.state.step) == 2 + 2 * (3 + 4) + 2  # warm, two pairs of both, profiled: each is a real step
    if stage != "dit":
        assert not np.array_equal(before, jax.device_get(jax.tree.leaves(step.state.trainable)[0]))
    table = report.step_table(figures)
    assert "MFU unknown" in table and f"of busy time in {tower}" in table


@pytest.mark.parametrize("stage, library", [("llm", "transformers"), ("lora", "peft"), ("dit", "diffusers")])
def test_turns_with_the_same_step_of_a_library(stage, library):
    config = small(stage).to_dict()
    about = {"config": config, "work": "step"}
    told = []
    figures = turns.compare({"side": "ours", **about}, {"side": library, **about}, pairs=2, steps=2, say=told.append)
    assert len(told) == len(figures["ours"]["seconds"]) == len(figures["theirs"]["seconds"]) == 2
    pairs = zip(figures["ours"]["seconds"], figures["theirs"]["seconds"])
    assert figures["ratio"] == turns.spread([theirs / ours for ours, theirs in pairs])
    assert figures["memory"] == figures["ours"]["peak"] / figures["theirs"]["peak"] > 0
    assert library in report.comparison(figures, library)


def test_decoding_against_transformers_by_the_command(tmp_path, capsys):
    file = tmp_path / "small.py"
    file.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({small('llm').to_dict()!r})\n")
    out = tmp_path / "out.json"
    flags = [f"--config={file}", "--prompt=5", "--new=4", "--batch=2", "--pairs=1", "--steps=1", f"--json={out}"]
    with pytest.raises(SystemExit) as left:
        main(["bench", "decode", *flags, "--against=transformers"])
    assert left.value.code == 0
    figures = json.loads(out.read_text())
    assert figures["against"] == "transformers" and figures["batch"] == 2 and figures["ratio"]["median"] > 0
    with pytest.raises(SystemExit) as left:
        main(["bench", "decode", *flags])
    assert left.value.code == 0 and "tokens/s" in capsys.readouterr().out
    assert json.loads(out.read_text())["tokens_per_second"] > 0


def test_what_has_no_peer_is_told():
    cases = [
        ("llm", "diffusers", {}, "diffusers has a peer of the objective 'denoising', not of 'language'"),
        ("lora", "transformers", {}, "compare with peft"),
        ("llm", "peft", {}, "set model.llm.lora"),
        ("llm", "transformers", {"qk_norm": "full"}, "no language model of this config's layout"),
    ]
    for stage, library, changes, message in cases:
        config = small(stage)
        config.model.update(llm=dict(config.model.get("llm", {}), **changes)) if changes else None
        with pytest.raises(UserError, match=message):
            peers.check(library, "step", built(config))


def test_a_comparison_with_another_optimizer_is_refused():
    config = small("llm")
    config.optimizer.name = "muon"
    with pytest.raises(UserError, match="transformers's step takes AdamW; set optimizer.name"):
        peers.check("transformers", "step", built(config))


def test_sides_that_do_not_learn_the_same_are_told():
    config = small("llm")
    config.trainable = ("(?!llm/embedding/).*",)
    about = {"config": config.to_dict(), "work": "step"}
    with pytest.raises(UserError, match="the two sides differ: .* learned"):
        turns.compare({"side": "ours", **about}, {"side": "transformers", **about}, pairs=1, steps=1)


def test_a_side_that_cannot_start_says_why():
    with pytest.raises(UserError, match="model.llm has no field 'widht'"):
        config = small("llm").to_dict()
        config["model"]["llm"]["widht"] = 1
        turns.Side({"side": "ours", "work": "step", "config": config})


def test_an_unknown_library_is_told(capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", "step", "--config=configs/bench.py:llm", "--against=transformer"])
    assert left.value.code == 2 and "did you mean 'transformers'" in capsys.readouterr().err


def test_peaks_by_what_a_device_calls_itself():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    assert report.peak_flops(Device("TPU v5 lite")) == 197e12
    assert report.peak_flops(Device("TPU v5")) == 459e12
    assert report.peak_flops(Device("NVIDIA H100 80GB HBM3")) == 989e12
    assert report.peak_flops(Device("cpu")) is None
