"""What is written for users is true: paths exist, and commands parse with their real flags and configs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from g4v_jax.cli import COMMANDS, find

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TOP = ("g4v_jax/", "configs/", "launch/", "tests/", ".ci/")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def code() -> str:
    """The README's code blocks."""
    return "\n".join(FENCE.findall(README.read_text()))


def lines_of(text: str, program: str) -> list[str]:
    """Lines that call a program, whole where a backslash breaks them."""
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith(f"{program} ")]


def commands() -> list[str]:
    """Calls of g4v in the README and in the docstrings of configs."""
    found = lines_of(code(), "g4v")
    for path in CONFIGS:
        found += lines_of(path.read_text(), "g4v")
    return sorted(set(found))


def test_paths_in_backticks_exist():
    text, paths = FENCE.sub("", README.read_text()), set()
    for words in re.findall(r"`([^`\n]+)`", text):
        for word in words.split():
            path = re.sub(r"(\.py):\S+$", r"\1", word)  # a config's argument
            if path.startswith(TOP):
                paths.add(path)
            elif re.fullmatch(r"\w+\.(py|sh)", path):  # named beside its folder
                assert list(ROOT.glob(f"*/**/{path}")), word
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_links_to_files_exist():
    for target in re.findall(r"\]\(([^)#\s]+)", README.read_text()):
        assert target.startswith(("http://", "https://", "mailto:")) or (ROOT / target).exists(), target


def test_scripts_in_code_exist():
    scripts = {line.split()[1] for line in lines_of(code(), "bash")}
    assert "launch/quickstart.sh" in scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_the_readme_shows_the_commands_that_matter():
    shown = {" ".join(words(line)[0].split()) for line in lines_of(code(), "g4v")}
    assert {"train", "eval", "generate", "caption", "check"} <= shown


def words(line: str) -> tuple[str, list[str]]:
    """(command, arguments) of a line that calls g4v."""
    return find(shlex.split(line, comments=True)[1:])


class Parsed(Exception):
    """Raised in the place of doing what was asked."""


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line, monkeypatch):
    """Each goes through its command's own parser, so flags, configs and fields of configs are all the real ones."""
    command, arguments = words(line)
    assert command in COMMANDS
    module, function, _ = COMMANDS[command]
    module = importlib.import_module(f"g4v_jax.commands.{module}")
    real = module.parse

    def parse(*args, **kwargs):
        real(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(module, "parse", parse)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        getattr(module, function)(arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_itself(name):
    module, function, what = COMMANDS[name]
    assert what and getattr(importlib.import_module(f"g4v_jax.commands.{module}"), function).__doc__
