"""The way of a chunk through host memory: what waits for what, whose memory is used again when, and whose errors are
whose. The device is one that does everything as late as it may."""

import threading

import pytest
import torch

from deslo_plugin.comm.courier import Parcel
from deslo_plugin.comm.staging import CopyStaging, HostBuffers
from tests.support.fake_cuda import FakeCuda, FakeStaging, Stream


class Doubling:
    """A gloo whose mean is twice what it is given; it holds what it got."""

    def __init__(self):
        self.got = []

    def allreduce(self, tensors, options):
        (tensor,) = tensors
        self.got.append(tensor.clone())
        tensor.mul_(2)
        return self

    def is_completed(self):
        return True

    def wait(self):
        pass


def send(staging, chunk, gloo=None):
    """A parcel that its courier, another thread, has handed over."""
    parcel = Parcel(staging, chunk)
    courier = threading.Thread(target=parcel.hand_over, args=(gloo or Doubling(),), daemon=True)
    courier.start()
    courier.join(60)
    return parcel


@pytest.fixture
def cuda():
    return FakeCuda()


def pack(cuda, value, size=5):
    """A chunk that a kernel on the current stream is going to fill."""
    chunk = torch.zeros(size)
    cuda.current_stream().push(lambda: chunk.fill_(value))
    return chunk


def test_gloo_gets_what_the_stream_packs_and_the_stream_gets_the_mean(cuda):
    staging, gloo = FakeStaging(cuda), Doubling()
    chunk = pack(cuda, 3.0)
    parcel = send(staging, chunk, gloo)
    assert torch.equal(gloo.got[0], torch.full((5,), 3.0))
    assert parcel.is_completed()
    parcel.wait()
    seen = torch.zeros(5)
    cuda.current_stream().push(lambda: seen.copy_(chunk))  # as the landing does
    cuda.synchronize()
    assert torch.equal(seen, torch.full((5,), 6.0))


def rounds(staging, cuda, streams):
    """Chunks of one size one after the other, each landing on another of ``streams`` and read much later."""
    seen = []
    for index, stream in enumerate(streams):
        with cuda.stream(stream):
            chunk = pack(cuda, float(index))
        with cuda.stream(streams[index - 1]):  # where this average lands
            launched_on = stream
            with cuda.stream(launched_on):
                parcel = send(staging, chunk)
            parcel.wait()
            seen.append(chunk)
    for stream in streams:
        stream.synchronize()
    return [float(chunk[0]) for chunk in seen]


def test_a_buffer_is_not_written_again_before_its_mean_is_on_the_device(cuda):
    staging = FakeStaging(cuda)
    assert rounds(staging, cuda, [Stream() for _ in range(4)]) == [0.0, 2.0, 4.0, 6.0]
    assert len(staging.allocated) == 1


def test_this_would_show_if_nobody_waited_for_it(cuda, monkeypatch):
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    assert rounds(FakeStaging(cuda), cuda, [Stream() for _ in range(4)]) != [0.0, 2.0, 4.0, 6.0]


def test_and_so_would_a_copy_that_did_not_wait_for_the_packing(cuda, monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
    gloo = Doubling()
    send(FakeStaging(cuda), pack(cuda, 3.0), gloo)
    assert torch.equal(gloo.got[0], torch.zeros(5))


def test_the_training_thread_waits_for_no_copy(cuda):
    staging = FakeStaging(cuda)
    stream, chunk = cuda.current_stream(), pack(cuda, 3.0)
    parcel = Parcel(staging, chunk)
    assert stream.begun == 0 and not parcel.is_completed()
    courier = threading.Thread(target=parcel.hand_over, args=(Doubling(),), daemon=True)
    courier.start()
    courier.join(60)
    begun = stream.begun
    parcel.wait()
    assert stream.begun == begun  # the copy back is queued


def test_a_mean_that_was_waited_for_twice_lands_once(cuda):
    """As where parameters of one launch land at different times; its buffer carries another average by then."""
    staging = FakeStaging(cuda)
    first = pack(cuda, 3.0)
    parcel = send(staging, first)
    parcel.wait()
    other = send(staging, pack(cuda, 5.0))
    parcel.wait()
    other.wait()
    cuda.synchronize()
    assert torch.equal(first, torch.full((5,), 6.0))
    assert len(staging.allocated) == 1 and staging.buffers.used == 0


def test_an_error_of_the_courier_is_raised_by_wait_and_its_buffer_is_not_used_again(cuda):
    class Broken(Doubling):
        def allreduce(self, tensors, options):
            raise RuntimeError("connection closed by peer")

    staging = FakeStaging(cuda)
    parcel = send(staging, pack(cuda, 1.0), Broken())
    assert parcel.is_completed()
    with pytest.raises(RuntimeError, match="closed by peer"):
        parcel.wait()
    send(staging, pack(cuda, 1.0)).wait()
    assert len(staging.allocated) == 2


def test_the_buffer_of_a_mean_that_did_not_arrive_is_not_used_again(cuda):
    class Hung(Doubling):
        def wait(self):
            raise RuntimeError("timed out")

    staging = FakeStaging(cuda)
    with pytest.raises(RuntimeError, match="timed out"):
        send(staging, pack(cuda, 1.0), Hung()).wait()
    send(staging, pack(cuda, 1.0)).wait()
    assert len(staging.allocated) == 2


def test_a_chunk_lives_until_it_is_copied_though_its_owner_has_let_go(cuda):
    staging, gloo = FakeStaging(cuda), Doubling()
    parcel = Parcel(staging, pack(cuda, 3.0))
    hand_over = parcel.hand_over
    del parcel  # as an error between launch and landing does
    courier = threading.Thread(target=hand_over, args=(gloo,), daemon=True)
    courier.start()
    courier.join(60)
    assert torch.equal(gloo.got[0], torch.full((5,), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_of_a_chunk_keep_their_neighbours_and_their_bits(dtype):
    whole = torch.arange(12, dtype=dtype) / 7
    expected = whole.clone()
    expected[4:8] *= 2
    send(CopyStaging(), whole[4:8]).wait()
    assert torch.equal(whole, expected)


def test_buffers_are_used_again_by_size_and_never_hold_more_than_was_in_use_at_once():
    made = []

    def allocate(nbytes):
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    buffers = HostBuffers(allocate)

    def fly(*sizes):
        taken = [buffers.take(size)[0] for size in sizes]
        for buffer in taken:
            buffers.give_back(buffer)

    fly(64, 64, 16)
    assert (made, buffers.peak, buffers.idle) == ([64, 64, 16], 144, 144)
    fly(16, 64, 64)
    assert made == [64, 64, 16]
    fly(100)  # of another size: the oldest free ones make room
    assert made == [64, 64, 16, 100] and buffers.used + buffers.idle <= buffers.peak == 144
    fly(64, 64, 64)
    assert buffers.used + buffers.idle <= buffers.peak == 192
