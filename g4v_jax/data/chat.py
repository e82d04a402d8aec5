"""How turns are marked in text: our own marks, or those of a published model, read off its chat template.

May hold the marks as strings; `text.py` makes token ids of them. A template is a program from outside: it runs in
Jinja's sandbox, and only on messages of ours.
"""

import dataclasses
import json
from pathlib import Path

import jinja2
import jinja2.sandbox

from g4v_jax.errors import UserError

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
FILE = "chat.json"
MAX_TEMPLATE = 1 << 20  # characters
WORDS = ("Qzu1x", "Qza1x", "Qzu2x")  # messages whose places in the rendered text show the marks around them


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """What stands before the first turn, and around each turn of a user and of the assistant."""

    start: str = ""
    user: str = USER
    user_end: str = END
    assistant: str = ASSISTANT
    assistant_end: str = END

    def save(self, folder: Path) -> None:
        """Write chat.json, where these are not our own marks."""
        if self != ChatFormat():
            (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1))


def load(folder: Path) -> ChatFormat:
    """The format kept beside a tokenizer: chat.json, or else a published model's template, or else our own.

    Raises UserError for a file that does not hold one.
    """
    own, config, template = (folder / name for name in (FILE, "tokenizer_config.json", "chat_template.jinja"))
    try:
        if own.exists():
            return ChatFormat(**json.loads(own.read_text()))
        about = json.loads(config.read_text()) if config.exists() else {}
        text = template.read_text() if template.exists() else about.get("chat_template")
        if isinstance(text, list):  # several, by name
            text = next((one["template"] for one in text if one["name"] == "default"), None)
        names = ("bos_token", "eos_token")
        tokens = {name: about[name] for name in names if about.get(name)}
        tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: no chat format in {FILE} or tokenizer_config.json ({error})") from None
    if text is None:
        return ChatFormat()
    return from_template(text, str(folder), **tokens)


def from_template(template: str, where: str, bos_token: str = "", eos_token: str = "") -> ChatFormat:
    """The marks that a Jinja chat template, as transformers has them, puts around turns.

    Raises UserError for a template that fails, or that does more than to put marks around turns.
    """
    if len(template) > MAX_TEMPLATE:
        raise UserError(f"{where}: its chat template has {len(template)} characters")

    def fail(message):
        raise jinja2.TemplateError(message)

    def render(count: int, prompt: bool) -> str:
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": word} for role, word in zip(roles, WORDS[:count])]
        return compiled.render(
            messages=messages,
            add_generation_prompt=prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            raise_exception=fail,
            strftime_now=lambda form: "",
        )

    try:
        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        compiled = sandbox.from_string(template)
        one, two, three, open_ = render(1, False), render(2, False), render(3, False), render(1, True)
    except Exception as error:  # whatever a foreign program may raise
        raise UserError(f"{where}: its chat template fails ({type(error).__name__}: {error})") from None
    try:
        before, user_end = one.split(WORDS[0])
        assistant_end = two.split(WORDS[1])[1]
        between = three.split(WORDS[1])[1].split(WORDS[2])[0]
        user = between.removeprefix(assistant_end)
        found = ChatFormat(
            start=before.removesuffix(user),
            user=user,
            user_end=user_end,
            assistant=open_.split(WORDS[0])[1].removeprefix(user_end),
            assistant_end=assistant_end,
        )
    except (ValueError, IndexError):
        raise UserError(f"{where}: its chat template does not show every message once") from None
    again = found.start
    for number, word in enumerate(WORDS):
        marks = (found.assistant, found.assistant_end) if number % 2 else (found.user, found.user_end)
        again += word.join(marks)
    if again != three or not found.assistant_end:
        raise UserError(f"{where}: its chat template does more than to put marks around turns; write {FILE} instead")
    return found
