"""Teachers a batch ahead: nothing changes but when. There is no GPU here: the order of streams and
events is checked on stand-ins for torch.cuda's, the results on a CPU."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastagglo.errors import UserError
from fastagglo.features import Features
from fastagglo.train.ahead import Ahead, Targets
from fastagglo.train.checkpoint import load_checkpoint
from fastagglo.train.telemetry import Telemetry

CPU = torch.device("cpu")


@contextmanager
def no_phase(name):
    yield


def batches(log, count=3, fails=None):
    for number in range(count):
        log.append(f"fetch {number}")
        if number == fails:
            raise UserError("no photo")
        yield SimpleNamespace(groups=[number])


def test_one_batch_ahead_and_no_more():
    log = []

    def compute(groups):
        log.append(f"teachers {groups[0]}")
        return Targets([{}], groups[0])

    supply = Ahead(batches(log), compute, no_phase, CPU)
    for number in range(3):
        assert next(supply).groups == [number]
        assert supply.targets().flops == number
        log.append(f"backward {number}")
        supply.prepare()
        supply.prepare()  # once is enough
    want = ["fetch 0", "teachers 0"]
    for number in range(3):
        want.append(f"backward {number}")
        want += [f"fetch {number + 1}", f"teachers {number + 1}"] if number < 2 else []
    assert log == want
    with pytest.raises(StopIteration):
        next(supply)
    with pytest.raises(RuntimeError, match="after next"):
        supply.targets()


def test_an_error_waits_for_its_turn():
    supply = Ahead(batches([], fails=1), lambda groups: Targets([], 0), no_phase, CPU)
    next(supply)
    supply.prepare()
    assert supply.targets().flops == 0
    with pytest.raises(UserError, match="no photo"):
        next(supply)


class Stream:
    """A CUDA stream that writes down what it is asked."""

    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        log.append(f"{self.name} marks")
        return f"mark {len(log)}"

    def wait_event(self, event):
        log.append(f"{self.name} waits for {event}")


class Recorded:
    def __init__(self, what):
        self.what = what

    def record_stream(self, stream):
        log.append(f"{self.what} is read by {stream.name}")


log: list[str] = []


def test_streams_wait_for_one_another(monkeypatch):
    current = [Stream("student's")]

    @contextmanager
    def within(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("teachers'"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", within)

    class Batch(Recorded):
        groups = ()

    def fetch():
        while True:
            log.append(f"fetched on {current[-1].name}")
            yield Batch("batch")

    def compute(groups):
        log.append(f"computed on {current[-1].name}")
        features = Features(Recorded("summary"), Recorded("map"))
        return Targets([{"clip": features, "sam": Features(None, Recorded("sam"))}], 1)

    @contextmanager
    def phase(name):
        assert current[-1].name == "student's"  # shares are of what holds up the student
        yield
        assert current[-1].name == "student's"

    log.clear()
    supply = Ahead(fetch(), compute, phase, torch.device("cuda", 0))
    assert log == ["teachers' waits for student's"]  # for the weights, once
    log.clear()
    supply.prepare()
    assert log == [
        "fetched on teachers'",
        "teachers' marks",
        "computed on teachers'",
        "teachers' marks",
    ]
    log.clear()
    next(supply)
    assert log == ["student's waits for mark 2", "batch is read by student's"]
    log.clear()
    supply.targets()
    assert log == [
        "student's waits for mark 4",
        "summary is read by student's",
        "map is read by student's",
        "sam is read by student's",
    ]


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_is_the_same_bit_for_bit(tiny, differences, cached):
    """With everything that has state or chance in it, micro-steps too."""
    changes = {"stages": [{"steps": 4, "lr": 1e-3, "phi_s_steps": 2, "groups": GROUPS}]}
    states = []
    for ahead in (False, True):
        name = f"ahead{ahead}{cached}"
        change = {"cache": {"folder": str(tiny.folder / name / "c")}} if cached else {}
        data = {"data": {"crops_per_photo": 2}} if cached else {}
        trainer = tiny.trainer(tiny.everything(changes, change, data))
        assert trainer.ahead is False  # on a CPU it is off
        trainer.ahead = ahead
        folder = tiny.folder / f"{name}-run"
        folder.mkdir()
        assert trainer.run(folder)
        states.append((load_checkpoint(folder, CPU), trainer.skips.images))
    (one, images), (other, others) = states
    for state in (one, other):
        state.pop("config")
    assert differences(one, other) == []
    assert images == others


GROUPS = [{"images": 4, "sizes": [32, 64]}, {"images": 2, "sizes": [32]}]


def test_teachers_are_asked_between_backward_and_optimiser(tiny, monkeypatch):
    """Of a CUDA device that is when the backward is queued and nothing has been waited for."""
    trainer = tiny.trainer(tiny.settings({"optimiser": {"accumulate": 2}}))
    trainer.ahead = True
    order = []
    targets, step = trainer._targets, trainer.optimiser.step
    backward = torch.Tensor.backward

    def noted(word, call):
        def run(*arguments, **named):
            order.append(word)
            return call(*arguments, **named)

        return run

    trainer._targets = noted("teachers", targets)
    trainer.optimiser.step = noted("optimiser", step)
    monkeypatch.setattr(torch.Tensor, "backward", noted("backward", backward))
    folder = tiny.folder / "run"
    folder.mkdir()
    assert trainer.run(folder)
    one = ["backward", "teachers", "backward", "teachers", "optimiser"]
    last = ["backward", "teachers", "backward", "optimiser"]
    assert order == ["teachers", *one * 3, *last]


def test_a_stopped_run_has_counted_what_it_has_used(tiny, interrupt):
    """The batch that was fetched ahead is fetched again after a stop."""
    trainer = tiny.trainer(tiny.settings())
    trainer.ahead = True
    interrupt(1)
    folder = tiny.folder / "run"
    folder.mkdir()
    assert not trainer.run(folder)
    assert trainer.step == 2
    assert trainer.skips.images == 2 * 4
    assert isinstance(trainer.telemetry, Telemetry)
