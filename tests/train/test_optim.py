"""Parameter groups of the optimisers, their rates, and what a thawed trunk starts from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastagglo.distill import make_balancer
from fastagglo.model import HeadSpec, create_student
from fastagglo.train.config import OptimiserSettings
from fastagglo.train.optim import build_optimiser, forget, set_learning_rate

HEADS = {
    "a": HeadSpec(summary=6, spatial=8, blocks=1, pre_norm=True),
    "b": HeadSpec(spatial=4, spatial_blocks=1),
}


def student(depth: int = 3):
    return create_student(
        "tiny", heads=HEADS, depth=depth, registers=2, max_resolution=64, layer_scale=1e-5
    )


def placed(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict]:
    """The group of each parameter, by name; each is in exactly one."""
    groups = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimiser.param_groups)
    return {name: groups[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_matrices_are_decayed_and_nothing_else(name):
    model = student()
    optimiser = build_optimiser(
        model, make_balancer("fixed", ["a", "b"]), OptimiserSettings(name=name, weight_decay=0.3)
    )
    found = {n: group["weight_decay"] for n, group in placed(model, optimiser).items()}
    assert set(found.values()) == {0.0, 0.3}
    # Told apart by module here, by name and shape in the student.
    matrices = {
        f"{prefix}.weight" for prefix, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    assert {n for n, decay in found.items() if decay} == matrices
    for spared in ("positions.table", "registers", "cls_tokens.a", "norm.weight", "norm.bias"):
        assert found[spared] == 0.0
    for part in ("norm1.weight", "attn.qkv.bias", "ls1.gamma"):
        assert found[f"blocks.0.{part}"] == 0.0
    assert found["patch_embed.weight"] == 0.3


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_layer_decay_scales_the_rate_from_the_top_down(name):
    model = student(depth=3)
    settings = OptimiserSettings(name=name, layer_decay=0.5)
    optimiser = build_optimiser(model, make_balancer("uncertainty", ["a", "b"]), settings)
    set_learning_rate(optimiser, 0.8)
    rates = {n: group["lr"] for n, group in placed(model, optimiser).items()}
    # Embeddings, three blocks, and the heads with the final norm: five levels, halved at each.
    for prefix, rate in (
        ("patch_embed.", 0.05),
        ("positions.", 0.05),
        ("registers", 0.05),
        ("cls_tokens.", 0.05),
        ("blocks.0.", 0.1),
        ("blocks.1.", 0.2),
        ("blocks.2.", 0.4),
        ("norm.", 0.8),
        ("heads.", 0.8),
        ("head_blocks.", 0.8),
    ):
        found = [r for n, r in rates.items() if n.startswith(prefix)]
        assert found, prefix
        assert found == pytest.approx([rate] * len(found))


def test_without_layer_decay_all_have_one_rate():
    model = student()
    optimiser = build_optimiser(model, make_balancer("fixed", ["a", "b"]), OptimiserSettings())
    for rate in (0.1, 1e-4):
        set_learning_rate(optimiser, rate)
        assert {group["lr"] for group in optimiser.param_groups} == {rate}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_learned_loss_weights_take_part_undecayed_at_the_full_rate(name):
    model, balancer = student(), make_balancer("uncertainty", ["a", "b"])
    settings = OptimiserSettings(name=name, weight_decay=0.3, layer_decay=0.5)
    optimiser = build_optimiser(model, balancer, settings)
    set_learning_rate(optimiser, 0.8)
    (group,) = placed(balancer, optimiser).values()
    assert (group["weight_decay"], group["lr"]) == (0.0, 0.8)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_kind_and_betas_are_those_of_the_settings(name):
    settings = OptimiserSettings(name=name, betas=(0.8, 0.95))
    optimiser = build_optimiser(student(), make_balancer("fixed", ["a", "b"]), settings)
    assert type(optimiser).__name__ == {"adamw": "AdamW", "lamb": "Lamb"}[name]
    assert all(tuple(group["betas"]) == (0.8, 0.95) for group in optimiser.param_groups)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_one_step_against_the_papers(name):
    """AdamW (arXiv 1711.05101) and LAMB (arXiv 1904.00962), first step, by hand."""
    model, rate, decay = student(), 0.01, 0.3
    settings = OptimiserSettings(name=name, weight_decay=decay, betas=(0.9, 0.999))
    optimiser = build_optimiser(model, make_balancer("fixed", ["a", "b"]), settings)
    set_learning_rate(optimiser, rate)
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimiser.step()
    for n, parameter in model.named_parameters():
        weight, gradient = before[n], parameter.grad.double()
        # On the first step both averages are the gradient's own, once corrected.
        update = gradient / (gradient.abs() + (1e-8 if name == "adamw" else 1e-6))
        if n in model.no_weight_decay():
            expected = weight - rate * update
        elif name == "adamw":
            expected = weight * (1 - rate * decay) - rate * update
        else:
            update = update + decay * weight
            expected = weight - rate * weight.norm() / update.norm() * update
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_thawed_trunk_takes_the_first_steps_of_a_new_run(name):
    """While the trunk is frozen the optimiser's clock must not run for it.

    Averages that begin at zero are corrected by their number of steps: with the clock of the heads
    a thawed parameter would move by 0.1 / sqrt(0.001) = 3.2 times the rate, later by more.
    """
    model, rate = student(), 0.01
    optimiser = build_optimiser(
        model, make_balancer("fixed", ["a", "b"]), OptimiserSettings(name=name)
    )
    set_learning_rate(optimiser, rate)
    for step in range(30):
        for n, parameter in model.named_parameters():
            frozen = not n.startswith(("heads.", "head_blocks."))
            parameter.requires_grad_(not frozen)
            parameter.grad = None if frozen else torch.ones_like(parameter) * (1 + step % 2)
        optimiser.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    for n in ("norm.bias", "registers", "blocks.0.attn.qkv.bias", "positions.table"):
        change = before[n] - dict(model.named_parameters())[n].detach()
        torch.testing.assert_close(change, torch.full_like(change, rate), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_layer_that_was_rotated_starts_afresh_and_the_others_go_on(name):
    model, rate = student(), 0.01
    optimiser = build_optimiser(
        model, make_balancer("fixed", ["a", "b"]), OptimiserSettings(name=name, weight_decay=0.0)
    )
    set_learning_rate(optimiser, rate)

    def step(value: float) -> dict[str, torch.Tensor]:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimiser.step()
        return {n: before[n] - p.detach() for n, p in model.named_parameters()}

    for _ in range(30):
        step(1.0)
    for layer in model.heads.spatial.values():
        forget(optimiser, layer)
    change = step(-1.0)
    # Without memory the new gradient alone decides; with memory the old ones still do.
    for n, moved in change.items():
        if n.startswith("heads.spatial."):
            torch.testing.assert_close(moved, torch.full_like(moved, -rate), rtol=1e-3, atol=1e-5)
        else:
            assert (moved > 0).all(), n
