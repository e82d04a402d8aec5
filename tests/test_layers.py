"""The shape of the package: who may import whom, docstrings, and rooms of a size one can take in."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "g4v_jax"
LEVELS = (  # a file imports from its own room and from lower levels; rooms of one level do not meet
    {"errors", "types", "rng", "precision", "trees", "sharding", "config", "heap"},
    {"torus"},
    {"nn", "diffusion"},
    {"models", "data"},
    {"losses", "safety", "weights", "provenance"},
    {"train", "infer"},
    {"evals"},
    {"build"},
    {"plan"},
    {"bench"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The folder or top file of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever it does so; names after `import` are modules or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(path: Path) -> set[str]:
    """Rooms of this package that a file imports from."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("g4v_jax.")}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_room_has_a_level_and_every_level_is_there():
    assert {room(path) for path in FILES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", [path for path in FILES if room(path) != "__init__"], ids=named)
def test_imports_go_down(path):
    own = room(path)
    for other in rooms_of(path) - {own}:
        lowest = LEVEL[own] == LEVEL[other] == 0  # top files of the lowest level make one room
        assert LEVEL[other] < LEVEL[own] or lowest, f"{own} imports {other}"


def test_data_and_models_meet_only_in_types():
    seen = {name: set().union(*(rooms_of(path) for path in FILES if room(path) == name)) - {name} for name in LEVEL}
    assert seen["data"] == {"errors", "types"}
    assert "data" not in seen["models"] | seen["losses"] | seen["train"]
    assert seen["types"] == seen["errors"] == seen["rng"] == seen["precision"] == set()


def test_nothing_imports_configs_or_launch_or_tests():
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path)} & {"configs", "launch", "tests"}, named(path)


def test_configs_are_data():
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert {name.split(".")[0] for name in imports(path)} <= {"configs", "ml_collections"}, named(path)


def test_everything_public_says_what_it_is():
    silent = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            silent.append(named(path))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    silent.append(f"{named(path)}: {node.name}")
    assert not silent


def test_no_file_is_two_rooms():
    long = {named(path): lines for path in FILES if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
