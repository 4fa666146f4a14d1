"""MT-DAO's recipe at the size of its author's smallest model, in one lease (docs/results.md has it on a CPU).

    python -m benchmarks.gpu.recipe [--device cuda] [--limit 420] [--out FILE] [--state FILE]

Four replicas are four rows of one matrix on one GPU: 4 layers of width 256 on bytes, 64 windows of 2,048 in a step,
ADOPT, periods of 32, forward and backward in bfloat16, on the Python sources of the standard library and of torch.
Synchronous ADOPT until the switch; from there all methods take turns of 128 steps, so that they have seen the same
tokens whenever it ends. The rate is constant until what is left of the time suits a decay over a fifth of the steps.
``--state`` keeps all replicas after each round, and goes on with them.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.recipe.methods import METHODS, PERIOD, Method
from benchmarks.quality.recipe.settings import Setting
from benchmarks.quality.recipe.trial import EMA, Course
from benchmarks.quality.trial import served
from benchmarks.simulation.small_gpt import GPTConfig, Text
from examples.harness.corpus import joined, library_files, split

NAMES = ("synchronous ADOPT", "MT-DAO", "Local ADOPT", "DES-LOC, 32 / 96 / 192")
HELD_OUT = 0.02  # of the text
LR, TURN, DECAY_SHARE = 2**-9, 4 * PERIOD, 0.25  # of the steps before the decay


class Large(Setting):
    """Of the standard library's text alone one lease would read each byte twenty times, and learn it by heart."""

    def text(self) -> Text:
        return of_torch_too()


@functools.cache
def of_torch_too() -> Text:
    """The Python sources of the standard library and of torch, 58 MB."""
    sources = sorted(Path(torch.__file__).parent.rglob("*.py"))
    return split(torch.frombuffer(bytearray(joined([*library_files(), *sources])), dtype=torch.uint8), HELD_OUT)


SETTING = Large(
    shape=GPTConfig(dim=256, layers=4, heads=4, context=2048),
    sequences=16,
    warm_up=512,
    switch=1024,
    decay=8192,
    steps=10240,
    device="cuda",
    bfloat16=True,
)
TINY = replace(
    SETTING, shape=GPTConfig(dim=16, layers=1, heads=2, context=16), sequences=1, warm_up=8, switch=64, decay=320
)


class Runner:
    """A method after the switch: its replicas, and the mean over time of theirs."""

    def __init__(self, course: Course, name: str, method: Method):
        self.course, self.name, self.method = course, name, method
        self.objective = course.objective(method)
        self.world = course.world(method, course.start())
        self.over_time = served(self.world)
        self.curve: list[dict[str, float]] = []

    def go(self, until: int) -> None:
        for _ in self.course.walk(self.world, self.objective, until):
            self.over_time = EMA * self.over_time + (1 - EMA) * served(self.world)
        mean, over_time = (self.course.nats(self.objective, x) for x in (served(self.world), self.over_time))
        self.curve.append({"steps": until, "nats": round(mean, 4), "nats, mean over time": round(over_time, 4)})

    def state(self) -> dict[str, Any]:
        return {"world": self.course.held(self.world), "over time": self.over_time, "curve": self.curve}

    def take(self, state: dict[str, Any]) -> None:
        self.course.hold(self.world, state["world"])
        self.over_time, self.curve = state["over time"], state["curve"]


def run(setting: Setting, limit: float, state: Path | None) -> Iterator[dict[str, Any]]:
    """What there is after each round. Ends with the decay, or when ``limit`` seconds are over."""
    begin = time.monotonic()
    course = Course(setting, LR, 0)
    runners = [Runner(course, name, METHODS[name]) for name in NAMES]
    if state and state.exists():
        kept = torch.load(state, map_location=setting.device, weights_only=True)
        course.setting = replace(setting, decay=kept["decay"], steps=kept["steps"])
        for runner in runners:
            runner.take(kept["runners"][runner.name])
    # between averages: nothing is under way when a round ends
    done, began = int(runners[0].world.steps), time.monotonic()
    first = done
    while done < course.setting.steps:
        until = done + TURN if done > setting.switch else setting.switch + PERIOD // 2
        for runner in runners:
            runner.go(min(until, course.setting.steps))
        done = min(until, course.setting.steps)
        each = (time.monotonic() - began) / (done - first)
        left = limit - (time.monotonic() - begin)
        if course.setting == setting and (done >= setting.decay or left < each * (DECAY_SHARE * done + 2 * TURN)):
            turns = max(1, int(DECAY_SHARE * done) // TURN)
            course.setting = replace(setting, decay=done, steps=done + turns * TURN)
        if state:
            kept = {"decay": course.setting.decay, "steps": course.setting.steps}
            part = state.with_suffix(".part")
            torch.save(kept | {"runners": {runner.name: runner.state() for runner in runners}}, part)
            part.replace(state)
        curves = {runner.name: runner.curve for runner in runners}
        yield {"ms a step of all": round(1e3 * each, 1), "decay from": course.setting.decay, "curves": curves}
        if left < each * TURN:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=420, help="seconds (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON for the curves")
    parser.add_argument("--state", type=Path, help="kept after each round")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    given = parser.parse_args()
    setting = replace(TINY if given.quick else SETTING, device=given.device)
    for found in run(setting, given.limit, given.state):
        last = {name: curve[-1] for name, curve in found["curves"].items()}
        steps = max(each["steps"] for each in last.values())
        print(steps, {name: each["nats"] for name, each in last.items()}, flush=True)
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
