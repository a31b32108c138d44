"""The house's rules: imports go one way, files stay short, nothing heavy loads for a small question."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import strategies

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedlora", "strategies", "clients")

# The storeys of the house, from the ground up. A file imports from those below its own, and from its own package.
STOREYS = (
    ("check", "seeds", "disk", "cache", "untrusted", "interrupt", "setting"),
    ("arrays",),
    ("groups",),
    ("config",),
    ("data", "privacy", "secure"),
    ("models", "server"),
    ("strategies",),
    ("identity", "validate"),
    ("compute",),
    ("clients",),
    ("engines",),
    ("app",),
    ("deploy",),
    ("tools",),
    ("__main__",),
)


def sources():
    return [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in sources()}


def imported(file: Path) -> set[str]:
    """The modules of ours that a file imports: at its top, inside functions, and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) | ({node.module} if inner - MODULES.keys() else set())
    return (found & MODULES.keys()) - {"fedlora"}  # the package itself holds the time of its start


def package_of(module: str) -> str:
    """`strategies` of strategies.fedsvd; `models` of fedlora.models.hf."""
    return module.removeprefix("fedlora.").split(".")[0]


def storey(module: str) -> int:
    return next(number for number, packages in enumerate(STOREYS) if package_of(module) in packages)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"fedlora"}))
def test_imports_go_down(module: str) -> None:
    for other in imported(MODULES[module]):
        assert package_of(other) == package_of(module) or storey(other) < storey(module), f"{module} imports {other}"


def test_no_imports_go_round() -> None:
    sorter = TopologicalSorter({module: imported(file) - {module} for module, file in MODULES.items()})
    sorter.prepare()  # raises CycleError, with the circle


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
