"""One rank of a benchmark on two nodes: builds contestants, and runs as many steps of one as it is asked to.

Started by ``ranks.py`` with a pipe's file descriptor and the seconds after which it ends by itself.
"""

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.slow_link.contestants import CONTESTANTS, Running, Setting
from benchmarks.slow_link.exposure import Segment


class Rank:
    """What ``World.ask`` can ask for, by method name."""

    def __init__(self) -> None:
        self.running: dict[str, Running] = {}
        self.done: dict[str, int] = {}

    def build(self, name: str, setting: Setting, warm_up: int) -> None:
        """Builds a contestant and takes its first steps, in which connections are made and memory is found."""
        torch.manual_seed(0)
        self.running[name], self.done[name] = CONTESTANTS[name].build(setting), 0
        tokens = torch.randint(setting.shape.vocab, (64, setting.sequences, setting.shape.context + 1))
        self.windows = tokens.roll(dist.get_rank())  # every rank reads something else, every contestant the same
        self.run(name, warm_up)

    def run(self, name: str, steps: int) -> Segment:
        running, first = self.running[name], self.done[name]
        waited = running.waited()
        ends = []
        dist.barrier()
        start = time.perf_counter()
        for step in range(first, first + steps):
            window = self.windows[step % len(self.windows)]
            running.step(window[:, :-1], window[:, 1:])
            ends.append(time.perf_counter())
        self.done[name] += steps
        payload = [running.payload(step) for step in range(first + 1, first + steps + 1)]
        return Segment(start, ends, payload, running.waited() - waited)

    def leave(self) -> None:
        dist.barrier()


def serve(rank_of: Callable[[], Any]) -> None:
    """Answers requests of ``World.ask`` with the methods of ``rank_of()``, made once there is a world, until it is to
    leave."""
    pipe, lifetime = Connection(int(sys.argv[1])), float(sys.argv[2])
    faulthandler.dump_traceback_later(lifetime, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=100))
    rank = rank_of()
    while True:
        try:
            what, args = pipe.recv()
        except EOFError:  # the leader is gone
            os._exit(1)
        try:
            pipe.send((getattr(rank, what)(*args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
        if what == "leave":
            os._exit(0)  # the end of the libraries' own threads aborts now and then


if __name__ == "__main__":
    serve(Rank)
