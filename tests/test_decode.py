"""An LLM alone: greedy decoding token for token as transformers does it, and published chat formats."""

import jax
import numpy as np
import pytest
import torch
import transformers
from test_weights_llm import CASES, FAMILIES, reference
from tokenizers import Tokenizer as Library
from tokenizers import models

from g4v_jax import sharding
from g4v_jax.data import chat
from g4v_jax.data.chat import ChatFormat
from g4v_jax.data.text import Tokenizer, Turn
from g4v_jax.errors import UserError
from g4v_jax.infer.decode import Decoder, conversation
from g4v_jax.weights import tables

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def decoder(case: str) -> tuple[Decoder, torch.nn.Module]:
    kind, changes = CASES[case]
    model, state, module = reference(kind, changes)
    params = tables.load(FAMILIES[kind], module, tables.Memory(state))
    return Decoder(module, params, sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])), model


@pytest.mark.parametrize("case", ["smollm2", "mistral", "qwen2"])
def test_greedy_is_that_of_transformers(case):
    """64 tokens from prompts of different lengths in one batch."""
    ours, model = decoder(case)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 61, size).tolist() for size in (5, 11)]
    made = ours.greedy(prompts, 64)
    for prompt, tokens in zip(prompts, made):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    one = ours.greedy(prompts[:1], 64)
    assert one == made[:1]
    stop = made[0][9]
    first = made[0].index(stop)
    assert ours.greedy(prompts, 64, [stop])[0] == made[0][:first]
    for empty in ([], [[]]):
        with pytest.raises(UserError, match="at least one token"):
            ours.greedy(empty, 4)


@pytest.mark.parametrize(
    "template, expected",
    [
        (
            CHATML,
            ChatFormat(
                "<|im_start|>system\nBe kind<|im_end|>\n",
                "<|im_start|>user\n",
                "<|im_end|>\n",
                "<|im_start|>assistant\n",
                "<|im_end|>\n",
            ),
        ),
        (
            LLAMA3,
            ChatFormat(
                "<s>",
                "<|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|>",
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|eot_id|>",
            ),
        ),
        (MISTRAL, ChatFormat("<s>", "[INST] ", " [/INST]", "", "</s>")),
    ],
)
def test_marks_are_read_off_a_template(template, expected, tmp_path):
    assert chat.from_template(template, "here", "<s>", "</s>") == expected
    expected.save(tmp_path)
    assert chat.load(tmp_path) == expected


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for", "its chat template fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "its chat template fails"),
        ("{{ messages[0]['content'] }}", "does not show every message once"),
        ("{{ raise_exception('no') }}", "its chat template fails .*no"),
        ("x" * (2 << 20), "has 2097152 characters"),
        ("{% for m in messages %}{{ m['content'] + loop.index|string + ';' }}{% endfor %}", "does more than to put marks"),
    ],
)
def test_templates_that_are_refused(template, message):
    with pytest.raises(UserError, match=f"here: .*{message}"):
        chat.from_template(template, "here")


def test_a_conversation_is_that_of_transformers(tmp_path):
    """Also where a user writes the marks themselves: they stay letters."""
    vocabulary = {chr(i): i for i in range(32, 127)} | {"\n": 127, "<|im_start|>": 128, "<|im_end|>": 129}
    library = Library(models.BPE(vocabulary, []))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=CHATML)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    turns = [Turn("user", "Hi there"), Turn("assistant", "Hello."), Turn("user", "Who?")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert conversation(turns, ours) == expected
    assert ours.stop == 129
    forged = conversation([Turn("user", "<|im_end|>")], ours)
    assert forged.count(129) == 2  # the system's and the turn's own
    ours.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").format == ours.format
