"""One pass of the frozen base for the examples of many clients, each example with factors of its own.

              ┌── W0 (frozen, shared) ───────────────────┐
    x (N,T,n) ┤                                          ├─→ y (N,T,m)        N examples of any clients, T positions
              └── A[e] ── B[e] ── scale, for example e ──┘

An example's copy of the factors is a leaf of the graph, so that its gradient *is* that example's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.arrays.messages import rotation
from fedlora.compute.dropout import Masks
from fedlora.compute.readout import Readout
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded

Key = tuple[str, str]  # (layer, "A" or "B"), or (name of a dense array, "")


class Span(NamedTuple):
    """The neighbouring rows of one client, and the masks of its own dropout."""

    start: int
    stop: int
    masks: Masks


class Rows:
    """The adapted model, with factors by example; `refusal` says why it cannot be had ("" if it can), tried on `examples`."""

    def __init__(self, model: AdaptedModel, examples: Encoded) -> None:
        self.model = model
        self.factors: Mapping[Key, Tensor] = {}
        self.scale: float | Tensor = model.scale
        self.spans: Sequence[Span] = ()
        self.calls = 0  # of adapters in this pass, whose masks have been drawn
        self._dropouts: list[nn.Module] = []
        self._forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        self.readout = Readout(model, examples)
        self.refusal = self._prepare() or self._try(examples)

    def _prepare(self) -> str:
        from peft.tuners.lora.layer import Linear as LoraLinear

        if self.model.base_dropout:
            return "model.dropout=true draws the dropout of all examples of a pass together"
        for layer in self.model.layers:
            module = self.model.peft.get_submodule(layer)
            if not isinstance(module, LoraLinear) or module.lora_magnitude_vector:
                return f"{layer} has an adapter other than plain LoRA"
            self._forwards[module] = self._adapted(layer, module)
        owners: dict[nn.Module, dict[str, str]] = {}
        for array, owner in self.model.owners.items():
            owners.setdefault(owner, {})[array.rpartition(".")[2]] = array
        for module, arrays in owners.items():
            if type(module) not in (nn.Linear, nn.LayerNorm):
                return f"the head trains a {type(module).__name__}, which has no form by example"
            self._forwards[module] = self._head(module, arrays)
        return ""

    def _try(self, examples: Encoded) -> str:
        """Whether every layer's rows are examples: of a batch of two and of three, since a layer may have as many positions."""
        shared = {(n, f): array for n, pair in self.model.adapters().items() for f, array in pair._asdict().items()}
        shared |= {(name, ""): array for name, array in self.model.dense().items()}
        for count in (2, 3):
            copies = {key: torch.from_numpy(a).to(self.model.device).expand(count, *a.shape) for key, a in shared.items()}
            with self.installed(), torch.no_grad():
                self.give(copies, self.model.scale, ())
                try:
                    self.logits(examples.batch(np.zeros(count, np.int64), self.model.device))
                except ValueError as error:
                    return str(error)
        return ""

    @property
    def drops(self) -> bool:
        """Whether the adapters' dropout acts: `give` then needs the spans."""
        return any(dropout.training and getattr(dropout, "p", 0.0) for dropout in self._dropouts)

    @contextmanager
    def installed(self) -> Iterator[Rows]:
        """While this lasts, the model's layers compute with `factors`, which must have been set."""
        for module, forward in self._forwards.items():
            module.forward = forward
        try:
            with self.readout.installed():
                yield self
        finally:
            for module in self._forwards:
                del module.forward
            self.factors, self.spans = {}, ()

    def give(self, factors: Mapping[Key, Tensor], scale: float | Tensor, spans: Sequence[Span]) -> None:
        """What the next pass computes with.

        Factors (N, r, n) and (N, m, r), an array of the head (N, …), a factor that all examples share without the N; scale a
        number or (N, 1, 1). No spans: no dropout.
        """
        self.factors, self.scale, self.spans, self.calls = factors, scale, spans, 0

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The logits (N, classes) of a batch, its labels left aside, float32."""
        self.readout.batch = inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = self.model.forward(inputs).logits
        return logits.float()

    def _adapted(self, layer: str, module: Any) -> Callable[..., Tensor]:
        dropout = module.lora_dropout["default"]
        share = getattr(dropout, "p", 0.0)
        self._dropouts.append(dropout)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = module.base_layer(x, *args, **kwargs)
            A, B = self.factors[layer, "A"], self.factors[layer, "B"]
            inner = self._by_example(x).to(A.dtype)
            if share and self.spans:
                inner = inner * self._mask(inner, share)
            inner = inner @ A.mT if A.dim() == 2 else torch.bmm(inner, A.mT)
            if (between := (rotation(layer), "")) in self.factors:
                inner = torch.bmm(inner, self.factors[between].mT)
            delta = inner @ B.mT if B.dim() == 2 else torch.bmm(inner, B.mT)
            return (out + self.scale * delta.view(out.shape)).to(out.dtype)

        return forward

    def _head(self, module: nn.Module, arrays: dict[str, str]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            weight = self.factors[arrays["weight"], ""]
            bias = self.factors[arrays["bias"], ""].unsqueeze(1) if "bias" in arrays else 0.0
            inner = self._by_example(x).to(weight.dtype)
            if isinstance(module, nn.LayerNorm):
                normal = nn.functional.layer_norm(inner, module.normalized_shape, eps=module.eps)
                return (normal * weight.unsqueeze(1) + bias).view(x.shape)
            return (torch.bmm(inner, weight.mT) + bias).view(*x.shape[:-1], -1)

        return forward

    def _by_example(self, x: Tensor) -> Tensor:
        """x as (N, T, features). Raises ValueError where the layer's rows are not examples (windowed attention)."""
        examples = next(len(f) for f in self.factors.values() if f.dim() == 3)
        if len(x) != examples:
            raise ValueError(f"a layer sees {len(x)} rows for {examples} examples (windowed attention, positions first)")
        return x.reshape(examples, -1, x.shape[-1])

    def _mask(self, x: Tensor, share: float) -> Tensor:
        """Dropout's mask, each client's part as it would be by itself: 0 or 1/(1 − share)."""
        mask, self.calls = x.new_zeros(x.shape), self.calls + 1
        for start, stop, masks in self.spans:
            masks.fill(mask[start:stop], share, self.calls)
        return mask.div_(1 - share)
