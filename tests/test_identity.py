"""What a run is: the digest that its private streams are derived from."""

import dataclasses

import pytest

from fedlora import identity
from fedlora.compute import workbench
from fedlora.config import Config, from_dict
from fedlora.validate import from_json

USUAL = Config()

SAME = [
    ("engine", {"name": "flower", "workers": 3, "cohort": "4", "share": 2, "prefix_cache": 0.0}),
    ("checkpoint", {"every": 0, "keep": 9}),
    *((name, value) for name, value in (("name", "x"), ("results", "y"), ("overwrite", True), ("save_merged", True))),
    ("strategy", {"name": "fedsvd", "every": 1}),  # the default, spelt out
]
OTHER = [
    ("privacy", {"name": "record", "epsilon": 6.0}),
    ("privacy", {"delta": 1e-6}),
    ("strategy", {"name": "fedavg"}),
    ("strategy", {"name": "fedsvd", "every": 2}),
    ("train", {"lr": 0.25}),
    ("dataset", {"path": "elsewhere"}),
    ("seed", 1),
    ("rounds", 31),
]


def changed(name: str, value) -> Config:
    values = dataclasses.asdict(USUAL)
    return from_dict(values | {name: values[name] | value if isinstance(value, dict) else value})


@pytest.mark.parametrize(("name", "value"), SAME, ids=str)
def test_what_changes_no_number_changes_no_identity(name, value) -> None:
    assert identity.digest(changed(name, value)) == identity.digest(USUAL)


def test_what_may_change_a_number_changes_the_identity() -> None:
    assert len({identity.digest(USUAL), *(identity.digest(changed(*each)) for each in OTHER)}) == 1 + len(OTHER)


def test_every_setting_is_looked_at() -> None:
    """A setting that comes later belongs to the identity unless it is named among those that do not."""
    values = identity.flat(USUAL)
    outside = {name for name in values if not identity.identifies(name)}
    assert outside == {name for name in values if name.startswith(("engine.", "checkpoint."))} | {
        "name", "results", "overwrite", "plan", "save_merged",
    }  # fmt: skip
    groups = [item.name for item in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(USUAL, item.name))]
    assert {name.partition(".")[0] for name in values if "." in name} == {"strategy", *groups}


def test_it_is_the_same_where_a_message_arrives(small) -> None:
    config = small(privacy__name="record", privacy__epsilon=6.0, adapter__ranks={"4": 0.5, "8": 0.5})
    assert identity.digest(from_json(config.to_json())) == identity.digest(config) == workbench.build(config).identity
    assert len(identity.digest(config)) == 64
