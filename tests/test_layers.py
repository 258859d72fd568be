"""The house: imports go down only, and the command line starts light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mtgdm

PACKAGE = Path(mtgdm.__file__).parent
LAYERS = [
    {
        "errors",
        "processes",
        "file_formats",
        "remarks",
        "row_messages",
        "foreign_rows",
        "rows",
        "row_ids",
        "manifest",
        "plugins",
        "shipped",
        "thoughts",
    },
    {
        "stage",
        "estimates",
        "contracts",
        "domain",
        "profile_yaml",
        "profiles",
        "terminal",
        "interrupts",
        "checkpoints",
        "network",
    },
    {"tourism", "teachers", "student", "scoring", "evaluation", "export", "charts", "reports"},
    {"stages"},
    {"registry", "pipeline", "doctor", "testing"},
    {"cli", "__main__"},
]
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "plotly",
    "kaleido",
    "httpx",
    "numpy",
    "sacrebleu",
    "rapidfuzz",
    "bitsandbytes",
    "gguf",
)


def modules() -> dict[str, Path]:
    return {
        ".".join(("mtgdm", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imported(path: Path) -> set[str]:
    """Every module of mtgdm that a file imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name in modules() or f"{name}.__init__" in modules()}


def layer(module: str) -> int:
    room = module.split(".")[1] if "." in module else "__init__"
    return next((n for n, rooms in enumerate(LAYERS) if room in rooms), -1)


def test_every_room_has_its_layer() -> None:
    rooms = {name.split(".")[1] for name in modules()} - {"__init__"}
    assert rooms <= set().union(*LAYERS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down_only(name: str) -> None:
    if name == "mtgdm.__init__":
        return
    room = name.split(".")[1]
    for target in imported(modules()[name]):
        if target == "mtgdm":
            continue
        other = target.split(".")[1]
        if other == room:
            assert room != "stages" or target in ("mtgdm.stages", name), (
                f"{name} imports another stage: {target}"
            )
        else:
            assert layer(target) <= layer(name), f"{name} imports upwards: {target}"
            assert other != "tourism", f"{name} names a domain; it comes in by its entry point"


def test_no_two_modules_import_each_other_at_start() -> None:
    graph = {name.removesuffix(".__init__"): top_level_imports(path) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"import cycle: {' → '.join((*way, name))}"
        if name in done:
            return
        for target in graph.get(name, ()):
            if target != name and not name.startswith(f"{target}."):
                visit(target, (*way, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def top_level_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mtgdm."):
            subs = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules())
            found.update(subs or {node.module})
    return found


@pytest.mark.parametrize("arguments", ["--help", "teacher --help", "profiles", "config show", "stages"])
def test_the_command_line_starts_without_a_heavy_library(arguments: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom mtgdm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
