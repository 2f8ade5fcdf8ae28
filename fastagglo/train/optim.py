"""Optimisers from libraries, with the parameter groups that vision transformers want."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from fastagglo.errors import require
from fastagglo.model import Student
from fastagglo.train.config import OptimiserSettings


def build_optimiser(student: Student, extra: nn.Module, settings: OptimiserSettings) -> Optimizer:
    """AdamW (torch) or LAMB (timm; arXiv 1904.00962) over the student and what learns beside it.

    Norms, biases, tokens and positions are not decayed. With ``layer_decay`` below 1 the rate of
    block ``i`` of ``depth`` is multiplied by ``layer_decay ** (depth + 1 - i)`` (BEiT,
    arXiv 2106.08254); heads keep the full rate.

    Args:
        student: all its parameters take part, frozen ones too (a stage may free them later).
        extra: further parameters, never decayed (learned loss weights).
        settings: kind, decay and betas. The learning rate is set by `set_learning_rate`.
    """
    undecayed = student.no_weight_decay()
    layers = student.layer_ids()
    top = max(layers.values())
    trunk = {id(parameter) for parameter in student.trunk_parameters()}
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        decay = 0.0 if name in undecayed else settings.weight_decay
        scale = settings.layer_decay ** (top - layers[name])
        # What may begin to learn at a time of its own has its own group: the trunk is thawed, and
        # each spatial head starts afresh when it is rotated (see `forget`).
        start = ".".join(name.split(".")[:3]) if name.startswith("heads.spatial.") else "heads"
        start = "trunk" if id(parameter) in trunk else start
        groups.setdefault((decay, scale, start), []).append(parameter)
    if others := list(extra.parameters()):
        groups.setdefault((0.0, 1.0, "heads"), []).extend(others)
    parameter_groups = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale, _), parameters in groups.items()
    ]
    if settings.name == "lamb":
        timm_optim = require("timm.optim", extra="train", purpose="the LAMB optimiser")
        # Clipping happens in the loop for every optimiser alike, so LAMB's own is off.
        lamb = timm_optim.Lamb(parameter_groups, lr=1.0, betas=settings.betas, max_grad_norm=None)
        lamb.register_step_pre_hook(_start_clocks)
        return lamb
    fused = all(p.device.type in ("cpu", "cuda") for g in parameter_groups for p in g["params"])
    return torch.optim.AdamW(parameter_groups, lr=1.0, betas=settings.betas, fused=fused)


def set_learning_rate(optimiser: Optimizer, rate: float) -> None:
    """Give each group its share of the step's learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_scale"]


def forget(optimiser: Optimizer, module: nn.Module) -> None:
    """Drop the optimiser's running averages of a module whose basis has just been changed."""
    for parameter in module.parameters():
        optimiser.state.pop(parameter, None)


def _start_clocks(optimiser: Optimizer, *_: object) -> None:
    """Let the step count of a group begin with its averages.

    timm's LAMB counts steps per group, frozen ones too. Averages that begin at zero need the bias
    correction of a first step; without it undecayed parameters would move by up to 6.6 times the
    learning rate when they are thawed (at the default betas, after 12 steps).
    """
    for group in optimiser.param_groups:
        if not any(parameter in optimiser.state for parameter in group["params"]):
            group.pop("step", None)
