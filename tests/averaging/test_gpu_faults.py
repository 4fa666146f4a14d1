"""What was found by reading for a GPU, asked of a CPU: a device behind the host, alignment, memory, graphs."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deslo_plugin
from deslo_plugin import ConfigError, DesLoc
from deslo_plugin.averaging import instants, synchronizer
from deslo_plugin.averaging.synchronizer import Synchronizer
from deslo_plugin.comm.buckets import pack
from deslo_plugin.comm.topology import contiguous
from deslo_plugin.comm.transport import FixedMembership
from deslo_plugin.config.load import load_config
from deslo_plugin.frameworks import rehearsal
from deslo_plugin.planning.plan import make_plan
from tests.support.device import cpu_only

CUDA = torch.device("cuda", 0)
PERIODS = {"params": 2, "exp_avg": 2, "exp_avg_sq": 2}


class Clock:
    """The time of a host, and of a stream whose work it queues without waiting."""

    def __init__(self):
        self.host = self.stream = 0.0

    def compute(self, seconds):
        """Queues a kernel."""
        self.stream = max(self.stream, self.host) + seconds

    def event(self, enable_timing=False):
        return Event(self)


class Event:
    def __init__(self, clock):
        self._clock = clock

    def record(self, stream=None):
        self.at = max(self._clock.stream, self._clock.host)

    def synchronize(self):
        self._clock.host = max(self._clock.host, self.at)

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Travel(FixedMembership):
    """A transport whose averages take ``seconds`` on a stream of their own, behind what the device computes before.
    The host polls for their end, as for NCCL's, and the device's stream waits for it."""

    divisor, progress = 1, None

    def __init__(self, clock, seconds, on_gpu=True):
        self.clock, self.seconds, self.on_gpu = clock, seconds, on_gpu

    def start(self, chunk):
        begin = max(self.clock.host, self.clock.stream if self.on_gpu else 0.0)
        return SimpleNamespace(wait=lambda: self._wait(begin + self.seconds))

    def _wait(self, end):
        self.clock.host = max(self.clock.host, end)
        self.clock.stream = max(self.clock.stream, end)

    def any(self, flag):
        return flag

    def total(self, value):
        return value


def metered(clock, transport):
    events = []
    wire = Synchronizer(transport, wire_dtype=torch.float32, bucket_bytes=1 << 20, on_average=events.append)
    return wire, events


@pytest.fixture
def gpu(monkeypatch):
    """A clock that ``instants`` takes for a GPU's, whatever the device of tensors."""
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(synchronizer, "now", lambda device: instants.now(CUDA))
    return clock


def flown(wire, clock, while_it_flies):
    """Launches two states after step 3, and lands them after ``while_it_flies(clock)``."""
    x, u = torch.nn.Parameter(torch.ones(5)), torch.ones(5)
    with torch.no_grad():
        states = {"params": [x], "exp_avg": [u]}
        seats = {state: [(wire.start(3, state, [x], tensors), 0)] for state, tensors in states.items()}
        while_it_flies(clock)
        wire.land(3, seats, states)


@pytest.mark.parametrize("queued, travel", [(100, 130), (100, 60), (0, 40), (3, 3)])
def test_the_meter_counts_waiting_and_not_what_the_host_ran_ahead_of(gpu, queued, travel):
    """The host arrives at the landing with ``queued`` seconds of computation behind it in the queue."""
    wire, events = metered(gpu, Travel(gpu, travel))
    gpu.compute(7)  # the step before, which the average begins after
    flown(wire, gpu, lambda clock: clock.compute(queued))
    (event,) = events
    assert event.seconds_exposed == pytest.approx(max(0, travel - queued))
    assert event.seconds_in_flight == pytest.approx(dict.fromkeys(("params", "exp_avg"), max(travel, queued)))


def test_the_mean_of_a_warm_up_is_metered_without_the_backward_before_it(gpu):
    wire, events = metered(gpu, Travel(gpu, 4))
    gpu.compute(1000)
    wire.mean(1, {"gradients": [torch.ones(3)]})
    assert events[0].seconds_exposed == pytest.approx(4)


@pytest.mark.parametrize("ahead, travel", [(0.0, 2.0), (1.5, 2.0), (5.0, 2.0)])
def test_on_a_cpu_the_meter_is_the_gate(monkeypatch, ahead, travel):
    clock = Clock()
    monkeypatch.setattr(instants.time, "perf_counter", lambda: clock.host)
    wire, events = metered(clock, Travel(clock, travel, on_gpu=False))

    def compute(clock):
        clock.host += ahead

    flown(wire, clock, compute)
    assert events[0].seconds_exposed == pytest.approx(max(0.0, travel - ahead), rel=0.05)
    assert events[0].seconds_in_flight["params"] == pytest.approx(max(travel, ahead), rel=0.05)


SIZES = st.lists(st.integers(0, 41), min_size=1, max_size=12).filter(any)


@cpu_only("views of a buffer that torch aligns")
@pytest.mark.parametrize("wire", [torch.float32, torch.float64])
@settings(derandomize=True, deadline=None, max_examples=80)
@given(SIZES, st.integers(1, 5), st.integers(16, 400))
def test_what_can_be_aligned_in_a_bucket_is(wire, sizes, divisor, chunk_bytes):
    start = itertools.accumulate([0, *sizes])
    tensors = [torch.arange(size, dtype=wire) + at + 1 for size, at in zip(sizes, start)]
    bucket = pack(tensors, wire, chunk_bytes, divisor)
    for tensor, view in zip(tensors, bucket.views):
        assert view.shape == tensor.shape and torch.equal(view, tensor)
        if tensor.numel() % 4 == 0:
            assert view.data_ptr() % 16 == 0
    assert all(chunk.numel() % divisor == 0 for chunk in bucket.chunks)
    sent = torch.cat(bucket.chunks)
    total = sum(sizes)
    assert len(sent) - total < divisor and not sent[total:].any()
    assert sorted(sent[:total].tolist()) == [float(i + 1) for i in range(total)]  # each element travels once
    for chunk in bucket.chunks:
        chunk.mul_(2)
    assert all(torch.equal(view, 2 * tensor) for tensor, view in zip(tensors, bucket.views))


@pytest.fixture
def capturing():
    with (
        mock.patch.object(torch.cuda, "is_initialized", lambda: True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        yield


@pytest.mark.parametrize("kind", ["DesLoc", "AdamW"])
def test_a_step_inside_of_a_cuda_graph_is_refused_before_anything_changes(kind, request):
    model = torch.nn.Linear(3, 2)
    if kind == "DesLoc":
        optimizer, config = DesLoc(model.parameters(), lr=0.1, sync_every=PERIODS), None
    else:
        optimizer, config = torch.optim.AdamW(model.parameters(), lr=0.1), {"deslo": {"sync_every": PERIODS}}
    attachment = deslo_plugin.attach(model, optimizer, config)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    of = lambda: (
        [p.detach().clone() for p in model.parameters()]
        + [value.clone() for p in model.parameters() for value in optimizer.state[p].values()]
    )
    before, asked = of(), []
    request.getfixturevalue("capturing")
    for step in (optimizer.step, lambda: optimizer.step(lambda: asked.append(1) or torch.ones(()))):
        with pytest.raises(ConfigError, match=rf"{kind}\.step: expected a call outside of CUDA graphs"):
            step()
    assert not asked and attachment.steps == 2
    assert all(torch.equal(a, b) for a, b in zip(before, of()))


def small_attachment(**deslo):
    block = {"lr": 1e-3, "sync_every": {"params": 4, "exp_avg": 8, "exp_avg_sq": None}}
    config = load_config({"optimizer": {"params": block}, "deslo": {"replica_size": 2, **deslo}})
    plan = make_plan(config, [1000, 10], [config.optimizer.periods] * 2, contiguous(4, 0, 2), divisor=2)
    return SimpleNamespace(plan=plan)


@cpu_only("a GPU without memory left")
@pytest.mark.parametrize("delay", [1, 3])
def test_the_memory_of_all_flights_is_taken_at_the_start_and_missing_memory_is_said(monkeypatch, delay):
    attachment, taken = small_attachment(sync_delay=delay), []
    monkeypatch.setattr(torch, "empty", lambda size, **_: taken.append(size))
    rehearsal.reserve(attachment, CUDA)
    assert sum(taken) == attachment.plan.flight_bytes > 0

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1234, 98765))
    with pytest.raises(ConfigError) as error:
        rehearsal.reserve(attachment, CUDA)
    said = str(error.value)
    assert f"{attachment.plan.flight_bytes:,} bytes on cuda:0" in said and "got 1,234 free of 98,765" in said
