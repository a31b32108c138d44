"""The readout: a classifier reads one position of its last block, so what follows the attention there is needed nowhere else.

    … → block L−1 → attention of block L → output, feed-forward of block L → head
        all T positions                    the one that the head reads

Exact: what other positions would get is never read, neither forward nor back. The gradient of the logits says which position
that is; which layers can do with it alone is tried out. A head that reads more (a mean over positions) leaves all as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedlora.compute.prefix import blocks
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded

Batch = dict[str, Tensor]
Place = Callable[[Batch, Tensor], Tensor]
TOLERANCE = 1e-5  # of the largest entry, for what must be equal but for rounding; at least four roundings


def first(batch: Batch, x: Tensor) -> Tensor:
    """x (N, T, H) at the first position, (N, 1, H): the class token of BERT and ViT."""
    return x[:, :1]


def last(batch: Batch, x: Tensor) -> Tensor:
    """x (N, T, H) at each example's last position, padding left out, (N, 1, H): what GPT and Llama classify by."""
    if "attention_mask" not in batch:
        return x[:, -1:]
    places = batch["attention_mask"].sum(1) - 1
    return x[torch.arange(len(x), device=x.device), places].unsqueeze(1)


def last_but_padding(padding: int, batch: Batch, x: Tensor) -> Tensor:
    """x (N, T, H) at each example's last token that is not `padding`, (N, 1, H): transformers' rule for GPT and Llama.

    Where the padding token is the end token too, it is another position than `last` for a text that ends in that token.
    """
    if "input_ids" not in batch:
        return last(batch, x)
    ids = batch["input_ids"]
    places = (torch.arange(ids.shape[1], device=ids.device) * (ids != padding)).argmax(1)
    return x[torch.arange(len(x), device=x.device), places].unsqueeze(1)


class Readout:
    """The layers of the last block that are given nothing but the position that is read; none where that would not do."""

    def __init__(self, model: AdaptedModel, examples: Encoded) -> None:
        """Tries it on three examples of different lengths."""
        self.model = model
        self.layers: list[nn.Module] = []
        self.asks_alone = False  # whether only the one position asks for the attention, too
        self.block = nn.Module()
        self.place: Place = first
        self.batch: Batch = {}  # the one that a pass is made for
        config = getattr(model.base.model, "config", None)  # a model of somebody's own may have none
        self.padding: int | None = None if config is None else getattr(config.get_text_config(), "pad_token_id", None)
        lengths = examples.lengths()
        order = np.argsort(lengths) if lengths is not None else np.arange(len(examples))
        if len(examples) and len(found := blocks(model)[0]):
            self.block, batch = found[-1], examples.batch(order[[0, len(order) // 2, -1]], model.device)
            model.freeze()
            with torch.no_grad():
                try:
                    self._find(self._hard(batch))
                except Exception:  # a model that takes no such text; T5 and BART want an end token in each
                    self.layers, self.asks_alone = [], False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While this lasts, the layers are given the one position of `batch`, which must have been set."""
        hooks = [layer.register_forward_pre_hook(self._cut) for layer in self.layers]
        usual = self.block.forward
        if self.asks_alone:
            self.block.forward = _within(_OneQuery(), usual)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.batch = {}
            if self.asks_alone:
                del self.block.forward

    def _cut(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.place(self.batch, args[0]), *args[1:]) if args[0].shape[1] > 1 else args

    def _candidates(self) -> list[nn.Module]:
        """Layers that map each position by itself, adapters and all; not where dropout would be drawn for fewer positions."""
        adapted = [self.model.peft.get_submodule(layer) for layer in self.model.layers]
        apart = {part for layer in adapted for part in layer.modules()}
        if not self.model.peft.peft_config["default"].lora_dropout:
            apart -= set(adapted)
        return [module for module in self.block.modules() if _linear(module) and module not in apart]

    def _hard(self, batch: Batch) -> Batch:
        """The batch, with a text beside it that ends in the padding token, by which the rules for the last position differ."""
        if self.padding is None or "input_ids" not in batch:
            return batch
        batch = {name: torch.cat([tensor, tensor[-1:]]) for name, tensor in batch.items()}
        batch["input_ids"][-1, -1] = self.padding  # of the longest, which has no padding of its own
        return batch

    def _find(self, batch: Batch) -> None:
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        made: list[Tensor] = []

        def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append(copy.deepcopy((args, kwargs)))  # a block may add to a cache that it is given

        def watch(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            made.append(_hidden(output).detach().requires_grad_())
            return (made[-1], *output[1:]) if isinstance(output, tuple) else made[-1]

        hooks = [self.block.register_forward_pre_hook(keep, with_kwargs=True), self.block.register_forward_hook(watch)]
        try:
            with torch.enable_grad():
                logits = self.model.forward(batch).logits
                weighed = (logits * torch.arange(1, 1 + logits.shape[1], device=logits.device)).sum()
        finally:
            for hook in hooks:
                hook.remove()
        if len(made) > 1:  # the block is gone through more than once
            return
        (slopes,) = torch.autograd.grad(weighed, made)
        is_read = (slopes != 0).any(2, keepdim=True)  # (N, T, 1)
        positions = torch.arange(is_read.shape[1], device=is_read.device)[:, None].expand_as(is_read)
        rules = (first, last) if self.padding is None else (first, last, partial(last_but_padding, self.padding))
        for self.place in rules:
            if torch.equal(is_read, positions == self.place(batch, positions)):
                break
        else:
            return

        def read() -> Tensor:
            args, kwargs = copy.deepcopy(given[0])
            return self.place(batch, _hidden(self.block(*args, **kwargs)))

        def unchanged() -> bool:
            with self.installed():
                self.batch = batch
                try:
                    return _equal(read(), expected)
                except Exception:  # whatever becomes of positions that do not fit
                    return False

        expected = read()
        for layer in self._candidates():
            self.layers.append(layer)
            if not unchanged():
                self.layers.pop()
        self.asks_alone = self.place is first
        self.asks_alone = self.asks_alone and unchanged()


class _OneQuery(TorchFunctionMode):
    """Attention for the first position alone; the others are given what it gets."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch.overrides."""
        kwargs = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention or kwargs.get("is_causal"):
            return function(*args, **kwargs)
        query, *others = args
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.shape[-2] > 1:
            kwargs = kwargs | {"attn_mask": mask[..., :1, :]}
        return function(query[..., :1, :], *others, **kwargs).expand_as(query)


def _within(mode: TorchFunctionMode, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return call


def _linear(module: nn.Module) -> bool:
    """Whether a module maps each position by itself by a weight: the expensive ones."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _equal(one: Tensor, other: Tensor) -> bool:
    tolerance = max(TOLERANCE, 4 * torch.finfo(other.dtype).eps)
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.0, atol=tolerance * float(other.abs().max()))
