"""The examples of README.md and docs/*.md do what they are printed for: `tests/examples.py` says how they are checked."""

import dataclasses
import re
import shutil
import signal

import pytest
import yaml

from fedlora import interrupt
from fedlora.check import ConfigError
from fedlora.config import GROUPS
from tests import examples
from tests.conftest import ROOT
from tests.examples import PAGES, Command
from tests.test_rounds import outside_of_flower  # noqa: F401  # for the pages with an app of somebody else's

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """A folder with the data that commands name."""
    folder = tmp_path_factory.mktemp("materials")
    examples.materials(folder)
    return folder


@every_page
def test_every_block_says_what_it_is(page) -> None:
    for block in examples.blocks(page):
        assert block.language in examples.LANGUAGES, f"{block} is a block of {block.language or 'no language'}"
        if block.language == "yaml":
            assert yaml.safe_load(block.text)


@every_page
def test_every_printed_command_is_accepted(page, tmp_path, materials, capsys) -> None:
    folder = tmp_path / "cwd"
    shutil.copytree(materials, folder)
    if any(block.file for block in examples.blocks(page)):
        return  # its commands are run, below
    printed = examples.commands(page, folder)
    assert printed or not any(block.language == "sh" for block in examples.blocks(page))
    for command in printed:
        try:
            examples.accept(command, folder)
        except (ConfigError, SystemExit) as refused:
            pytest.fail(f"{page.name}, line {command.line}: {command.program} {command.arguments}: {refused}")


@every_page
def test_every_command_in_the_text_is_accepted(page, tmp_path) -> None:
    for span in examples.spans(page):
        if command := examples.written(span):
            try:
                examples.accept(command, tmp_path)
            except (ConfigError, SystemExit) as refused:
                pytest.fail(f"{page.name}: {span}: {refused}")


@every_page
def test_every_setting_in_the_text_exists(page) -> None:
    import strategies

    names = {f"{group}.{item.name}" for group, fields in GROUPS.items() for item in dataclasses.fields(fields)}
    names |= {f"strategy.{name}" for strategy in strategies.names() for name in strategies.settings(strategy)}
    options = {group: {file.stem for file in (ROOT / "configs" / group).glob("*.yaml")} for group in [*GROUPS, "strategy"]}
    options["partition"].add("own")
    options["strategy"].add("mine")  # of docs/extending.md
    for block in examples.blocks(page):
        if block.file and block.language == "yaml":
            options[block.file.split("/")[-2]].add(block.file.split("/")[-1].removesuffix(".yaml"))
    wrong = [span for span in examples.spans(page) if examples.misnamed(span, names, options)]
    assert not wrong, f"{page.name} names settings that do not exist: {wrong}"


@pytest.mark.parametrize("block", [block for page in PAGES for block in examples.blocks(page)
                                   if block.language == "python" and not block.file], ids=str)  # fmt: skip
def test_python_runs_as_printed(block) -> None:
    examples.run_python(block)


def test_the_files_of_extending_work_and_its_commands_run(tmp_path) -> None:
    """Every file into a copy of the project, then every command, for one round of two steps."""
    page = ROOT / "docs" / "extending.md"
    for name in ("fedlora", "strategies", "clients", "configs", "run.py"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    examples.write_files(page, tmp_path)
    (tmp_path / "shell").mkdir()
    printed = [command.settings for command in examples.commands(page, tmp_path / "shell") if command.settings]
    assert len(printed) == 8
    alone = [*examples.TINY, "engine.cohort=1"]  # nothing to measure first; the two engines share passes as they are printed
    tiny = [alone if "engine=inline" in line else [] for line in printed[:-2]] + 2 * [examples.TINY]
    done = examples.play(tmp_path, [line + more for line, more in zip(printed, tiny, strict=True)], 900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"trimmed_mean +Trimmed mean, 1803.01498 +AB .* biased .* trim=0.2", done.stdout)
    assert "strategy.trim (0.2): trimmed_mean: share of the clients cut off at each end" in done.stdout
    saved = [tmp_path / "results" / name / "adapter" / "adapter_model.safetensors" for name in ("processes", "inline")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


# ---- the checks themselves leave the process as it was, and can fail


def test_a_command_that_is_tried_here_does_not_watch_over_this_process(tmp_path) -> None:
    arguments = ["-m", "fedlora.deploy.client", "--superlink", "127.0.0.1:9", "--client", "0", "--data", "x", "--epsilon", "1"]
    before = signal.getsignal(signal.SIGINT)
    examples.accept(Command(1, "python", arguments), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before and not interrupt.watched


@pytest.mark.parametrize("arguments", [["run.py", "strategy=fedsvdd"], ["run.py", "-m", "seed=1,2", "client=3"],
                                       ["-m", "fedlora.tools.audit", "canary=3"],
                                       ["-m", "benchmarks.bounds", "--nothing"]])  # fmt: skip
def test_a_command_that_does_not_exist_is_refused(arguments, tmp_path, capsys) -> None:
    with pytest.raises((ConfigError, SystemExit)):
        examples.accept(Command(1, "python", arguments), tmp_path)


@pytest.mark.parametrize("span", ["train.learning_rate=1", "strategy=fedsdv", "privacy.foo"])
def test_a_setting_that_does_not_exist_is_found(span) -> None:
    names, options = {"train.lr", "privacy.clip"}, {"train": {"sgd"}, "strategy": {"fedsvd"}, "privacy": {"none"}}
    assert examples.misnamed(span, names, options)
    assert not examples.misnamed("strategy=fedsvd train.lr=1 privacy.clip", names, options)


def test_flora_of_the_readme_learns(tmp_path) -> None:
    """At the default learning rate it falls from 74 to 43 % within two rounds."""
    from fedlora.app import experiment
    from fedlora.tools import cli

    (tmp_path / "shell").mkdir()
    printed = [command.settings or [] for command in examples.commands(ROOT / "README.md", tmp_path / "shell")]
    (flora,) = (settings for settings in printed if "strategy=flora" in settings)
    few = ["rounds=2", "evaluate.every=2", "engine=inline", "engine.cohort=5", "checkpoint.every=0", f"results={tmp_path}"]
    summary = experiment.run(cli.compose(ROOT / "configs", [*flora, *few]), 0.0)
    assert summary["accuracy"] > summary["accuracy_before"]
