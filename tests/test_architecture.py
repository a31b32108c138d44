"""The house's rules: imports go one way, files stay short, nothing heavy loads for a small question."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import strategies

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedlora", "strategies", "clients")

# What each part may import of ours; a part not listed here may import anything (experiment, cli and plan wire it all).
ALLOWED = {
    "fedlora.check": set(),
    "fedlora.seeds": set(),
    "fedlora.cache": set(),
    "fedlora.disk": set(),
    "fedlora.arrays.lowrank": set(),
    "fedlora.untrusted": set(),
    "fedlora.arrays.compression": {"fedlora.check", "fedlora.untrusted"},
    "fedlora.secure": {"fedlora.check", "fedlora.disk"},
    "fedlora.arrays.sketch": {"fedlora.arrays.lowrank", "fedlora.seeds"},
    "fedlora.arrays.messages": {"fedlora.arrays.lowrank", "fedlora.untrusted"},
    "fedlora.arrays.sums": {"fedlora.arrays.messages", "fedlora.untrusted"},
    "fedlora.server.participation": {"fedlora.seeds"},
    "fedlora.validate": {"fedlora.check", "fedlora.data", "fedlora.models", "fedlora.secure"},
    "fedlora.setting": set(),
    "fedlora.groups": {"fedlora.check", "fedlora.setting"},
    "fedlora.config": {"fedlora.check", "fedlora.groups", "fedlora.identity", "fedlora.setting", "fedlora.validate"},
    "fedlora.app.reads": {"fedlora.check", "fedlora.config", "fedlora.setting"},
    "fedlora.app.grammar": {"fedlora.check", "fedlora.config"},
    "fedlora.identity": {"fedlora.models", "fedlora.data.resident", "strategies"},
    "fedlora.app.naming": {"fedlora.check", "fedlora.config", "fedlora.identity"},
    "fedlora.data.resident": {"fedlora.config", "fedlora.data"},
    "fedlora.data": {"fedlora.check", "fedlora.seeds", "fedlora.config"},
    "fedlora.models": {
        "fedlora.check",
        "fedlora.seeds",
        "fedlora.arrays.lowrank",
        "fedlora.config",
        "fedlora.data",
        "fedlora.arrays.messages",
    },
    "fedlora.compute.evaluate": {"fedlora.models"},
    "fedlora.interrupt": set(),
    "fedlora.engines": {"fedlora.check", "fedlora.config", "fedlora.interrupt", "fedlora.compute.workbench"},
    "fedlora.compute.workbench": {"fedlora.check", "fedlora.config", "fedlora.data", "fedlora.models", "fedlora.data.resident"},
    "fedlora.app.folder": {"fedlora.check"},
    "fedlora.app.claim": {"fedlora.disk", "fedlora.app.folder"},
    "fedlora.app.environment": set(),
    "fedlora.app.report": {"fedlora.config", "fedlora.app.folder", "fedlora.privacy.claim"},
    "fedlora.app.checkpoint": {
        "fedlora.check",
        "fedlora.config",
        "fedlora.disk",
        "fedlora.arrays.lowrank",
        "fedlora.arrays.messages",
    },
    "fedlora.privacy": {
        "fedlora.cache",
        "fedlora.check",
        "fedlora.config",
        "fedlora.disk",
        "fedlora.arrays.lowrank",
        "fedlora.arrays.messages",
        "fedlora.server.participation",
        "fedlora.seeds",
    },
    # Commands that try the private training path: they wire parts as cli does, and nothing imports them.
    "fedlora.tools.audit": {
        "fedlora.check",
        "fedlora.config",
        "fedlora.models",
        "fedlora.privacy.accounting",
        "fedlora.seeds",
        "clients",
    },
    "fedlora.tools.selftest": {
        "fedlora.check",
        "fedlora.tools.cli",
        "fedlora.app.compose",
        "fedlora.models",
        "fedlora.privacy.refusals",
        "fedlora.seeds",
        "fedlora.compute.workbench",
        "clients",
    },
    "strategies": {
        "fedlora.check",
        "fedlora.arrays.compression",
        "fedlora.arrays.lowrank",
        "fedlora.arrays.messages",
        "fedlora.server.participation",
        "fedlora.secure",
        "fedlora.seeds",
        "fedlora.arrays.sketch",
        "fedlora.arrays.sums",
        "fedlora.untrusted",
    },
    "clients": {
        "fedlora.cache",
        "fedlora.check",
        "fedlora.arrays.compression",
        "fedlora.config",
        "fedlora.compute.evaluate",
        "fedlora.arrays.lowrank",
        "fedlora.arrays.messages",
        "fedlora.models",
        "fedlora.privacy",
        "fedlora.secure",
        "fedlora.seeds",
        "fedlora.arrays.sketch",
        "fedlora.arrays.sums",
        "fedlora.compute.workbench",
    },
}


def sources():
    return [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]


def imports(file: Path) -> set[str]:
    """Dotted names of ours that a file imports, those inside functions too, those for type checkers left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def part_of(file: Path) -> str | None:
    """The longest entry of ALLOWED that a file is within."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return max((part for part in ALLOWED if within(name, part)), key=len, default=None)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part: str) -> None:
    files = [file for file in sources() if part_of(file) == part]
    assert files
    for file in files:
        for name in imports(file):
            assert within(name, part) or any(within(name, other) for other in ALLOWED[part]), f"{file} imports {name}"


def test_no_strategy_is_known_by_name_to_the_runtime() -> None:
    names = set(strategies.names())
    assert names
    for file in (ROOT / "fedlora").rglob("*.py"):
        strings = {
            n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        default = {"fedsvd"} if file.name == "config.py" else set()
        assert strings & names <= default, f"{file} names {strings & names}"


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file: Path) -> None:
    limit = 120 if file.parent.name == "strategies" and file.stem in strategies.names() else 300
    assert len(file.read_text().splitlines()) <= limit


def test_checking_a_command_line_loads_no_model_library() -> None:
    code = (
        "import sys; from pathlib import Path; from fedlora.tools.cli import main; "
        "status = main(Path('configs'), ['rounds=0']); "
        "print(status, [m for m in ('torch', 'transformers', 'ray', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2 []", done.stderr
