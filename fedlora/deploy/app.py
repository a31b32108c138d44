"""The app that `flwr run` sends to a SuperLink: a folder with a pyproject.toml that names what is installed there.

It holds no code, so it can be written wherever the command runs, from a checkout or from a wheel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

PYPROJECT = """[project]
name = "fedlora"
version = "{version}"
description = "Federated LoRA fine-tuning; its code is what is installed where this runs"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedlora"
fab-include = ["/README.md"]

[tool.flwr.app.components]
serverapp = "fedlora.deploy.server:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
experiment = ""
"""


@contextmanager
def folder(checkout: Path) -> Iterator[Path]:
    """The folder of the app: `checkout` where that has a pyproject.toml, else one that is made and is gone afterwards."""
    if (checkout / "pyproject.toml").is_file():
        yield checkout
        return
    with tempfile.TemporaryDirectory() as made:
        Path(made, "pyproject.toml").write_text(PYPROJECT.format(version=version("fedlora")), encoding="utf-8")
        Path(made, "README.md").write_text("Server and devices run the fedlora that is installed there.\n", encoding="utf-8")
        yield Path(made)
