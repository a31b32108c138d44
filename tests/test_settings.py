"""Settings as they are declared and as they are typed: bounds, who reads them, the grammar of values, what is suggested."""

import dataclasses
import math
import tomllib

import pytest

from fedlora import check
from fedlora.app import reads
from fedlora.app.compose import compose_all, config_folder, expand
from fedlora.check import ConfigError
from fedlora.config import GROUPS, Config, declared, from_dict
from fedlora.tools import cli
from fedlora.validate import checked
from tests.conftest import ROOT

FILES = ("dataset=files", "dataset.path=x.csv", "dataset.text=t")
DEPLOY = ("deploy=here", "dataset=files", "dataset.text=t", "dataset.classes=[a,b]")
RECORD, USER = ("privacy=record", "privacy.epsilon=3"), ("privacy=user", "privacy.epsilon=3")
HUB = ("dataset=hub", "dataset.path=x", "dataset.text=t")

# Every setting that not all runs read: with what it is read, with what it is not, and of what the refusal speaks.
READ = {
    "fraction=0.5": ((), ("clients_per_round=3",), "clients_per_round=3; remove one of them"),
    "min_online=3": (DEPLOY, (), "without deploy; set it"),
    "patience=3.0": (DEPLOY, (), "without deploy; set it"),
    "model.path=m": (("model=hf",), (), "model=vit_digits; set model=hf"),
    "model.max_length=9": (FILES, (), "dataset=digits; remove"),
    "model.dropout=true": (("model=hf", "model.path=m"), (), "set model=hf"),
    "model.head=new": (("model=hf", "model.path=m"), (), "set model=hf"),
    "model.max_unknown=0.5": (("model=hf", "model.path=m", *FILES), (), "set model=hf"),
    "dataset.path=y.csv": (FILES, (), "dataset=digits; set dataset=files or dataset=hub"),
    "dataset.subset=s": (HUB, FILES, "dataset=files; set dataset=hub"),
    "dataset.train_split=s": (HUB, FILES, "set dataset=hub"),
    "dataset.test=t.csv": (FILES, (), "set dataset=files or dataset=hub"),
    "dataset.test_fraction=0.3": ((), (*FILES, "dataset.test=t.csv"), "dataset.test=t.csv; remove one of them"),
    "dataset.columns=[a,b]": (FILES, HUB, "dataset=hub; set dataset=files"),
    "dataset.classes=[a,b]": (FILES, (), "set dataset=files"),
    "dataset.text=t": (FILES, (), "set dataset=files"),
    "dataset.image=i": (("dataset=files", "dataset.path=x.csv"), (), "set dataset=files"),
    "dataset.label=l": (FILES, (), "set dataset=files"),
    "dataset.group=g": ((*FILES, "partition=natural"), FILES, "set partition=natural or partition=domains"),
    "partition.alpha=0.3": (("partition=quantity",), ("partition=iid",), "set partition=dirichlet or partition=quantity"),
    "partition.shards_per_client=3": (("partition=shards",), (), "set partition=shards"),
    "partition.min_examples=3": ((), None, ""),  # unread where devices have their own data, which refuses all of `partition`
    "partition.sizes=[1,2]": (None, (), "set partition=own"),  # only devices say it
    "train.steps=3": ((), ("train.epochs=2",), "train.epochs=2; remove one of them"),
    "train.sampling=poisson": ((), RECORD, "privacy=record; remove train.sampling"),
    "train.momentum=0.5": ((), ("train=adamw",), "train.optimizer=adamw; set train.optimizer=sgd"),
    "server.trim=0.2": (("server.mean=trimmed",), ("server.mean=median",), "set server.mean=trimmed"),
    "server.norm_factor=2.0": (("server.mean=norm_filter",), (), "set server.mean=norm_filter"),
    "server.max_weight=0.5": ((), ("server.mean=median",), "set server.mean=weighted"),
    "server.max_update=50.0": ((), USER, "privacy=user; remove server.max_update"),
    "server.lr=0.5": (
        (
            "strategy=fedavg",
            "server.optimizer=adam",
        ),
        (),
        "set server.optimizer=momentum or server.optimizer=adam",
    ),
    "server.momentum=0.5": (
        (
            "strategy=fedavg",
            "server.optimizer=momentum",
        ),
        (),
        "set server.optimizer=momentum or",
    ),
    "server.beta2=0.5": (
        ("strategy=fedavg", "server.optimizer=adam"),
        ("server.optimizer=momentum",),
        "set server.optimizer=adam",
    ),
    "server.tau=0.5": (
        (
            "strategy=fedavg",
            "server.optimizer=adam",
        ),
        ("server.optimizer=momentum",),
        "set server.optimizer=adam",
    ),
    "server.secure_bound=4.0": (("aggregation=secure",), (), "set aggregation=secure"),
    "compression.top_k=0.2": (("compression.up=top_k",), ("compression.up=int8",), "set compression.up=top_k"),
    "privacy.epsilon=3.0": (("privacy=record",), (), "privacy=none; set privacy=record or privacy=user"),
    "privacy.delta=1e-06": (USER, (), "privacy=none; set privacy=record or privacy=user"),
    "privacy.clip=0.5": (RECORD, (), "set privacy=record or privacy=user"),
    "privacy.noise_multiplier=2.0": (("privacy=user",), (), "set privacy=record or privacy=user"),
    "privacy.participation=worst": (RECORD, USER, "privacy=user; set privacy=record"),
    "privacy.adjacency=replace": (USER, (), "set privacy=record or privacy=user"),
    "privacy.accountant=rdp": (RECORD, USER, "set privacy=record"),
    "privacy.sampling=fixed": (USER, RECORD, "set privacy=user"),
    "checkpoint.keep=3": ((), ("checkpoint.every=0",), "checkpoint.every=0; change that"),
    "engine.name=inline": ((), DEPLOY, "deploy=here; remove one of them"),
    "engine.address=auto": ((), ("engine=inline",), "engine=inline; set engine=ray"),
    "engine.workers=3": (("engine=flower",), ("engine=inline",), "set engine=ray or engine=flower"),
    "engine.gpus_per_worker=0.5": ((), DEPLOY, "deploy=here; remove one of them"),
    "engine.cohort=3": (("engine=inline",), ("engine=flower",), "set engine=ray or engine=inline"),
    "engine.share=3": (("-m",), (), "without -m; add it"),
    "engine.prefix_cache=2.0": ((), DEPLOY, "deploy=here; remove one of them"),
    "engine.retries=3": ((), ("engine=inline",), "set engine=ray"),
}


def cells(*arguments: str) -> list[Config]:
    multirun = "-m" in arguments
    return compose_all(ROOT / "configs", expand([a for a in arguments if a != "-m"], multirun), multirun)


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cells(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_setting_that_not_all_runs_read_is_tried_below() -> None:
    assert {row.partition("=")[0] for row in READ} == {name for name, setting in declared().items() if setting.only}


@pytest.mark.parametrize("given", READ)
def test_a_setting_is_taken_where_it_is_read_and_refused_where_it_is_not(given) -> None:
    name, _, value = given.partition("=")
    taken, ignored, words = READ[given]
    if taken is not None:
        (config,) = cells(*taken, given)
        found = reads.value_of(config, name)
        assert (f"[{','.join(map(str, found))}]" if isinstance(found, list) else reads.as_text(found)) == value
        assert name not in reads.unread(config, multirun="-m" in taken)
    if ignored is not None:
        sentence = refusal(*ignored, given)
        assert sentence.startswith(f"{given} is not read with"), sentence
        assert words in sentence and sentence.endswith((f"remove {name}", "remove one of them"))


def test_of_several_settings_that_are_not_read_the_sentence_names_the_option_that_reads_them() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.path=x\.csv is not read with dataset=digits; set dataset=files"):
        compose_all(config_folder(), [["model.max_length=64", "dataset.path=x.csv", "dataset.text=t"]])


def test_of_a_setting_that_is_given_twice_the_last_counts() -> None:
    assert cells("privacy.noise_multiplier=1", "privacy.noise_multiplier=null")[0].privacy.noise_multiplier is None
    assert "privacy.noise_multiplier=2" in refusal("privacy.noise_multiplier=null", "privacy.noise_multiplier=2")


def test_null_unsets_what_is_not_read_and_what_a_file_sets_is_let_go() -> None:
    (config,) = cells("train.epochs=2", "train.steps=null", "clients_per_round=3", "fraction=null")
    assert config == cells("train.epochs=2", "clients_per_round=3")[0]
    (config,) = cells("experiment=sst2", "model=vit_digits", "dataset=digits")
    assert config.dataset.columns == [] and config.dataset.text is None and config.model.max_length == 128
    assert cells("experiment=frontier", "privacy=none")[0].privacy.clip == 1.0


def test_a_sweep_refuses_what_no_cell_reads_and_gives_the_other_cells_the_default() -> None:
    plain, private = cells("-m", "privacy=none,record", "privacy.epsilon=3", "privacy.clip=0.5")
    assert plain == Config() and private.privacy.clip == 0.5
    assert "server.trim=0.2 is not read with server.mean=weighted" in refusal("-m", "seed=1,2", "server.trim=0.2")
    fedavg, fedsvd = cells("-m", "strategy=fedavg,fedsvd", "strategy.every=2")
    assert (fedavg.strategy, fedsvd.strategy) == ({"name": "fedavg"}, {"name": "fedsvd", "every": 2})
    assert refusal("-m", "strategy=fedavg,flora", "strategy.every=2").startswith("strategy.every is not a setting of fedavg")


def test_a_setting_of_a_strategy_that_its_other_settings_leave_unread_is_refused() -> None:
    sentence = "strategy.steps=5 is not read with strategy.solver=ridge; set strategy.solver=sgd, or remove strategy.steps"
    assert refusal("strategy=lora_fair", "strategy.steps=5") == sentence
    assert cells("strategy=lora_fair", "strategy.steps=5", "strategy.solver=sgd")[0].strategy["steps"] == 5
    both = cells("-m", "strategy=lora_fair", "strategy.steps=5", "strategy.solver=sgd,ridge")
    assert [cell.strategy.get("steps") for cell in both] == [5, None]


def test_an_option_that_somebody_adds_says_in_its_file_what_it_reads() -> None:
    config = dataclasses.replace(Config(), dataset=dataclasses.replace(Config().dataset, name="coins", path="x"))
    assert "dataset.path" in reads.unread(config)
    assert "dataset.path" not in reads.unread(config, {"dataset.path"})


# ---- bounds

# An infinite or very large value of these says that there is no limit.
ENDLESS = {"partition.alpha", "train.max_grad_norm", "server.norm_factor", "server.max_update"}


@pytest.mark.parametrize(
    "name", [name for name, setting in declared().items() if setting.type in (int, float, int | None, float | None)]
)
def test_a_number_has_bounds_that_one_sentence_names(name) -> None:
    def of(value) -> Config:
        values = dataclasses.asdict(Config())
        group, _, own = name.rpartition(".")
        (values[group] if group else values)[own] = value
        return from_dict(values)

    for value in (math.nan, -1, *(() if name in ENDLESS else (10**31, 10**400, 1e300))):
        with pytest.raises(ConfigError) as caught:
            checked(of(value))
        assert str(caught.value).startswith(f"{name}={check.shown(value)} is out of range; it must "), caught.value


def test_numbers_that_hung_or_killed_are_refused_at_once(capsys) -> None:
    for given, bound in {
        "rounds=99999999999999999999": "at most 100,000", "train.lr=inf": "finite", "threads=100000": "at most 512",
        "adapter.rank=1000000": "at most 1,024", f"seed={'9' * 5000}": "300 digits or more",
        f"train.lr={'9' * 400}": "300 digits or more", "strategy.every=99999999999999999999": "at most 1,000,000,000",
    }.items():  # fmt: skip
        assert bound in refusal(given) and len(refusal(given)) < 300
    for budget in ("1e300", "1e8"):
        assert "must lie between 0 and 1e+06, or be inf" in refusal("privacy=record", f"privacy.epsilon={budget}")


# ---- what is typed


@pytest.mark.parametrize(
    "path",
    [
        "reviews (1).csv",
        "a=b.csv",
        'it\'s "x" [1] {y}.csv',
        "ä ö ü/日本.csv",
        "1e5",
        "007",
        "true",
        "C:\\x\\",
        "a@b:c~!.csv",
        "x$y.csv",
    ],
)
def test_a_text_stays_what_was_typed(path) -> None:
    (config,) = cells(f"name={path}", "dataset=files", f"dataset.path={path}", f"dataset.text={path}", f"dataset.label={path}")
    assert (config.name, config.dataset.path, config.dataset.text, config.dataset.label) == (path,) * 4


def test_lists_of_texts_and_sweeps_of_texts() -> None:
    given = "[my text (1),'a, b',1e5,007,null,no,x=y]"
    config = cells(*FILES, f"dataset.columns={given}", f"dataset.classes={given}")[0]
    assert config.dataset.columns == config.dataset.classes == ["my text (1)", "a, b", "1e5", "007", "null", "no", "x=y"]
    swept = cells("-m", "dataset=files", "dataset.text=t", "dataset.path=a (1).csv,'b, c.csv',2.csv")
    assert [cell.dataset.path for cell in swept] == ["a (1).csv", "b, c.csv", "2.csv"]
    assert [cell.dataset.domains for cell in cells("-m", "dataset.domains=[plain],[blur,plain]")] == [
        ["plain"],
        ["blur", "plain"],
    ]
    assert [cell.name for cell in cells("-m", "name=choice(a,b)")] == ["a", "b"]


@pytest.mark.parametrize(
    ("swept", "sentence"),
    [
        (["adapter.alpha=range(1,2,0)"], "adapter.alpha=range(1,2,0) cannot be swept (range() arg 3 must not be zero)"),
        (["adapter.alpha=range(1,0)"], "adapter.alpha=range(1,0) gives no value; name the values, with commas between"),
        (["train.lr=interval(0,1)"], "train.lr=interval(0,1) gives no value"),
        (["train.lr=range(0.0,1.0,1e-300)"], "the sweep has 10,001 cells or more, above 10,000; name fewer values"),
        (["seed=range(0,1000)", "rounds=range(1,1000)"], "the sweep has 999,000 cells or more, above 10,000"),
    ],
)
def test_a_sweep_that_gives_no_cells_or_no_end_of_them_is_refused(swept, sentence) -> None:
    assert refusal("-m", *swept).startswith(sentence)


def test_a_comma_in_a_path_is_part_of_it_where_that_file_is_there_or_quotes_say_so(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = refusal("dataset=files", "dataset.text=t", "dataset.path=a,b.csv")
    assert "names several values; add -m" in sentence and "\"dataset.path='a,b.csv'\"" in sentence
    assert cells("dataset=files", "dataset.text=t", "dataset.path='a,b.csv'")[0].dataset.path == "a,b.csv"
    (tmp_path / "a,b.csv").touch()
    assert cells("dataset=files", "dataset.text=t", "dataset.path=a,b.csv")[0].dataset.path == "a,b.csv"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("rounds=2.5", "rounds=2.5 is not a whole number (default 30)"),
        ("rounds=(3", "rounds=(3 is not a whole number (default 30)"),
        ("rounds=null", "rounds=null is not a whole number (default 30)"),
        ("train.epochs=few", "train.epochs=few is not a whole number or null (default none)"),
        ("train.lr=fast", "train.lr=fast is not a number (default 0.5)"),
        ("overwrite=maybe", "overwrite=maybe is not true or false (default False)"),
        ("adapter.target_modules=q", "adapter.target_modules=q is not a list, such as [a,b] (default [])"),
        ("adapter.layers=[x]", "adapter.layers=[x] is not a list of whole numbers, such as [1,2] (default [])"),
        ("rounds=${nothing}", "rounds: Interpolation key 'nothing' not found"),
        ("seed", "seed has no value; write seed=<value>, such as seed=0"),
        ("dataset.path", "dataset.path has no value; write dataset.path=<value>"),
        ("~seed", "~seed is not setting=value; write the name of a setting, = and its value"),
        ("+seed=1", "+seed=1 is not setting=value; write the name of a setting, = and its value"),
        ("name=a\nb", r"'name=a\nb' has the character U+000A, which no setting may have; remove it"),
        ("name=\udcff", r"'name=\udcff' has the character U+DCFF, which no setting may have; remove it"),
        ("strategy.init=a (b", "strategy.init=a (b cannot be read; put quotes around a value with special characters"),
        ("rank=8", "rank is not a setting; did you mean adapter.rank?"),
        ("lr=1", "lr is not a setting; did you mean server.lr or train.lr?"),
        ("trian.steps=3", "trian.steps is not a setting; did you mean train.steps?"),
        ("train.trim=0.1", "train.trim is not a setting; did you mean server.trim?"),
        ("compression.rate=3", "compression.rate is not a setting; the settings of compression are: down, top_k, up"),
        ("learning_rate=1", "learning_rate is not a setting; did you mean train.lr?"),
        ("train.local_epochs=1", "train.local_epochs is not a setting; did you mean train.epochs?"),
        ("xyzzy=3", "xyzzy is not a setting; python run.py --help lists the settings"),
    ],
)
def test_what_cannot_be_read_is_said_in_our_own_words(given, sentence) -> None:
    assert refusal(given).startswith(sentence)


def test_a_suggestion_does_not_mislead_and_is_short() -> None:
    assert "did you mean" not in refusal("train.class_weights=[1,2]")
    many = [f"model.layers.{i}.query" for i in range(100)]
    assert check.suggest("xyzzy", many).count("model.layers") == check.FEW
    assert len(refusal("clientele=3")) < 200


# ---- help


def test_help_says_once_what_strategies_share_and_with_what_a_setting_is_read(capsys) -> None:
    assert cli.main(ROOT / "configs", ["--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  strategy.init (kaiming): ") == 1
    assert "  dataset.path (none): files or hub: the training file" in printed
    assert "  engine.share (1): ray, a sweep (-m): cells of a sweep" in printed
    assert "  train.steps (10): without train.epochs: local" in printed


# ---- the package


def test_every_package_and_every_configuration_file_is_installed() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent for top in ("fedlora", "strategies", "clients") for file in (ROOT / top).rglob("__init__.py")}
    assert sorted(packages) == sorted([".".join(folder.relative_to(ROOT).parts) for folder in folders] + ["fedlora.configs"])
    assert config_folder() == ROOT / "configs"
    assert {path.suffix for path in config_folder().rglob("*") if path.is_file()} == {".yaml"}
    assert set(GROUPS) >= {path.name for path in config_folder().iterdir() if path.is_dir()} - {"strategy", "experiment"}


def test_the_app_that_is_made_for_flower_is_the_one_of_the_checkout(tmp_path) -> None:
    from fedlora.deploy import app

    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())
    with app.folder(ROOT) as folder:
        assert folder == ROOT
    with app.folder(tmp_path) as folder:
        made = tomllib.loads((folder / "pyproject.toml").read_text())
        assert made["tool"] == {"flwr": ours["tool"]["flwr"]}
        assert made["project"].items() >= {key: ours["project"][key] for key in ("name", "license")}.items()
        assert all((folder / name.strip("/")).is_file() for name in made["tool"]["flwr"]["app"]["fab-include"])
    assert not folder.exists()
