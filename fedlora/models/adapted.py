"""The base model with low-rank adapters in it, by PEFT: one resident model a process, adapters swapped in place.

x ──┬── W0 (frozen) ───────────────────────┬─→ y      A  (r, n)   B  (m, r)
    ├── A ──(R)── B ── · alpha / rank ─────┤          R  (r, r), where there is one
    └── correction, where there is one ────┘          a pair that a strategy has moved out of the adapters into the base
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.arrays import lowrank, messages
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.arrays.messages import Factors
from fedlora.check import ConfigError
from fedlora.config import AdapterConfig
from fedlora.models.base import Base
from fedlora.models.encode import PREFIX
from fedlora.models.targets import block_numbers, file_name, head_modules, target_modules


class Resumed(Protocol):
    """Blocks whose output is known already (`fedlora.compute.prefix.Prefix`)."""

    def replaced_by(self, hidden: Tensor) -> AbstractContextManager[None]:
        """While this lasts, the first block above them is given `hidden` (N, T, H)."""


class AdaptedModel:
    """A frozen classifier whose adapters (and head, if trained) can be read, written, trained and saved.

    Arrays go by PEFT's file names without the factor: `base_model.model.<module>` for an adapted layer.
    """

    def __init__(self, base: Base, config: AdapterConfig, device: torch.device) -> None:
        """Injects the adapters. Raises ConfigError if target_modules match nothing, naming what could be matched."""
        import peft

        self.target_modules = target_modules(base.model, config.target_modules)
        self.base, self.head_is_new = base, bool(base.new)
        self.trains_head = self.head_is_new if config.train_head is None else config.train_head
        # PEFT reads no adapter of a text classifier without its head, though the base has the same one.
        saved = head_modules(base) if self.trains_head or self.head_is_new or base.task else None
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
        self.prefix: Resumed | None = None  # whoever makes batches that bring hidden states sets it
        self.device, self.base_dropout = device, base.dropout
        self.rank, self.scale = config.rank, config.alpha / config.rank
        names = {file_name(name): parameter for name, parameter in self.peft.named_parameters()}
        self._A = {n.removesuffix(".lora_A.weight"): p for n, p in sorted(names.items()) if n.endswith(".lora_A.weight")}
        self._B = {layer: names[f"{layer}.lora_B.weight"] for layer in self._A}
        heads = {n: p for n, p in sorted(names.items()) if ".lora_" not in n and p.requires_grad}
        self._head = heads if self.trains_head else {}
        self._R: dict[str, nn.Parameter] = {}  # by the name on the wire; made when a broadcast first has them
        self.mixes = False  # whether they act
        self.correction: dict[str, tuple[Tensor, Tensor]] = {}  # A and B of each layer that has one
        self._alpha = config.alpha
        self._drawn: dict[tuple[str, int, int, bool], Adapters] = {}  # initial factors, the newest few
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
        for layer in self._A:
            self._adapter(layer).base_layer.register_forward_hook(self._corrected(layer))

    @property
    def layers(self) -> list[str]:
        """The names of the adapted layers, sorted."""
        return list(self._A)

    @property
    def scale_written(self) -> float:
        """alpha / rank, of the rank of the factors that were written last."""
        return self._alpha / len(next(iter(self._A.values())))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that is frozen, by name and in its own dtype: the same on every compute device."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.peft.state_dict().items()):
            if ".lora_" not in name and ".original_module." not in name and file_name(name) not in self._head:
                found.update(f"/{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
                found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def adapters(self) -> Adapters:
        """A copy of the factors, float32."""
        return {layer: Pair(as_numpy(self._A[layer]), as_numpy(self._B[layer])) for layer in self._A}

    def dense(self) -> dict[str, np.ndarray]:
        """A copy of the head's parameters, if it is trained, and of R, where it acts; else nothing."""
        return {name: as_numpy(parameter) for name, parameter in self._beside().items()}

    def write(
        self, factors: Factors | Adapters, dense: Mapping[str, np.ndarray], correction: Mapping[str, Pair] | None = None
    ) -> None:
        """Set the factors, the head, R and the base correction in place.

        A factor or an array of the head that is absent keeps what stood there; R and correction that are absent do not act.
        Factors of another rank than before take their place, with the scale alpha / rank that belongs to it.
        """
        self.mixes = any(messages.rotation(layer) in dense for layer in self._A)
        self.correction = {
            layer: tuple(torch.from_numpy(array).to(self.device) for array in pair)  # type: ignore[misc]
            for layer, pair in (correction or {}).items()
        }
        with torch.no_grad():
            for layer, pair in factors.items():
                parts = pair._asdict() if isinstance(pair, Pair) else pair
                for factor, array in parts.items():
                    put((self._A if factor == "A" else self._B)[layer], array)
                self._adapter(layer).scaling["default"] = self._alpha / len(self._A[layer])
                if (name := messages.rotation(layer)) in dense:
                    put(self._mixed(layer, len(dense[name])), dense[name])
            for name, array in dense.items():
                if name not in self._R:
                    put(self._head[name], array)

    def trainable(self, trains: str) -> list[nn.Parameter]:
        """Makes the named factors ("AB", "A", "B" or none), R where it acts, and the head, if it is trained, require
        gradients, and only those."""
        self.freeze()
        chosen = [p for factor, ps in (("A", self._A), ("B", self._B)) if factor in trains for p in ps.values()]
        chosen += self._beside().values()
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def freeze(self) -> None:
        """No parameter of the model requires a gradient any more."""
        for parameter in (*self._A.values(), *self._B.values(), *self._R.values(), *self._head.values()):
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

    def initial(self, init: str, seed: int, drawn: int = 0, mixes: bool = False) -> Adapters:
        """The factors of round `drawn`: B = 0 and A by `init`, from the stream (seed, adapters, drawn), layer by layer.

        kaiming: uniform in ±1/√n, PEFT's own (rows of norm about 0.577); orthonormal: A Aᵀ = I;
        pissa: √S_r V_rᵀ of W0. With `mixes`, where R is trained between them, B is drawn as A is. Not to be written to.
        Raises ConfigError for orthonormal or pissa with a rank above min(m, n).
        """
        key = (init, seed, drawn, mixes)
        if key not in self._drawn:
            self._drawn = dict([*self._drawn.items()][-3:])
            rng = seeds.stream(seed, "adapters", round=drawn)
            self._drawn[key] = {layer: self._initial(layer, init, rng, mixes) for layer in self._A}
        return self._drawn[key]

    def _initial(self, layer: str, init: str, rng: np.random.Generator, mixes: bool) -> Pair:
        weight = self._adapter(layer).base_layer.weight
        if self._adapter(layer).fan_in_fan_out:  # Conv1D keeps W0 transposed
            weight = weight.T
        rank, (m, n) = self.rank, weight.shape
        if init != "kaiming" and rank > min(m, n):
            raise ConfigError(
                f"adapter.rank={rank} is above {min(m, n)}, the size of {layer}; lower it for strategy.init={init}"
            )
        if init == "pissa":
            _, values, right = np.linalg.svd(as_numpy(weight).astype(np.float64), full_matrices=False)
            A = (np.sqrt(values[:rank])[:, None] * right[:rank]).astype(np.float32)
        else:
            A = lowrank.draw((rank, n), init, rng)
        return Pair(A, lowrank.draw((rank, m), init, rng).T.copy() if mixes else np.zeros((m, rank), np.float32))

    def _beside(self) -> dict[str, nn.Parameter]:
        """What is trained besides the factors, by name."""
        return self._head | (self._R if self.mixes else {})

    def _adapter(self, layer: str) -> Any:
        return self.peft.get_submodule(layer)

    def _mixed(self, layer: str, rank: int) -> nn.Parameter:
        """R of a layer, put between its factors if it is not there yet."""
        name = messages.rotation(layer)
        if name not in self._R:
            linear = nn.Linear(rank, rank, bias=False, device=self.device)
            self._adapter(layer).lora_R = nn.ModuleDict({"default": linear})
            self._adapter(layer).lora_A["default"].register_forward_hook(lambda _, x, y: linear(y) if self.mixes else y)
            self._R[name] = cast(nn.Parameter, linear.weight)
        return self._R[name]

    def _corrected(self, layer: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if layer not in self.correction:
                return output
            A, B = self.correction[layer]
            return output + (self.scale * (inputs[0].to(A.dtype) @ A.T) @ B.T).to(output.dtype)

        return add


def put(parameter: nn.Parameter, array: np.ndarray) -> None:
    """The array into the parameter: in place, or in place of it where the shape is another."""
    if parameter.shape == array.shape:
        parameter.copy_(torch.from_numpy(array))
    else:
        parameter.data = torch.from_numpy(array).to(parameter.device, parameter.dtype, copy=True)


def _in_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a trained layer of the head is given by a base of lower precision."""
    return tuple(x.float() for x in inputs)


def as_numpy(parameter: Tensor) -> np.ndarray:
    """A copy, float32."""
    return np.array(parameter.detach().float().cpu().numpy())
