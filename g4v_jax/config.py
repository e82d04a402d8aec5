"""Reading configs: the Python file, overrides from the command line, the copy in a workdir, and strict sections.

A config is data: `get_config() -> ml_collections.ConfigDict`. Its sections name fields of the dataclasses and modules
they configure, so a default lives in the field it belongs to, and a key that no field has is an error.
"""

import ast
import contextlib
import dataclasses
import json
import sys
import types
import typing
from pathlib import Path

import flax.linen as nn
from absl import flags
from ml_collections import ConfigDict, config_flags

from g4v_jax.errors import UserError, nearest

FLAX_FIELDS = {"parent", "name"}


def parse(command: str, arguments: list[str], define) -> tuple[flags.FlagValues, list[str]]:
    """Parse a command's flags: `define(values)` adds them. Returns the values and the positional arguments.

    Raises UserError for an unknown flag or config field, with the nearest known one, and for a config that fails.
    """
    values = flags.FlagValues()
    define(values)
    try:
        positional = values([command, *arguments])[1:]
        if "config" in values:
            values.config.keys()  # a file that does not load raises when something is asked of it
    except (KeyError, AttributeError) as error:
        text = _plain(error).strip("'")
        if isinstance(error, KeyError) or text.isidentifier():  # a field that keeps its default has no type to read by
            text = f"the config sets no field {text!r}; add it to the file"
        raise UserError(f"g4v {command}: {text}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"g4v {command}: {_plain(error)}") from error
    except (OSError, SyntaxError, ImportError) as error:
        raise UserError(f"g4v {command}: cannot read the config: {_plain(error)}") from error
    return values, positional


def define_config(values: flags.FlagValues, default: str | None, arguments: list[str]) -> None:
    """Add --config=FILE.py[:argument] and a flag for each field that `arguments` set, --config.path.to.field=value."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # a config may import its siblings: `from configs import sizes`
    about = "Path of a config file, FILE.py[:argument]."
    config_flags.DEFINE_config_file("config", default, about, values, sys_argv=["g4v", *arguments])


def _plain(error: Exception) -> str:
    """One line: of a traceback told inside a message the last, and of a message that is another's `repr` its text."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1]
    if text[:1] in ("'", '"'):
        with contextlib.suppress(SyntaxError, ValueError):
            text = str(ast.literal_eval(text))
    return " ".join(text.split())


def read(kind: type, section: ConfigDict | dict, path: str, **derived):
    """Build a dataclass or Flax module from a config section and fields that follow from other sections.

    Raises UserError for a key that is not a field (with the nearest one), a missing field, or a value of a wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(kind) if not (issubclass(kind, nn.Module) and f.name in FLAX_FIELDS)}
    open_fields = fields.keys() - derived.keys()
    values = {}
    for key, value in dict(section).items():
        if key not in fields:
            raise UserError(f"config: {path} has no field {key!r}{nearest(key, open_fields)}")
        if key in derived:
            raise UserError(f"config: {path}.{key} follows from other fields ({derived[key]!r}); do not set it")
        values[key] = _typed(value, typing.get_type_hints(kind)[key], f"{path}.{key}")
    for name in sorted(open_fields - values.keys()):
        if fields[name].default is dataclasses.MISSING and fields[name].default_factory is dataclasses.MISSING:
            raise UserError(f"config: {path}.{name} is not set")
    return kind(**values, **derived)


def _typed(value, hint, path: str):
    """Check a scalar or tuple against its annotation; lists become tuples, whole numbers may stand for floats."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
        if origin is dict and isinstance(value, (dict, ConfigDict)):
            return value.to_dict() if isinstance(value, ConfigDict) else value
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if origin in (int, str, bool) and type(value) is origin:
            return value
    if not any((typing.get_origin(option) or option) in (int, float, str, bool, tuple, dict) for option in options):
        return value
    raise UserError(f"config: {path} is {value!r}; expected {' or '.join(getattr(o, '__name__', str(o)) for o in options)}")


def save(config: ConfigDict, workdir: str | Path, write: bool = True) -> None:
    """Write the config into a workdir, or check it against the one already there; without `write` only the check.

    Raises UserError naming the fields that differ.
    """
    path = Path(workdir) / "config.json"
    text = json.dumps(config.to_dict(), indent=1, sort_keys=True, default=list)
    if path.exists():
        old, new = _flat(load(workdir)), _flat(json.loads(text))
        differing = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if differing:
            shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in differing[:5])
            raise UserError(f"{workdir} was made with another config ({shown}); choose another --workdir")
        return
    if not write:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(text)
    temporary.rename(path)


def load(workdir: str | Path) -> ConfigDict:
    """The config of a workdir. Raises UserError where there is none."""
    path = Path(workdir) / "config.json"
    try:
        return ConfigDict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{workdir}: no run here (config.json is missing); train one with g4v train --workdir={workdir}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def _flat(config: dict | ConfigDict, prefix: str = "") -> dict:
    flat = {}
    for key, value in dict(config).items():
        if isinstance(value, (dict, ConfigDict)):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, (tuple, list)) else value
    return flat
