"""Lines of telemetry: those that a run would have written, and those that one has."""

import json
from collections import Counter

from deslo_plugin.telemetry.jsonl_writer import read
from tests.support.oracle import blocks
from tests.support.theory import RULES

PARAMS, MOMENT = 1000, 500  # bytes of an average


def start(replica, at=100.0, **more):
    groups = [{"periods": {"params": 2, "exp_avg": 4}, "numel": 250}]
    return {
        "kind": "start",
        "at": at,
        "version": "0",
        "replica": replica,
        "shard": 0,
        "replicas": 2,
        "replica_size": 3,
        "synchronous_bytes": PARAMS,
        "groups": groups,
        "config": {},
    } | more


def log(steps, at, loss, tokens=10):
    return {"kind": "log", "at": at, "steps": steps, "loss": loss, "tokens": tokens}


def average(steps, at, exposed, **bytes_of):
    return {
        "kind": "average",
        "at": at,
        "steps": steps,
        "bytes": bytes_of,
        "in_flight_s": dict.fromkeys(bytes_of, 0.5),
        "exposed_s": exposed,
        "distance": dict.fromkeys(bytes_of, 0.1 * steps),
        "cosine": dict.fromkeys(bytes_of, 1 - 0.1 * steps),
    }


def end(at, taken):
    return {"kind": "end", "at": at, "steps": taken, "taken": taken}


def write(folder, replica, *records):
    folder.mkdir(exist_ok=True)
    path = folder / f"replica-{replica}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


S = RULES["mt-dao-adam-n2"]
STEPS = 26


def local(path, **telemetry):
    return blocks(S, replica_size=1, telemetry={"path": str(path), **telemetry})


def lines(path, kind=None):
    return [record for record in read(path) if kind in (None, record["kind"])]


def total(path):
    sent = Counter()
    for average in lines(path, "average"):
        sent.update(average["bytes"])
    return dict(sent)
