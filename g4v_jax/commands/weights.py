"""`g4v import`, `g4v export` and `g4v forward`: published weights in, out, and run."""

from pathlib import Path

from absl import flags

from g4v_jax.commands.common import parse, write_json
from g4v_jax.errors import UserError, nearest

DTYPES = ("float32", "bfloat16", "float16")
GIGABYTE = 10**9


def _define_output(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", None, "Folder to write.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace what --out holds.", flag_values=values)
    flags.DEFINE_enum(
        "compare",
        "auto",
        ("auto", "no"),
        "auto: run the reference library on the same inputs, where it is installed and the tower is not too large.",
        flag_values=values,
    )


def import_(arguments: list[str]) -> None:
    """Convert published weights into a folder that configs can name under `init`."""

    def extra(values: flags.FlagValues) -> None:
        _define_output(values)
        flags.DEFINE_string("base", None, "For an adapter: the imported tower it belongs to.", flag_values=values)
        flags.DEFINE_string("tower", None, "Which tower, where the source holds several.", flag_values=values)
        flags.DEFINE_integer("layers", None, "Take the first so many layers alone.", flag_values=values)
        flags.DEFINE_integer("image_size", None, "Resize a vision tower's positions to pictures of so many pixels.",
                             flag_values=values)
        flags.DEFINE_multi_string("ignore", [], "Pattern of tensors to leave; may be repeated.", flag_values=values)

    values, sources = parse("import", arguments, extra=extra, config=False, json=True)
    if len(sources) != 1 or not values.out:
        raise UserError("import: give one source and --out: g4v import FOLDER --out=towers/NAME")
    from g4v_jax.weights import parity
    from g4v_jax.weights.convert import import_tower
    from g4v_jax.weights.leaves import FolderLeaves

    source = Path(sources[0])
    if (source / "adapter_config.json").exists():
        from g4v_jax.weights.adapter import import_adapter

        tower, report = import_adapter(source, values.base, values.out, values.overwrite)
        if values.compare == "auto":
            report.compared = parity.compare_adapter(source, FolderLeaves(tower), tower.family, tower.module)
            report.write(tower.path)
    elif values.base:
        raise UserError(f"import: --base is for adapters; {source} holds no adapter_config.json")
    else:
        tower, report = import_tower(
            source, values.out, values.ignore, values.overwrite, values.tower, values.layers, values.image_size
        )
        if values.compare == "auto" and values.layers is None:
            report.compared = parity.compare(source, tower)
            report.write(tower.path)
        elif values.layers is not None:
            report.compared = {"skipped": f"only the first {values.layers} layers were taken"}
            report.write(tower.path)
    print(report.summary())
    print(f"{tower.path}: a {tower.family.tower} of kind {tower.family.name}; every tensor is in report.txt")
    write_json(values.json, report.figures())


def forward(arguments: list[str]) -> None:
    """Run one imported tower on the arrays of an .npz."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("inputs", None, "Arrays to read, .npz.", flag_values=values)
        flags.DEFINE_string("out", None, "Arrays to write, .npz.", flag_values=values)
        flags.DEFINE_enum("dtype", "float32", DTYPES, "Of parameters and arithmetic.", flag_values=values)

    values, folders = parse("forward", arguments, extra=extra, config=False)
    if len(folders) != 1 or not values.inputs or not values.out:
        raise UserError("forward: give an imported tower, --inputs and --out: g4v forward DIR --inputs=in.npz --out=out.npz")
    import jax.numpy as jnp
    import numpy as np

    from g4v_jax.weights.folder import TowerFolder
    from g4v_jax.weights.forward import checked, run

    tower = TowerFolder(Path(folders[0]))
    arrays = checked(tower.family.tower, tower.module, _read_npz(values.inputs))
    dtype = jnp.dtype(values.dtype)
    outputs = run(tower.family.tower, tower.module, tower.load_whole(dtype), arrays, dtype)
    Path(values.out).parent.mkdir(parents=True, exist_ok=True)
    np.savez(values.out, **outputs)
    for name, value in outputs.items():
        print(f"{name} {value.dtype}{list(value.shape)} -> {values.out}")


def _read_npz(path: str) -> dict:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        raise UserError(f"{path}: not an .npz of plain arrays ({error})") from None


def export(arguments: list[str]) -> None:
    """Write a run's towers, or an imported one, as transformers, diffusers and peft load them."""

    def extra(values: flags.FlagValues) -> None:
        _define_output(values)
        flags.DEFINE_list("tower", [], "Towers of a run to write (default: all that have a layout).", flag_values=values)
        flags.DEFINE_string("family", None, "Layout to write (default: the one it came from, or the first that fits).",
                            flag_values=values)
        flags.DEFINE_enum("lora", "merge", ("merge", "adapter"), "merge: into the weights; adapter: a PEFT folder.",
                          flag_values=values)
        flags.DEFINE_enum("dtype", None, DTYPES, "Of the tensors written (default: as they are).", flag_values=values)
        flags.DEFINE_float("shard_gb", 5.0, "Largest file, in 10^9 bytes.", lower_bound=1e-6, flag_values=values)

    values, sources = parse("export", arguments, extra=extra, config=False, json=True)
    if len(sources) != 1 or not values.out:
        raise UserError("export: give a run or an imported tower, and --out: g4v export RUN --out=DIR")
    from g4v_jax.weights.folder import is_tower

    source = Path(sources[0])
    if is_tower(source):
        if values.tower:
            raise UserError(f"export: {source} is one tower; --tower is for runs")
        reports = {"": _export_folder(source, Path(values.out), values)}
    else:
        reports = _export_run(source, Path(values.out), values)
    for report in reports.values():
        print(report.summary())
    figures = {name: report.figures() for name, report in reports.items()}
    write_json(values.json, figures.get("", figures))


def _export_folder(source: Path, out: Path, values):
    """An imported tower back into its layout."""
    from g4v_jax.weights.convert import Published
    from g4v_jax.weights.families import by_name
    from g4v_jax.weights.folder import LEFT, TowerFolder
    from g4v_jax.weights.leaves import FolderLeaves
    from g4v_jax.weights.sources import side_files
    from g4v_jax.weights.tensors import SafetensorsFile

    tower = TowerFolder(source)
    tower.verify()
    family = by_name(values.family) if values.family else tower.family
    left = SafetensorsFile(source / LEFT) if (source / LEFT).exists() else None
    base = tower.about["config"].get("_name_or_path") or str(source)
    published = Published(tower.about["config"], left, side_files(source))
    return _export(FolderLeaves(tower), family, tower.module, out, str(source), published, base, values)


def _export_run(source: Path, out: Path, values) -> dict:
    """The towers of a run, each into a folder of its own below `out`."""
    import dataclasses

    from g4v_jax import config as configs
    from g4v_jax.build import Build
    from g4v_jax.train.saved import SavedRun
    from g4v_jax.weights.convert import Published
    from g4v_jax.weights.families import by_name, fitting
    from g4v_jax.weights.folder import TowerFolder, is_tower
    from g4v_jax.weights.leaves import RunLeaves
    from g4v_jax.weights.sources import side_files

    build, run = Build(configs.load(source)), SavedRun(source)
    towers = sorted({path.split("/")[0] for path in run.shapes})
    for name in values.tower:
        if name not in towers:
            raise UserError(f"export: {source} has no tower {name!r}{nearest(name, towers)}")
    reports, why_not = {}, {}
    for name in values.tower or towers:
        module = getattr(build.model, name, None)
        if not dataclasses.is_dataclass(module):
            continue  # single parameters beside the towers
        origin = Path(dict(build.sections.init).get(name, ""))
        imported = TowerFolder(origin) if is_tower(origin) else None
        try:
            if values.family:
                family = by_name(values.family)
            else:
                family = imported.family if imported else fitting(name, module)
        except UserError as error:
            if values.tower:
                raise
            why_not[name] = str(error)
            continue
        shapes = {path: leaf for path, leaf in run.shapes.items() if path.startswith(f"{name}/")}
        published = Published(imported.about["config"], None, side_files(origin)) if imported else Published()
        if name == "llm":
            published.files["tokenizer.json"] = (source / "tokenizer.json").read_bytes()
        base = str(origin) if imported else str(source)
        leaves = RunLeaves(run.read, shapes, name)
        reports[name] = _export(leaves, family, module, out / name, f"{source}: {name}", published, base, values)
    for name, why in why_not.items():
        print(f"{name} is left out: {why}")
    if not reports:
        raise UserError(f"export: no tower of {source} has a published layout")
    return reports


def _export(leaves, family, module, out: Path, source: str, published, base: str, values):
    """One tower, and its comparison with the reference."""
    import numpy as np

    from g4v_jax.weights import parity
    from g4v_jax.weights.adapter import export_adapter
    from g4v_jax.weights.convert import export_tower

    if values.lora == "adapter" and family.tower == "llm":
        report = export_adapter(leaves, family, module, out, source, base, values.overwrite)
        if values.compare == "auto":
            report.compared = parity.compare_adapter(out, leaves, family, module)
            report.write(out)
        return report
    dtype = None
    if values.dtype:
        import jax.numpy as jnp

        dtype = np.dtype(jnp.dtype(values.dtype))
    shard = int(values.shard_gb * GIGABYTE)
    report = export_tower(leaves, family, module, out, source, published, shard, dtype, values.overwrite)
    if values.compare == "auto":
        report.compared = parity.compare_export(out, leaves, family, module, dtype)
        report.write(out)
    return report
