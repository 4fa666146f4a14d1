"""How a job with live membership takes what happens to replicas: rounds of deaths and hangs, at seeded moments.

    python -m benchmarks.fault_tolerance.survival --rounds 30
    python -m benchmarks.fault_tolerance.survival --rounds 30 --replicas 2 --ranks 2 --kind fsdp2

Three replicas train a small model on this machine, each a process, with a lighthouse (heartbeat timeout 1 s) and
torchft's gloo transport (timeout 3 s). In each round one of them is hit: killed while it computes, killed inside an
average (the first of its tensors is sent, the others are not), or stopped for five seconds; a killed one is started
again. With ``--ranks`` a replica is several processes, in FSDP2 or DDP: all of them are killed, or one of them, which
ends the others as under torchrun. Of two replicas the survivor averages alone. A round is over once the replica trains
beside the others again. Measured: the seconds from the hit to the survivors' next written average. Proved at the end:
every average was written alike by all that wrote it, and parameters, all states, clocks, buffers and lr schedules of
all replicas are equal.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.support.torchft_world import Replicas

ONE = "one rank killed while computing"
HITS = ("killed while computing", "killed inside an average", "stopped for 5 s")


def config(when: str) -> dict:
    sync_every = {"params": 4, "exp_avg": 8, "exp_avg_sq": 8}
    return {
        "optimizer": {"params": {"lr": 1e-2, "sync_every": sync_every}},
        "deslo": {"average_at": when, "timeout_s": 30},
    }


def hit(job: Replicas, name: str, how: str, chance: random.Random) -> float:
    """Does ``how`` to ``name`` and returns when."""
    keys = job.keys(name)
    if how == "killed inside an average":
        job.doom(key := chance.choice(keys))
        job.wait(lambda: not job.processes[key].is_alive())
    else:
        time.sleep(chance.uniform(0, 0.2))
        for key in [chance.choice(keys)] if how == ONE else keys:
            os.kill(job.processes[key].pid, signal.SIGSTOP if how.startswith("stopped") else signal.SIGKILL)
    return time.time()


def one_round(job: Replicas, names: str, how: str, chance: random.Random) -> float:
    """Seconds from the hit to the next average that all survivors have written."""
    name = chance.choice(names)
    survivors = job.keys(*(each for each in names if each != name))
    when = hit(job, name, how, chance)

    def written(survivor: str) -> Iterator[float]:
        lines = (line for line in job.trained(survivor) if line["time"] > when)
        return (line["time"] for line in lines if line["means"] and line["replicas"] == len(names) - 1)

    job.wait(lambda: all(any(written(survivor)) for survivor in survivors))
    seconds = max(next(written(survivor)) for survivor in survivors) - when
    if how.startswith("stopped"):
        time.sleep(max(0.0, 5 - (time.time() - when)))
        for key in job.keys(name):
            os.kill(job.processes[key].pid, signal.SIGCONT)
    else:
        job.wait(lambda: job.ended(name))
        job.start(name)
    since, reached = time.time(), job.clock(*survivors)
    keys = job.keys(name)
    # one that was stopped is back once it has taken over: the next round may hit the only one that it could ask
    job.wait(lambda: all(job.back(key, since, len(names)) and job.trained(key)[-1]["steps"] > reached for key in keys))
    return seconds


def sound(job: Replicas, names: str) -> str:
    """What the end proves, or what was wrong."""
    ends = job.finish()
    means = [mean for key in ends for line in job.trained(key) for mean in line["means"].items()]
    for peers in zip(*(job.keys(name) for name in names)):
        if any(ends[key] != ends[peers[0]] or not ends[key] for key in peers):
            return "replicas DIFFER at the end"
    if len(set(means)) != len(dict(means)):
        several = [name for name, times in Counter(name for name, _ in set(means)).items() if times > 1]
        return f"averages were written DIFFERENTLY: {', '.join(several[:4])}"
    return f"{len(dict(means))} averages, each written alike by all that wrote it; replicas equal at the end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1, help="of each replica")
    parser.add_argument("--kind", choices=("bare", "fsdp2", "hsdp", "ddp"), default="bare", help="around the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=15, help="no round begins after these")
    options = parser.parse_args()
    chance, deadline = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    console = Console(width=120)
    names = "abcdef"[: options.replicas]
    hits = HITS if options.ranks == 1 else (*HITS, ONE)
    together, least = options.replicas * options.ranks, min(2, options.replicas - 1)
    shape = {"ranks": options.ranks, "kind": options.kind, "together": together, "least": least}
    seconds: dict[tuple[str, str], list[float]] = {}
    verdicts = {}
    for when, rounds in (("before_step", options.rounds - options.rounds // 2), ("after_step", options.rounds // 2)):
        with tempfile.TemporaryDirectory() as folder:
            job = Replicas(Path(folder), config=config(when), **shape)
            try:
                job.start(*names)
                job.wait(lambda: job.clock(*names) > 20)
                for index in range(rounds):
                    if time.monotonic() < deadline:
                        how = hits[index % len(hits)]
                        seconds.setdefault((when, how), []).append(one_round(job, names, how, chance))
                verdicts[when] = sound(job, names)
            finally:
                job.close()

    table = Table(
        "order", f"one of {options.replicas} replicas is", "rounds", "seconds to the next average: median", "max"
    )
    for (when, how), each in seconds.items():
        table.add_row(when, how, str(len(each)), f"{median(each):.2f}", f"{max(each):.2f}")
    console.print(
        f"python -m benchmarks.fault_tolerance.survival --rounds {options.rounds} --replicas {options.replicas} "
        f"--ranks {options.ranks} --kind {options.kind} --seed {options.seed}",
        table,
    )
    for when, verdict in verdicts.items():
        console.print(f"{when}: {verdict}")


if __name__ == "__main__":
    main()
