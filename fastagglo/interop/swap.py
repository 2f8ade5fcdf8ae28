"""A module that computes another way and stays what it is: by a subclass of its own class.

Parameters, buffers, hooks, names and the module object itself stay. ``copy.deepcopy`` and pickle
keep the swap; a pickle needs fastagglo where it is loaded, a state dict does not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Swapped:
    """In front of another class: overrides its ``forward``, and falls back to it with ``super()``.

    Attributes:
        fastagglo_replaces: the class that the module had.
        fastagglo_mixin: the class that overrides it.
    """

    fastagglo_replaces: type[nn.Module]
    fastagglo_mixin: type[Swapped]

    @classmethod
    def fastagglo_constants(cls, original: type[nn.Module]) -> dict[str, Any]:
        """What else the class that replaces ``original`` should hold."""
        return {}

    def fastagglo_leave(self) -> None:
        """Take back what a swap has put into the module beside its class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *rest = super().__reduce_ex__(max(int(protocol), 2))
        return _remake, (self.fastagglo_mixin, self.fastagglo_replaces), *rest


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Give a module the mixin's ``forward``; one that has it stays."""
    if not isinstance(module, Swapped):
        module.__class__ = _class(mixin, type(module))


def restore(module: nn.Module) -> None:
    """Give a swapped module its own class back."""
    module.fastagglo_leave()
    module.__class__ = module.fastagglo_replaces


@cache
def _class(mixin: type[Swapped], original: type[nn.Module]) -> type[nn.Module]:
    content = {
        "__module__": __name__,
        "fastagglo_replaces": original,
        "fastagglo_mixin": mixin,
        **mixin.fastagglo_constants(original),
    }
    # Its name stays: other libraries look for layers by the name of their class.
    return type(original.__name__, (mixin, original), content)


def _remake(mixin: type[Swapped], original: type[nn.Module]) -> nn.Module:
    cls = _class(mixin, original)
    return cls.__new__(cls)


def qualified(module: nn.Module) -> str:
    """Where a module's own class is defined, and its name."""
    cls = type(module)
    cls = getattr(cls, "fastagglo_replaces", cls)
    return f"{cls.__module__}.{cls.__qualname__}"


def plain(linear: nn.Module) -> bool:
    """Whether a layer is a Linear whose weight can be read in its place: no hook, no adapter."""
    return type(linear) in _LINEAR and not watched(linear)


def watched(module: nn.Module) -> bool:
    """Whether others take part in a module's call: by hooks, or a forward of the object's own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
