"""Imports only go down. The floors stand in CONTRIBUTING.md; a new module takes its place in `FLOORS`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up. Modules of one floor may import each other; `backbones` stands for all its files.
FLOORS = (
    {"rmt_kernels", "_C", "errors"},
    {"config", "layouts", "memory", "scoring"},
    {"backbones"},
    {
        "checkpoint",
        "cut_rules",
        "detokenizer",
        "graph_plan",
        "memory_plan",
        "records",
        "sources",
        "text_input",
        "tokens",
    },
    {"engine", "executors", "graph_executor", "graph_stream", "recording", "sampler", "sampling"},
    {
        "asking",
        "document_lists",
        "documents",
        "hf",
        "inputs",
        "results",
        "run",
        "slot_count",
        "slots",
        "stream",
    },
    {"document_run", "evaluation"},
    {
        "__init__",
        "__main__",
        "bench",
        "cli",
        "commands",
        "doctor",
        "eval_commands",
        "eval_options",
        "many_command",
        "progress",
        "run_options",
    },
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
KNOWS_NOBODY = {"rmt_kernels", "_C", "errors"}
# Upward, inside a function or for a type checker alone: the methods of Engine that open what stands on it.
LAZY = {("engine", name) for name in ("documents", "hf", "run", "slots", "stream")}


def imports(node: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Every dotted name that `node` imports, and whether importing its module leaves it alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - child.level]) if child.level else ""
            source = ".".join(part for part in (base, child.module) if part)
            yield from ((f"{source}.{alias.name}", lazy) for alias in child.names)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            yield from imports(child, package, lazy or inside or for_types)


def ours(dotted: str) -> str | None:
    """The name in `FLOORS` that a dotted name belongs to: rmt_engine.backbones.gpt2 -> backbones; None for others'."""
    first, *rest = dotted.split(".")
    if first == "rmt_engine":
        return (
            rest[0] if rest and (rest[0] in FLOOR or (ROOT / "rmt_engine" / f"{rest[0]}.py").exists()) else "__init__"
        )
    return first if first == "rmt_kernels" else None


def sources() -> Iterator[tuple[str, str, str]]:
    """(name in `FLOORS`, package, source) of every Python file of both packages."""
    for top in (ROOT / "rmt_engine", ROOT / "kernels" / "rmt_kernels"):
        for path in sorted(top.rglob("*.py")):
            parts = (top.name, *path.relative_to(top).with_suffix("").parts)
            name = parts[1] if top.name == "rmt_engine" else "rmt_kernels"
            yield name, ".".join(parts[:-1]), path.read_text(encoding="utf-8")


def upward(name: str, package: str, source: str) -> Iterator[tuple[str, str, bool]]:
    """(importer, imported, lazy) of every import that does not go down or along."""
    for dotted, lazy in imports(ast.parse(source), package):
        target = ours(dotted)
        if target in (None, name):
            continue
        if name in KNOWS_NOBODY or FLOOR.get(target, 0) > FLOOR.get(name, 0):  # one without a floor fails elsewhere
            yield name, target, lazy


def test_every_module_has_a_floor() -> None:
    names = {name for name, _, _ in sources()}
    assert names - set(FLOOR) == set(), "give them a place in FLOORS and in CONTRIBUTING.md"


def test_the_map_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = [path for top in ("rmt_engine", "kernels/rmt_kernels") for path in (ROOT / top).iterdir()]
    names = {f"{path.name}/" for path in modules if (path / "__init__.py").exists()}
    names |= {path.name for path in modules if path.suffix == ".py" and not path.stem.startswith("__")}
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_the_floors_are_told() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = {int(floor): set(re.findall(r"`(\w+)`", row)) for floor, row in re.findall(r"^\| (\d) \|(.*)$", text, re.M)}
    assert [names - told.get(floor, set()) for floor, names in enumerate(FLOORS)] == [set()] * len(FLOORS)


def test_imports_only_go_down() -> None:
    found = [edge for file in sources() for edge in upward(*file)]
    assert [edge for edge in found if edge[:2] not in LAZY or not edge[2]] == []
    assert {edge[:2] for edge in found} == LAZY, "LAZY names an import that is gone"


@pytest.mark.parametrize(
    ("name", "source", "edge"),
    [
        ("config", "import rmt_engine.engine", ("config", "engine", False)),
        ("config", "from rmt_engine import cli", ("config", "cli", False)),
        ("tokens", "from .stream import Stream", ("tokens", "stream", False)),
        ("tokens", "def f():\n    import rmt_engine.stream", ("tokens", "stream", True)),
        ("engine", "if TYPE_CHECKING:\n    from .stream import Stream", ("engine", "stream", True)),
        ("errors", "from rmt_engine import config", ("errors", "config", False)),
        ("engine", "from rmt_engine import Engine", ("engine", "__init__", False)),
    ],
)
def test_an_upward_import_is_seen(name: str, source: str, edge: tuple[str, str, bool]) -> None:
    assert list(upward(name, "rmt_engine", source)) == [edge]


def test_a_kernel_knows_no_engine() -> None:
    source = "from rmt_engine.errors import BackendError"
    assert list(upward("rmt_kernels", "rmt_kernels.memory", source)) == [("rmt_kernels", "errors", False)]


def test_the_extension_knows_only_the_errors() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("*.[ch]pp"))
    assert set(re.findall(r'"(rmt_engine\.[\w.]+)"', code)) == {"rmt_engine.errors"}


def test_the_folder_of_the_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "it would hide the package `kernels` that transformers imports"
    )


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from rmt_engine.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy:', *sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_no_file_names_a_place_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    words = ("/" + "work/", "." + "library", "fresh" + "-machine")
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        content = path.read_bytes() if name and path.is_file() else b""
        if b"\0" not in content[:8192]:
            found += [(name, word) for word in words if word.encode() in content]
    assert found == []
