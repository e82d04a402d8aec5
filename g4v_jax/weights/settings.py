"""Reading a diffusers config.json strictly: an unknown setting may change the computation. May hold this alone."""

from g4v_jax.errors import UserError


def given(config: dict, defaults: dict) -> dict:
    """config.json over the defaults, without diffusers' own notes (`_class_name`). UserError for an unknown key."""
    found = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in sorted(found.keys() - defaults.keys()):
        raise UserError(f"config.json: unknown setting {key!r} = {found[key]!r}")
    return defaults | found


def require(config: dict, **supported) -> None:
    """Raises UserError for the first setting that is not what we compute."""
    for key, value in supported.items():
        if config[key] != value:
            raise UserError(f"config.json: {key} {config[key]!r}; supported: {value!r}")
