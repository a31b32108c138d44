"""The base model with low-rank adapters in it, by PEFT: one resident model a process, adapters swapped in place.

x ──┬── W0 (frozen) ───────────────┬─→ y          A  (r, n)   B  (m, r)
    └── A ── B ── · alpha / rank ──┘
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora import check, lowrank, seeds
from fedlora.check import ConfigError
from fedlora.config import AdapterConfig
from fedlora.lowrank import Adapters, Pair
from fedlora.messages import Factors
from fedlora.models.base import Base
from fedlora.models.encode import PREFIX

if TYPE_CHECKING:
    from fedlora.models.prefix import Prefix

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


class AdaptedModel:
    """A frozen classifier whose adapters (and head, if trained) can be read, written, trained and saved.

    Arrays go by PEFT's file names without the factor: `base_model.model.<module>` for an adapted layer.
    """

    def __init__(self, base: Base, config: AdapterConfig, device: torch.device) -> None:
        """Injects the adapters. Raises ConfigError if target_modules match nothing, naming what could be matched."""
        import peft

        self.target_modules = target_modules(base.model, config.target_modules)
        self.head_is_new = bool(base.new)
        self.trains_head = self.head_is_new if config.train_head is None else config.train_head
        saved = _head_modules(base) if self.trains_head or self.head_is_new else None
        lora = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=self.target_modules,
            layers_to_transform=block_numbers(base.model, self.target_modules, config.layers),
            modules_to_save=saved,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # PEFT sets it right for Conv1D by itself
            self.peft = peft.get_peft_model(base.model, lora).to(device)
        self.prefix: Prefix | None = None  # whoever makes batches that bring hidden states sets it
        self.device, self.scale, self.base_dropout = device, config.alpha / config.rank, base.dropout
        names = {file_name(name): parameter for name, parameter in self.peft.named_parameters()}
        self._A = {n.removesuffix(".lora_A.weight"): p for n, p in sorted(names.items()) if n.endswith(".lora_A.weight")}
        self._B = {layer: names[f"{layer}.lora_B.weight"] for layer in self._A}
        heads = {n: p for n, p in sorted(names.items()) if ".lora_" not in n and p.requires_grad}
        self._head = heads if self.trains_head else {}
        paths = {file_name(name): name.rpartition(".")[0] for name, _ in self.peft.named_parameters()}
        self.owners = {array: self.peft.get_submodule(paths[array]) for array in self._head}  # of the head's arrays
        self.initial_head = self.dense()  # kept, since the resident model outlives a run that trains its head
        trainable = {id(parameter) for parameter in (*self._A.values(), *self._B.values(), *self._head.values())}
        for parameter in self.peft.parameters():
            parameter.requires_grad_(False)
            if id(parameter) not in trainable:
                parameter.data = parameter.data.to(getattr(torch, base.dtype))
        for owner in set(self.owners.values()):
            owner.register_forward_pre_hook(_in_float32)

    @property
    def layers(self) -> list[str]:
        """The names of the adapted layers, sorted."""
        return list(self._A)

    def adapters(self) -> Adapters:
        """A copy of the factors, float32."""
        return {layer: Pair(_numpy(self._A[layer]), _numpy(self._B[layer])) for layer in self._A}

    def dense(self) -> dict[str, np.ndarray]:
        """A copy of the head's parameters, if it is trained; else nothing."""
        return {name: _numpy(parameter) for name, parameter in self._head.items()}

    def write(self, factors: Factors | Adapters, dense: Mapping[str, np.ndarray]) -> None:
        """Set the factors and the head in place; a factor that is absent keeps what stood there."""
        with torch.no_grad():
            for layer, pair in factors.items():
                parts = pair._asdict() if isinstance(pair, Pair) else pair
                for factor, array in parts.items():
                    (self._A if factor == "A" else self._B)[layer].copy_(torch.from_numpy(array))
            for name, array in dense.items():
                self._head[name].copy_(torch.from_numpy(array))

    def trainable(self, trains: str) -> list[nn.Parameter]:
        """Makes the named factors ("AB", "A", "B") and the head, if it is trained, require gradients, and only those."""
        for factor, parameters in (("A", self._A), ("B", self._B)):
            for parameter in parameters.values():
                parameter.requires_grad_(factor in trains)
                parameter.grad = None
        for parameter in self._head.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        chosen = [p for factor, ps in (("A", self._A), ("B", self._B)) if factor in trains for p in ps.values()]
        return [*chosen, *self._head.values()]

    def freeze(self) -> None:
        """No parameter of the model requires a gradient any more."""
        for parameter in (*self._A.values(), *self._B.values(), *self._head.values()):
            parameter.requires_grad_(False)
            parameter.grad = None

    def train_mode(self, dropout: bool = True) -> None:
        """Training mode for what is trained and, with `dropout`, for the adapters' dropout (the base's: `model.dropout`).

        The rest stays in eval. Batch normalisation always does: it is frozen, and would mix the records of a batch.
        """
        self.peft.train(dropout and self.base_dropout)
        for name, module in self.peft.named_modules():
            trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
            elif trained or (dropout and "lora_dropout" in name):
                module.training = True

    def forward(self, batch: dict[str, Tensor]) -> Any:
        """transformers' output for a batch: .loss (mean over examples, in float32) and .logits (N, classes)."""
        inputs = {name: tensor for name, tensor in batch.items() if name != PREFIX}
        with self.prefix.replaced_by(batch[PREFIX]) if self.prefix and PREFIX in batch else nullcontext():
            output = self.peft(**inputs)
        if output.logits.dtype != torch.float32 and "labels" in batch:
            output.loss = nn.functional.cross_entropy(output.logits.float(), batch["labels"])
        return output

    def initial(self, init: str, seed: int) -> Adapters:
        """The factors of round 0: B = 0 and A by `init`, from the stream (seed, adapters), layer by layer.

        kaiming: uniform in ±1/√n, PEFT's own (rows of norm about 0.577); orthonormal: A Aᵀ = I;
        pissa: √S_r V_rᵀ of W0. Raises ConfigError for orthonormal or pissa with a rank above min(m, n).
        """
        rng = seeds.stream(seed, "adapters")
        return {layer: Pair(self._initial_A(layer, init, rng), np.zeros(self._B[layer].shape, np.float32)) for layer in self._A}

    def _initial_A(self, layer: str, init: str, rng: np.random.Generator) -> np.ndarray:
        rank, n = self._A[layer].shape
        m = self._B[layer].shape[0]
        if init != "kaiming" and rank > min(m, n):
            raise ConfigError(
                f"adapter.rank={rank} is above {min(m, n)}, the size of {layer}; lower it for strategy.init={init}"
            )
        if init != "pissa":
            return lowrank.draw((rank, n), init, rng)
        module: Any = self.peft.get_submodule(layer)
        weight = _numpy(module.base_layer.weight).astype(np.float64)
        if module.fan_in_fan_out:  # Conv1D keeps W0 transposed
            weight = weight.T
        _, values, right = np.linalg.svd(weight, full_matrices=False)
        return (np.sqrt(values[:rank])[:, None] * right[:rank]).astype(np.float32)

    def save(self, folder: Path) -> None:
        """The adapter in PEFT's own format: `PeftModel.from_pretrained(base, folder)` reads it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file")
            self.peft.save_pretrained(str(folder))


def _in_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a trained layer of the head is given by a base of lower precision."""
    return tuple(x.float() for x in inputs)


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


def _head_modules(base: Base) -> list[str]:
    """What is not the pretrained body: the model's children beside it, and whatever inside it the checkpoint lacked."""
    body = str(getattr(base.model, "base_model_prefix", ""))
    head = [name for name, child in base.model.named_children() if name != body and any(True for _ in child.parameters())]
    inside = {name.rpartition(".")[0] for name in base.new if name.split(".")[0] not in head}
    return head + sorted(inside)


def _numpy(parameter: Tensor) -> np.ndarray:
    return np.array(parameter.detach().float().cpu().numpy())
