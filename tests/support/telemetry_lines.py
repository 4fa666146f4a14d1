"""Lines of telemetry that a run would have written."""

import json

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
