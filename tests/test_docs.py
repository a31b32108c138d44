"""What the documentation says of the code is there."""

import ast
import re

from tests.conftest import ROOT


def test_every_test_that_docs_name_is_there() -> None:
    named = 0
    for page in (ROOT / "docs").glob("*.md"):
        file = ""
        for found in re.finditer(r"`(?:tests/)?(test_\w+\.py)?(?:::(test_\w+))?[^`\n]*`", page.read_text(encoding="utf-8")):
            file = found[1] or file
            if not (found[1] or found[2]):
                continue
            path = ROOT / "tests" / file
            assert path.exists(), f"{page.name} names {file}"
            functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
            assert found[2] is None or found[2] in functions, f"{page.name} names {file}::{found[2]}"
            named += found[2] is not None
    assert named > 30
