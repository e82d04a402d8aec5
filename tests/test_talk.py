"""Ordinary talk: what is written to train on and to hold out, and perplexity beside the LLM's own."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from g4v_jax.data import records, sources, talk, tasks
from g4v_jax.data.text import Turn, dialogue
from g4v_jax.errors import UserError
from g4v_jax.evals import talk as evals
from g4v_jax.infer.assistant import Assistant, SampleSpec

QUESTION = "what do you like about number {}?"


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """A small collection of talks in the place of the real one -> the folder that it is brought into."""

    def turn(*texts):
        return [{"text": text, "sender": "x"} for text in texts]

    talks = {
        f"talk {i}": {"messages": [turn(QUESTION.format(i)), turn("many ", " things"), turn("yes"), turn("no"), turn("oh")]}
        for i in range(60)
    }
    talks["link"] = {"messages": [turn("see https://x.y"), turn("what is it that you see there?")]}
    data = json.dumps(talks).encode()
    file = tmp_path / "out/archives/dataset.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    wheel = sources.WheelFile("chats", "1", "chats/dataset.json", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(sources, "CHITCHAT", wheel)
    return tmp_path / "out"


def test_conversations_are_learned_and_held_out(collection, tmp_path):
    counts = talk.write(collection, train=10, held_out=4)
    rows = [json.loads(line) for line in (collection / "dialogues.jsonl").read_text().splitlines()]
    assert counts == {"train": 10, "validation": 4, "test": 4} and len(rows) == 18
    assert all([turn["text"] for turn in row["turns"]][1:] == ["many things", "yes", "no"] for row in rows)
    first = [row["turns"][0]["text"] for row in rows]
    assert len(set(first)) == 18 and not any("see" in text for text in first)
    with pytest.raises(UserError, match="is there already"):
        talk.write(collection)
    assert records.build(collection, tmp_path / "records")["records"] == {
        "test_dialogues": 4,
        "train_dialogues": 10,
        "validation_dialogues": 4,
    }
    record = next(iter(records.read(tmp_path / "records", "train", "dialogues")))
    setting = tasks.Setting(tiny.tokenizer(), dataclasses.replace(tiny.build().shape, tokens=160), "train", None)
    example = tasks.TASKS["dialogue"].build(record, np.random.default_rng(0), setting)
    assert not example["caption_weight"].any() and not example["refusal_weight"].any()
    kept = tiny.tokenizer().decode(example["targets"][example["keep_weight"] > 0])
    assert kept == "".join(turn["text"] for turn in record.dialogue)  # both sides of the talk


def by_hand(assistant, params: dict, turns: list[Turn]) -> tuple[float, int]:
    """Cross-entropy of the assistant's turns of one row, in float64 from its logits, and how many tokens it sums."""

    def logits(m, tokens):
        x = m.llm.embed(tokens, m.dtype)
        return m.llm.logits(m.llm.hidden(x, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)))

    row = dialogue(turns, assistant.tokenizer, assistant.shape)
    with jax.set_mesh(assistant.mesh):
        found = assistant.model.apply({"params": params}, row["tokens"][None], method=logits)
    log_p = np.asarray(jax.nn.log_softmax(np.asarray(found[0], np.float64)))
    picked = log_p[np.arange(len(row["targets"])), row["targets"]]
    return -float((picked * row["caption_weight"]).sum()), int(row["caption_weight"].sum())


def test_perplexity_beside_the_llm_with_lora_off(collection, tmp_path):
    talk.write(collection, held_out=4)
    records.build(collection, tmp_path / "records")
    build = tiny.build()
    shape = dataclasses.replace(build.shape, tokens=160)
    assistant = Assistant(build.model, tiny.params(), tiny.tokenizer(), shape, SampleSpec(rows=3), build.mesh)
    figures = evals.measure(assistant, tmp_path / "records", "test")
    held_out = records.read(tmp_path / "records", "test", "dialogues")
    talks = [[Turn(turn["role"], turn["text"]) for turn in record.dialogue] for record in held_out]
    for name, params in (("talk/perplexity", tiny.params()), ("talk/perplexity_base", evals.without_lora(tiny.params()))):
        sums, counts = zip(*(by_hand(assistant, params, turns) for turns in talks))
        assert figures[name].value == pytest.approx(np.exp(sum(sums) / sum(counts)), rel=1e-4) and figures[name].n == 4
    ratio = figures["talk/perplexity"].value / figures["talk/perplexity_base"].value
    assert figures["talk/perplexity_ratio"].value == pytest.approx(ratio) and abs(ratio - 1) > 0.01


def test_a_data_set_without_talk_gives_no_figures(tmp_path):
    (tmp_path / "source").mkdir()
    row = {"turns": [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "hello"}], "split": "test"}
    (tmp_path / "source/dialogues.jsonl").write_text(json.dumps(row) + "\n")
    records.build(tmp_path / "source", tmp_path / "records")
    assert evals.measure(None, tmp_path / "records", "test") == {}
    assert evals.measure(None, tmp_path / "records", "validation") == {}
