"""What a checkpoint's files say before any model is built: its digest, and which folder is whose."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedlora import models
from fedlora.check import ConfigError
from fedlora.config import ModelConfig
from tests.conftest import ROOT


def digest(path) -> str:
    return models.digest(ModelConfig("hf", str(path)))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for name, text in {"config.json": "{}", "vocab.txt": "a b"}.items():
        (made / name).write_text(text)
    save_file({"weight": np.zeros(4)}, made / "model.safetensors")
    return made


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt", "tokenizer.json"])
def test_the_digest_follows_weights_configuration_and_tokenizer(folder, name) -> None:
    before = digest(folder)
    assert len(before) == 64 and before == digest(folder)
    if name == "model.safetensors":
        save_file({"weight": np.ones(4)}, folder / name)
    else:
        (folder / name).write_text("changed")
    assert digest(folder) != before


def test_the_digest_is_of_what_is_in_the_files_and_not_of_where_or_when(folder, tmp_path) -> None:
    before = digest(folder)
    (folder / "README.md").write_text("a model")
    os.utime(folder / "model.safetensors", (1, 1))
    assert digest(folder.rename(tmp_path / "elsewhere")) == before


def test_a_change_of_a_file_that_keeps_its_size_is_seen_in_one_process(folder) -> None:
    before = digest(folder)
    (folder / "vocab.txt").write_text("a c")
    os.utime(folder / "vocab.txt", ns=(1, 1))
    assert digest(folder) != before


def test_the_embedded_model_has_a_digest_and_none_of_this_loads_torch() -> None:
    code = (
        "import sys; from fedlora import models; from fedlora.config import ModelConfig; "
        "print(len(models.digest(ModelConfig())), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["64", "False", "False"], done.stderr


def test_a_model_that_reads_no_checkpoint_is_its_code(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(models, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(models, "names", lambda: ["drawn"])
    (tmp_path / "drawn.py").write_text("WIDTH = 1")
    before = models.digest(ModelConfig("drawn"))
    (tmp_path / "drawn.py").write_text("WIDTH = 2 ")
    assert models.digest(ModelConfig("drawn")) != before


def test_an_adapters_digest_follows_its_base_too(folder, tmp_path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    before = digest(adapter)
    (folder / "config.json").write_text("other")
    assert digest(adapter) != before
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match=r"names no base model; write base_model_name_or_path"):
        digest(adapter)


def test_a_hub_name_is_the_revision_that_the_cache_has(tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for commit in ("a" * 40, "b" * 40):
        snapshot = tmp_path / "models--own--tiny" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
    ref = tmp_path / "models--own--tiny" / "refs" / "main"
    ref.parent.mkdir()
    found = []
    for commit in ("a" * 40, "b" * 40, "a" * 40):
        ref.write_text(commit)
        found.append(digest("own/tiny"))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(("path", "words"), [
    ("no/such/folder", "no/such/folder is no folder here; check the path"),
    ("./models", r"\./models is no folder here; check the path"),
    ("own/nothing", "is neither a local folder nor a model that the hub gives"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_there_is_refused(monkeypatch, path, words) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=words):
        digest(path)


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder without a model; it needs config.json and model.safetensors"):
        digest(tmp_path)
