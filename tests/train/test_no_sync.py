"""Nothing in a step waits for the device, so that it can be compiled and captured.

The step of a real trainer runs on the device "meta", whose tensors hold no numbers: whatever needs
one on the host, `item()`, `nonzero()`, `cpu()`, an `if` on a tensor, has nothing to read. What lies
behind each of our operators is the code that a GPU would run, up to the launch of each kernel.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from fastagglo.distill import make_ema
from fastagglo.features import Features
from fastagglo.kernels.stub import stub_device
from fastagglo.model import PackedBatch, create_student
from fastagglo.model.vit import Block
from fastagglo.ops import attention, loss, mlp
from fastagglo.train import Trainer
from fastagglo.train.optim import build_optimiser
from fastagglo.train.targets import teacher_features
from fastagglo.train.verdict import Verdict

# Of a device that is there: what all devices share, while "meta" has the fake.
BEHIND = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
META = torch.device("meta")
# Their results have as many rows as there are numbers of a kind, which the host has to know.
COUNTING = ("nonzero", "masked_select", "unique", "_unique2", "bincount", "_local_scalar_dense")


class Waits(AssertionError):
    """The host needs a number that is on the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses operators that wait, and looks inside of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        on_device = [x for x in leaves if isinstance(x, torch.Tensor) and x.device == META]
        if on_device and (name in COUNTING or (name.startswith("index") and _masked(args))):
            raise Waits(f"{func} in the step")
        self.seen.add(name)
        if func.namespace == "fastagglo" and on_device:
            with self:
                return func.redispatch(BEHIND, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        found = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        if name == "_to_copy" and on_device and any(x.device != META for x in found):
            raise Waits(f"{func} from the device in the step")
        return result


def _masked(args: Any) -> bool:
    """Whether rows are chosen by a mask, whose ones have to be counted."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As on a GPU of generation 9.0, but kernels are noted and not launched."""
    names: list[str] = []

    def run(self: Any, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        names.append(self.__name__)

    def chosen(op: str, device: torch.device, available: Any, unable: Any = None) -> str:
        reason = (unable or {}).get("triton")
        assert not reason, reason
        return "triton"

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    for module in (attention, loss, mlp):
        monkeypatch.setattr(module, "resolve", chosen)
    # "meta" knows no autocast; casts do not wait.
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())
    with stub_device("sm_90"):
        yield names


def settings(tiny: Any, *changes: dict) -> dict:
    """Every kind of loss and balance that a step knows."""
    return tiny.everything(
        {
            "student": {"checkpoint_blocks": True},
            "teachers": {
                "lite2": {
                    "model": "efficientnet-lite2",
                    "layer": "stride8",
                    "spatial_loss": "cosine_smooth_l1",
                    "head": {"upsample": 2, "spatial_blocks": 1, "blocks": 1, "pre_norm": True},
                }
            },
        },
        *changes,
    )


def on_meta(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.to(META) if isinstance(x, torch.Tensor) else x, value
    )


def meta_trainer(tiny: Any, config: dict, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer after the fit of its statistics, with all its tensors on "meta"."""
    trainer = tiny.trainer(config)
    for basis in trainer.distiller.bases.values():
        basis.ready = basis.settled = True
    student = trainer.distiller.to(META).student
    trainer.ema = make_ema(student, 0.9)
    trainer.ema.n_averaged = trainer.ema.n_averaged.to("cpu").zero_()
    trainer.optimiser = build_optimiser(
        student, trainer.distiller.balancer, trainer.config.optimiser
    )
    monkeypatch.setattr(trainer, "device", META)
    return trainer


@dataclass
class Quiet:
    """Telemetry that keeps what it is told."""

    told: list[dict] = field(default_factory=list)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def event(self, kind: str, **fields: object) -> None:
        """Nothing."""

    def step(self, step: int, losses: dict, **fields: object) -> None:
        self.told.append({"losses": losses, **fields})


def guarded_step(
    trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[NoWaiting, dict]:
    """One step of the loop, from the batch to the weights, but for reading the verdict."""
    config, reads = trainer.config, []
    accumulate = config.optimiser.accumulate
    batches = [trainer.stream[step * accumulate + micro] for micro in range(accumulate)]
    # Teachers are others' code.
    features = []
    for batch in batches:
        targets = teacher_features(trainer.teachers, batch.groups, config.teachers)
        features.append(
            [
                {n: Features(on_meta(f.summary), on_meta(f.spatial)) for n, f in group.items()}
                for group in targets
            ]
        )
    given = iter(features)
    monkeypatch.setattr(trainer, "_targets", lambda groups: next(given))

    def read(self: Verdict, *, stop: bool) -> tuple[str, bool]:
        reads.append(self._fine.device)
        return "", False

    monkeypatch.setattr(Verdict, "read", read)
    trainer.telemetry, trainer.step = Quiet(), step
    guard = NoWaiting()
    with guard:
        trainer._one_step(batch.to(META) for batch in batches)
    assert reads == [META]
    (told,) = trainer.telemetry.told
    return guard, told


@pytest.mark.parametrize("tokens", [0, 300])
def test_a_step(
    tiny: Any, launches: list[str], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny)
    for stage in config["stages"]:
        stage["tokens"] = tokens
    trainer, windows, seen = meta_trainer(tiny, config, monkeypatch), set(), set()
    for step in (2, 3):
        windows.add(trainer.planner(2 * step).window)
        guard, told = guarded_step(trainer, step, monkeypatch)
        seen |= guard.seen
        assert all(x.device == META for x in (*told["losses"].values(), told["grad_norm"]))
        assert all(p.grad is not None for p in trainer.distiller.parameters())
    assert windows == {None, 2}
    # All that a GPU would run was looked at: our operators, kernel by kernel, and torch's own.
    assert {"packed_attention_fwd", "packed_attention_bwd", "multi_teacher_loss_fwd"} <= seen
    assert {"shared_linear_bwd", "norm_gelu_linear_bwd", "embedding_bag"} & seen
    assert {"forward_kernel", "dq_kernel", "dkv_kernel", "compare_kernel"} <= set(launches)


SPOILERS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.detach().tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "numpy": lambda x: x.detach().numpy(),
    "if": lambda x: 1 if (x > 0).any() else 0,
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones_like(x[:, 0]).long(), dim=0),
    "equal": lambda x: torch.equal(x, x),
}


REFUSED = "in the step|meta tensor|meta device|Meta tensors|data-in"


@pytest.mark.parametrize("place", ["block", "attention's launch"])
@pytest.mark.parametrize("how", SPOILERS)
def test_the_guard_sees_what_waits(
    launches: list[str], monkeypatch: pytest.MonkeyPatch, how: str, place: str
) -> None:
    spoil = SPOILERS[how]
    student = create_student("tiny", depth=1, max_resolution=64).to(META)
    batch = PackedBatch.from_images([torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=META)])
    with NoWaiting():
        student(batch)  # as it should be
    if place == "block":
        forward = Block.forward

        def block(self: Block, x: torch.Tensor, *args: Any) -> torch.Tensor:
            spoil(x)
            return forward(self, x, *args)

        monkeypatch.setattr(Block, "forward", block)
    else:
        launch = attention.kernel.forward

        def kernel(q: torch.Tensor, *args: Any) -> Any:
            spoil(q.flatten(1))
            return launch(q, *args)

        monkeypatch.setattr(attention.kernel, "forward", kernel)
    with NoWaiting(), pytest.raises((Waits, RuntimeError, TypeError), match=REFUSED):
        student(batch)


# What launches the kernels, on a GPU: also roads that no recipe above takes.
ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(
    {
        *(p for p in (ROOT / "kernels").glob("*.py") if "@triton.jit" in p.read_text()),
        *(ROOT / "fastagglo/ops").glob("*_triton.py"),
        *(ROOT / f"fastagglo/ops/{n}.py" for n in ("attention", "autocast", "mlp", "mlp_library")),
        *(ROOT / f"fastagglo/ops/{n}.py" for n in ("mlp_grouped", "head_mlp", "heads")),
        *(ROOT / f"fastagglo/model/{n}.py" for n in ("vit", "student", "positions")),
        *(ROOT / f"kernels/{n}.py" for n in ("attention", "loss", "merge", "mlp", "tiles")),
    }
)
READING = {"item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique"}
READING |= {"synchronize", "is_nonzero", "bincount", "equal", "allclose"}
# A number that is on the CPU already.
ALLOWED = {("loss_triton.py", "item")}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_nothing_is_read_back_around_a_launch(path: Path) -> None:
    found = {
        (path.name, node.attr)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in READING
    }
    assert found <= ALLOWED
