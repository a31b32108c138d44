"""Which layers of a base model are adapted, and which of its parts are its head."""

from __future__ import annotations

import re

from torch import nn

from fedlora import check
from fedlora.check import ConfigError
from fedlora.models.base import Base

# Query and value projections under the names that transformers' models give them: the default of target_modules.
_QUERY_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("c_attn",),
    ("query_key_value",),
    ("Wqkv",),
)


def file_name(parameter: str) -> str:
    """A parameter's name as PEFT writes it to adapter_model.safetensors."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight")


def target_modules(model: nn.Module, wanted: list[str]) -> list[str]:
    """The endings of the layers to adapt; for an empty `wanted`, the query and value projections by their usual names."""
    linear = [name for name, module in model.named_modules() if _adaptable(module)]
    endings = {name.rpartition(".")[2] for name in linear}
    if not wanted:
        for names in _QUERY_VALUE:
            if endings.issuperset(names):
                return list(names)
        raise ConfigError(
            f"adapter.target_modules must be named for this model; its linear layers are {', '.join(sorted(endings))}"
        )
    for ending in wanted:
        if not any(_ends(name, ending) for name in linear):
            raise ConfigError(
                f"adapter.target_modules={ending} matches no linear layer; {check.suggest(ending, endings)}"
                + (f" (there are: {', '.join(sorted(endings))})" if len(endings) < 30 else "")
            )
    return list(wanted)


def block_numbers(model: nn.Module, targets: list[str], wanted: list[int]) -> list[int] | None:
    """The blocks to adapt, by their numbers from 0; None for all. Raises ConfigError for one that is not there."""
    if not wanted:
        return None
    linear = [name for name, module in model.named_modules() if _adaptable(module)]
    found = [re.match(r".*\.[^.]*\.(\d+)\.", name) for name in linear if any(_ends(name, ending) for ending in targets)]
    count = 1 + max((int(match[1]) for match in found if match), default=-1)  # numbered as PEFT does: the last in a name
    if wrong := [number for number in wanted if not -count <= number < count]:
        raise ConfigError(
            f"adapter.layers has {wrong[0]}, but this model has {count} blocks; use 0 to {count - 1}, or -1 for the last"
        )
    return sorted({number % count for number in wanted})


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def head_modules(base: Base) -> list[str]:
    """What is not the pretrained body: the model's children beside it, and whatever inside it the checkpoint lacked."""
    body = str(getattr(base.model, "base_model_prefix", ""))
    head = [name for name, child in base.model.named_children() if name != body and any(True for _ in child.parameters())]
    inside = {name.rpartition(".")[0] for name in base.new if name.split(".")[0] not in head}
    return head + sorted(inside)
