"""The command line: the table of commands, and how a user's mistake is told."""

import errno
import importlib
import logging
import os
import sys

from g4v_jax.errors import UserError, nearest
from g4v_jax.heap import on_huge_pages

COMMANDS = {  # name -> (module in g4v_jax.commands, function, what it does)
    "data make": ("data", "make", "write the built-in world: clips, captions and dialogues"),
    "data fetch": ("data", "fetch", "bring clips or models from packages: g4v data fetch emoji --out=DIR"),
    "data talk": ("data", "talk", "ordinary talk, people's conversations: g4v data talk --out=DIR"),
    "data said": ("data", "said", "what a run says of clips, to be kept in further training: --workdir=RUN --out=DIR"),
    "data build": ("data", "build", "turn a folder of clips and captions into records, and learn the tokenizer"),
    "data build safety": ("data", "safety", "harmful requests, harmless lookalikes and clips: --out=DIR --llm=DIR"),
    "data inspect": ("data", "inspect", "count records, measure packing, and draw a sheet of batches"),
    "train": ("train", "train", "train a config; goes on by itself from --workdir"),
    "average": ("train", "average", "weights between two runs: g4v average BEFORE AFTER --weight=0.8 --out=DIR"),
    "eval": ("evaluate", "evaluate", "captioning, generation and safety on a held-out split"),
    "caption": ("use", "caption", "describe videos: g4v caption CLIP.mp4 ..."),
    "generate": ("use", "generate", 'render a prompt: g4v generate "PROMPT" --out=CLIP.mp4'),
    "chat": ("use", "chat", "talk; /clip FILE shows a clip, and replies may render one"),
    "verify": ("provenance", "verify", "check a clip's signed manifest: g4v verify CLIP.mp4 --trust=chain.pem"),
    "watermark detect": ("provenance", "detect", "look for the invisible mark: g4v watermark detect CLIP.mp4 --key=FILE"),
    "watermark measure": ("provenance", "measure", "how well the mark holds: g4v watermark measure CLIP.mp4 ..."),
    "import": ("weights", "import_", "published weights in: g4v import FOLDER_OR_FILE --out=DIR"),
    "export": ("weights", "export", "a run's or an imported tower's weights out, as published layouts"),
    "forward": ("weights", "forward", "one imported tower on given arrays: g4v forward DIR --inputs=in.npz --out=out.npz"),
    "check": ("check", "check", "build a config on virtual devices: fields, shapes, memory"),
    "bench step": ("bench", "step", "time the train step here, or --against=transformers|peft|diffusers"),
    "bench decode": ("bench", "decode", "time decoding here, or --against=transformers"),
    "plan": ("plan", "plan", "compile a config for machines that are not here: g4v plan --topology=v5p:4x4x8"),
}


# What a user's files and disks can do to any command, so that it is told in one line.
USERS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 a user's mistake (one line on stderr), 130 interrupted."""
    if arguments is None:  # a process of its own
        on_huge_pages()
        arguments = sys.argv[1:]
    logging.basicConfig(format="%(message)s")
    logging.getLogger("g4v_jax.nn.kernels").setLevel(logging.INFO)
    try:
        sys.exit(run(list(arguments)))
    except UserError as error:
        print(f"g4v: error: {error}", file=sys.stderr)
        _leave(2)
    except OSError as error:
        if error.errno not in USERS:
            raise
        print(f"g4v: error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(status: int) -> None:
    """Exit. One of several processes does not wait for the others, which wait for it: their launcher ends them."""
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Find the command of `arguments` and run it -> its exit status."""
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        print("g4v COMMAND [--config=FILE.py[:argument]] [--config.path.to.field=value] [--workdir=DIR] [--json=FILE]\n")
        print("\n".join(f"  {name:18} {text}" for name, (_, _, text) in COMMANDS.items()))
        print("\nFlags of a command: g4v COMMAND --help")
        return 0
    name, rest = find(arguments)
    module, function, _ = COMMANDS[name]
    return getattr(importlib.import_module(f"g4v_jax.commands.{module}"), function)(rest) or 0


def find(arguments: list[str]) -> tuple[str, list[str]]:
    """(command, what follows it): a command has up to three words. Raises UserError for an unknown one."""
    names = [" ".join(arguments[:words]) for words in (3, 2, 1)]
    for name in names:
        if name in COMMANDS:
            return name, arguments[name.count(" ") + 1 :]
    name = names[1 if arguments[0] == "data" else 2]
    raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
