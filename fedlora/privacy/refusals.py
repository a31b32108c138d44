"""What Opacus cannot train, or train under, with exact per-example gradients: module by module."""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from peft.tuners.lora import LoraLayer
from torch import nn


def unsupported(module: nn.Module) -> str:
    """Why this one module cannot be trained, or trained under, with per-example gradients; "" if it can."""
    if isinstance(module, LoraLayer):
        base: Any = module.get_base_layer()
        if module.lora_magnitude_vector:
            return "has a DoRA adapter, whose magnitude has no per-example gradient; use plain LoRA"
        if module.lora_embedding_A or not (isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"):
            return "is no linear layer, and adapters elsewhere have no exact gradients; change adapter.target_modules"
    if isinstance(module, nn.LayerNorm) and trained(module) and module.bias is None:
        return "is a LayerNorm without bias, for which Opacus has no per-example gradient; freeze it (adapter.train_head=false)"
    if trained(module) and type(module) not in GradSampleHooks.GRAD_SAMPLERS:
        known = ", ".join(sorted(kind.__name__ for kind in GradSampleHooks.GRAD_SAMPLERS if kind.__module__[:5] == "torch"))
        return f"is trained, and has exact per-example gradients only as {known}; freeze it (adapter.train_head=false)"
    if any(parameter.dtype != torch.float32 for parameter in module.parameters(recurse=False) if parameter.requires_grad):
        return "holds trained parameters that are not float32, too coarse to clip and add noise to; load them as float32"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        return "normalises over the batch, so that records share a gradient; use a model with LayerNorm or GroupNorm"
    if getattr(module, "gradient_checkpointing", False):
        keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if keywords.get("use_reentrant") is not True:
            return "has gradient checkpointing with use_reentrant=False, which Opacus' hooks do not survive; switch it off"
    return ""


def trained(module: nn.Module) -> bool:
    """Whether the module has trained parameters of its own, apart from its children's."""
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))
