"""The layers of CONTRIBUTING.md: each module has its place, and imports only from below it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "speechrnt"
MODULES = {path.stem: path for path in PACKAGE.glob("*.py*") if path.suffix in (".py", ".pyx")}
MODULES = {name: path for name, path in MODULES.items() if not name.startswith("__")}


def layers():
    """Return the modules of each line of the table, the highest first."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| modules |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [re.findall(r"`(\w+)`", cell) for cell in cells]


def place_of(module):
    """Return the line of a module; of those with an underscore that it does not name, their one."""
    lines = layers()
    for place, names in enumerate(lines):
        if module in names:
            return place
    assert module.startswith("_"), f"{module} has no layer"
    return next(place for place, names in enumerate(lines) if "_mel" in names)


def imported_by(path):
    """Return the modules of the package that one imports when it is itself imported."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".pyx":
        found = re.findall(r"^\s*from \.(\w+) c?import", text, re.MULTILINE)
        for names in re.findall(r"^\s*from \. c?import (.+)$", text, re.MULTILINE):
            found += re.findall(r"\w+", re.sub(r" as \w+", "", names))
        return set(found)
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found += [node.module] if node.module else [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speechrnt"):
            found += [node.module.partition(".")[2] or each.name for each in node.names]
    return set(found)


def test_no_module_has_two_places_and_all_exist():
    names = [name for line in layers() for name in line]
    assert len(names) == len(set(names))
    assert set(names) <= set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_below(module):
    place = place_of(module)
    for name in imported_by(MODULES[module]) & set(MODULES):
        if not (name.startswith("_") and module.startswith("_")):
            assert place_of(name) > place, f"{module} imports {name}"
