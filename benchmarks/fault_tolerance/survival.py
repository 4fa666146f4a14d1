"""How a job with live membership takes what happens to replicas: rounds of deaths and hangs, at seeded moments.

    python -m benchmarks.fault_tolerance.survival --rounds 30

Three replicas train a small model on this machine, each a process, with a lighthouse (heartbeat timeout 1 s) and
torchft's gloo transport (timeout 3 s). In each round one of them is hit: killed while it computes, killed inside an
average (the first of its tensors is sent, the others are not), or stopped for five seconds; a killed one is started
again. A round is over once it trains beside the others again. Measured: the seconds from the hit to the survivors' next
written average. Proved at the end: every average was written alike by all that wrote it, and parameters, all states,
clocks, buffers and lr schedules of all replicas are equal.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.support.torchft_jobs import Replicas

NAMES = "abc"
HITS = ("killed while computing", "killed inside an average", "stopped for 5 s")


def config(when: str) -> dict:
    sync_every = {"params": 4, "exp_avg": 8, "exp_avg_sq": 8}
    return {
        "optimizer": {"params": {"lr": 1e-2, "sync_every": sync_every}},
        "deslo": {"average_at": when, "timeout_s": 30},
    }


def hit(job: Replicas, name: str, how: str, chance: random.Random) -> float:
    """Does ``how`` to ``name`` and returns when."""
    if how == "killed inside an average":
        job.doom(name)
        job.wait(lambda: job.ended(name))
    else:
        time.sleep(chance.uniform(0, 0.2))
        os.kill(job.processes[name].pid, signal.SIGSTOP if how.startswith("stopped") else signal.SIGKILL)
    return time.time()


def one_round(job: Replicas, how: str, chance: random.Random) -> float:
    """Seconds from the hit to the next average that all survivors have written."""
    name = chance.choice(NAMES)
    survivors = [each for each in NAMES if each != name]
    when = hit(job, name, how, chance)

    def written(survivor: str) -> Iterator[float]:
        lines = (line for line in job.trained(survivor) if line["time"] > when)
        return (line["time"] for line in lines if line["means"] and line["replicas"] == 2)

    job.wait(lambda: all(any(written(survivor)) for survivor in survivors))
    seconds = max(next(written(survivor)) for survivor in survivors) - when
    if how.startswith("stopped"):
        time.sleep(max(0.0, 5 - (time.time() - when)))
        os.kill(job.processes[name].pid, signal.SIGCONT)
    else:
        job.wait(lambda: job.ended(name))
        job.start(name)
    since = time.time()
    job.wait(lambda: job.back(name, since))
    return seconds


def sound(job: Replicas) -> str:
    """What the end proves, or what was wrong."""
    ends = job.finish()
    means = [mean for name in NAMES for line in job.trained(name) for mean in line["means"].items()]
    if any(end != ends["a"] or not end for end in ends.values()):
        return "replicas DIFFER at the end"
    if len(set(means)) != len(dict(means)):
        return "an average was written DIFFERENTLY"
    return f"{len(dict(means))} averages, each written alike by all that wrote it; replicas equal at the end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15, help="no round begins after these")
    options = parser.parse_args()
    chance, deadline = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    console = Console(width=120)
    seconds: dict[tuple[str, str], list[float]] = {}
    verdicts = {}
    for when, rounds in (("before_step", options.rounds - options.rounds // 2), ("after_step", options.rounds // 2)):
        with tempfile.TemporaryDirectory() as folder:
            job = Replicas(Path(folder), together=3, config=config(when))
            try:
                job.start(*NAMES)
                job.wait(lambda: job.clock(*NAMES) > 20)
                for index in range(rounds):
                    if time.monotonic() < deadline:
                        how = HITS[index % len(HITS)]
                        seconds.setdefault((when, how), []).append(one_round(job, how, chance))
                verdicts[when] = sound(job)
            finally:
                job.close()

    table = Table("order", "one of three replicas is", "rounds", "seconds to the next average: median", "max")
    for (when, how), each in seconds.items():
        table.add_row(when, how, str(len(each)), f"{median(each):.2f}", f"{max(each):.2f}")
    console.print(
        f"python -m benchmarks.fault_tolerance.survival --rounds {options.rounds} --seed {options.seed}", table
    )
    for when, verdict in verdicts.items():
        console.print(f"{when}: {verdict}")


if __name__ == "__main__":
    main()
