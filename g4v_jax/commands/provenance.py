"""`g4v verify`, `g4v watermark detect` and `g4v watermark measure`: where a clip comes from."""

from pathlib import Path

from absl import flags

from g4v_jax.commands.common import parse, write_json
from g4v_jax.errors import UserError

NOT_OURS = 3  # exit status where a clip does not carry what was looked for


def verify(arguments: list[str]) -> int:
    """Check the signed manifest of each clip against the certificates of --trust."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("trust", None, "chain.pem of who is trusted.", flag_values=values)

    values, paths = parse("verify", arguments, extra=extra, config=False, json=True)
    if not paths:
        raise UserError("verify: name at least one clip: g4v verify CLIP.mp4 --trust=chain.pem")
    from g4v_jax.provenance import credentials
    from g4v_jax.provenance.sidecar import plain

    trust = credentials.read_certificates(values.trust) if values.trust else None
    verdicts = {path: credentials.verify(Path(path), trust) for path in paths}
    for path, verdict in verdicts.items():
        print(f"{path}: {verdict.state}: {verdict.reason}")
        for name, value in (verdict.claim or {}).items():
            print(f"  {plain(name):14} {plain(value)}")  # anyone can sign: it is a stranger's text
    write_json(values.json, {path: verdict._asdict() for path, verdict in verdicts.items()})
    return 0 if all(verdict.state == "valid" for verdict in verdicts.values()) else NOT_OURS


def detect(arguments: list[str]) -> int:
    """Look in each clip for the invisible mark of --key, also after it was cut, scaled or encoded again."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("key", None, "watermark.key that clips were marked with.", flag_values=values)

    values, paths = parse("watermark detect", arguments, extra=extra, config=False, json=True)
    if not paths or not values.key:
        raise UserError("watermark detect: say where and for which key: g4v watermark detect CLIP.mp4 --key=watermark.key")
    from g4v_jax.provenance.delivery import look, read_key

    key = read_key(values.key)
    found = {path: look(Path(path), key) for path in paths}
    for path, one in found.items():
        what = f"marked: {one.payload:08x}" if one.found else "no mark of this key"
        print(f"{path}: {what} (score {one.score:.1f})")
    write_json(values.json, {path: one._asdict() for path, one in found.items()})
    return 0 if all(one.found for one in found.values()) else NOT_OURS


def measure(arguments: list[str]) -> int:
    """Mark the given clips with a new key, edit them in every way, and count what is still read; unmarked ones too."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("trials", 1000, "Looks for other keys' marks in unmarked clips.", lower_bound=0, flag_values=values)
        flags.DEFINE_integer("edited", None, "Clips to mark and edit (default: all).", lower_bound=1, flag_values=values)

    values, paths = parse("watermark measure", arguments, extra=extra, config=False, json=True)
    from g4v_jax.evals import marks
    from g4v_jax.evals.report import as_rows, table

    figures = marks.measure(paths, values.trials, values.edited)
    print(table(figures))
    write_json(values.json, as_rows(figures))
    for name in (missed := marks.missed(figures)):
        print(f"not what is promised: {name}")
    return NOT_OURS if missed else 0
