"""The commands `fedlora` and `python -m fedlora`, from a checkout and from a wheel, and options that somebody adds."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import Distribution, version
from pathlib import Path

import pytest

import strategies
from fedlora.app import experiment
from fedlora.tools import cli
from strategies import LoRAStrategy
from tests.conftest import ROOT

TOPS = ("fedlora", "strategies", "clients", "configs", "pyproject.toml", "README.md")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
CALL = """import sys; from importlib.metadata import Distribution
sys.argv = ["/usr/bin/fedlora", *sys.argv[2:]]
commands = next(Distribution.discover(name="fedlora", path=[sys.path[1]])).entry_points
sys.exit(next(command for command in commands if command.name == "fedlora").load()())"""


def python(*arguments: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What `pip install` makes of a checkout: the wheel, unpacked."""
    source, built, site = (tmp_path_factory.mktemp(name) for name in ("source", "built", "site"))
    for name in TOPS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    done = python("-c", BUILD, str(built), path=source, cwd=source)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def test_a_wheel_needs_no_checkout(installed, tmp_path) -> None:
    found = {
        file.relative_to(installed / "fedlora" / "configs") for file in (installed / "fedlora" / "configs").rglob("*.yaml")
    }
    assert found == {file.relative_to(ROOT / "configs") for file in (ROOT / "configs").rglob("*.yaml")}
    done = python("-m", "fedlora", "engine=inline", "device=cpu", "clients=4", "plan=true", path=installed, cwd=tmp_path)
    assert done.returncode == 0 and "4,096 parameters" in done.stdout, done.stderr


def test_usage_names_the_command_that_was_typed(installed, tmp_path) -> None:
    module = python("-m", "fedlora", "--help", path=ROOT, cwd=tmp_path)
    script = python(str(ROOT / "run.py"), "--help", path=ROOT, cwd=tmp_path)
    command = python("-c", CALL, "", "--help", path=installed, cwd=tmp_path)
    for done, name in ((module, "python -m fedlora"), (script, "python run.py"), (command, "fedlora")):
        assert done.stdout.startswith(f"usage: {name} [-m]"), done.stderr
        assert f"\n  {name} strategy=fedsvd clients=50\n" in done.stdout
    wrong = python("-m", "fedlora", "xyzzy=1", path=ROOT, cwd=tmp_path)
    assert wrong.returncode == 2 and "python -m fedlora --help lists the settings" in wrong.stderr


def test_version(capsys) -> None:
    assert cli.main(ROOT / "configs", ["--version"]) == 0
    assert capsys.readouterr().out == f"fedlora {version('fedlora')}\n"
    assert Distribution.from_name("fedlora").version == version("fedlora")


def test_flags_may_stand_anywhere_and_a_closed_pipe_is_no_fault() -> None:
    command = f"{sys.executable} {ROOT / 'run.py'} --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1
    parsed = cli._parser().parse_intermixed_args(["strategy=fedavg", "-m", "seed=1,2", "--list"])
    assert parsed.multirun and parsed.list and parsed.overrides == ["strategy=fedavg", "seed=1,2"]


class Unpublished(LoRAStrategy):
    """The server keeps what it has; of all that `--list` shows it says only what it trains."""

    trains = "B"

    def merge(self, state, updates, round):
        return state


def test_a_strategy_without_a_paper_lists_and_trains_and_one_without_a_file_gets_a_hint(
    monkeypatch, capsys, tmp_path, small
) -> None:
    monkeypatch.setitem(strategies._CLASSES, "unpublished", Unpublished)
    assert cli.main(ROOT / "configs", ["strategy=unpublished"]) == 2
    assert capsys.readouterr().err == (
        "error: strategy=unpublished has no file configs/strategy/unpublished.yaml, which makes it an option; write one with "
        "the line name: unpublished\n"
    )
    configs = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (configs / "strategy" / "unpublished.yaml").write_text("name: unpublished\n")
    assert cli.main(configs, ["--list"]) == 0
    assert any(line.split()[:3] == ["unpublished", "–", "B"] for line in capsys.readouterr().out.splitlines())
    assert experiment.run(replace(small(), strategy={"name": "unpublished"}), 0.0)["status"] == "finished"


@pytest.mark.parametrize("group", ["dataset", "model", "partition", "engine"])
def test_an_option_without_its_file_gets_a_hint(group, capsys, tmp_path) -> None:
    configs = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    name = {"dataset": "files", "model": "hf", "partition": "iid", "engine": "inline"}[group]
    (configs / group / f"{name}.yaml").unlink()
    assert cli.main(configs, [f"{group}={name}"]) == 2
    assert f"{group}={name} has no file configs/{group}/{name}.yaml" in capsys.readouterr().err


def test_the_file_of_an_option_says_which_settings_it_reads(capsys, tmp_path) -> None:
    configs = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (configs / "dataset" / "digits.yaml").write_text("name: digits\npath: null\n")
    (configs / "partition" / "iid.yaml").write_text("# @package _global_\npartition:\n  name: iid\n  alpha: 0.7\n")
    given = ["dataset.path=x.csv", "partition=iid"]
    config = cli.compose(configs, given)
    assert (config.dataset.path, config.partition.alpha) == ("x.csv", 0.7)
    assert cli.main(ROOT / "configs", given) == 2
    assert "dataset.path=x.csv is not read with dataset=digits" in capsys.readouterr().err
