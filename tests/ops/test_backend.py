from __future__ import annotations

import threading

import pytest
import torch

from fastagglo.errors import UserError
from fastagglo.ops.backend import resolve, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
ALL = ("torch", "triton", "xformers")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("FASTAGGLO_BACKEND", raising=False)


def test_device_decides_by_default():
    assert resolve("op", CPU, ALL) == "torch"
    assert resolve("op", CUDA, ALL) == "triton"
    assert resolve("op", CUDA, ("torch", "xformers")) == "torch"
    assert resolve("op", CUDA, ALL, {"triton": "an odd width"}) == "torch"
    assert resolve("op", CUDA, ALL, {"triton": None}) == "triton"
    with use_backend("triton"), pytest.raises(ValueError, match="run this call: an odd width; use"):
        resolve("op", CUDA, ALL, {"triton": "an odd width"})


def test_context_beats_environment_beats_device(monkeypatch):
    monkeypatch.setenv("FASTAGGLO_BACKEND", "xformers")
    assert resolve("op", CUDA, ALL) == "xformers"
    with use_backend("torch"):
        assert resolve("op", CUDA, ALL) == "torch"
    monkeypatch.setenv("FASTAGGLO_BACKEND", "")
    assert resolve("op", CUDA, ALL) == "triton"


def test_contexts_nest_and_are_left_on_errors():
    outer = use_backend("torch")
    with outer:
        with use_backend("xformers"):
            assert resolve("op", CUDA, ALL) == "xformers"
            with outer:  # one object, entered twice
                assert resolve("op", CUDA, ALL) == "torch"
            assert resolve("op", CUDA, ALL) == "xformers"
        assert resolve("op", CUDA, ALL) == "torch"
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert resolve("op", CUDA, ALL) == "triton"


def test_threads_choose_for_themselves():
    seen = {}
    inside, leave = threading.Event(), threading.Event()

    def other():
        seen["before"] = resolve("op", CUDA, ALL)
        with use_backend("xformers"):
            inside.set()
            leave.wait(10)
            seen["during"] = resolve("op", CUDA, ALL)

    with use_backend("torch"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        seen["here"] = resolve("op", CUDA, ALL)
        leave.set()
        thread.join()
    assert seen == {"before": "triton", "during": "xformers", "here": "torch"}


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"no backend 'cuda'.*'torch', 'triton', 'xformers'"):
        use_backend("cuda")
    with pytest.raises(TypeError, match="got None"):
        use_backend(None)
    monkeypatch.setenv("FASTAGGLO_BACKEND", "tritn")
    with pytest.raises(UserError, match=r"FASTAGGLO_BACKEND=tritn.*'triton'"):
        resolve("op", CPU, ALL)


def test_a_request_never_falls_back(monkeypatch):
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"my_op has no backend 'triton'.*it has 'torch'$"):
            resolve("my_op", CUDA, ("torch",))
        with pytest.raises(ValueError, match=r"runs on cuda tensors, got tensors on cpu"):
            resolve("my_op", CPU, ALL)
    monkeypatch.setenv("FASTAGGLO_BACKEND", "xformers")
    with pytest.raises(ValueError, match=r"asked for by FASTAGGLO_BACKEND=xformers"):
        resolve("my_op", CUDA, ("torch", "triton"))
