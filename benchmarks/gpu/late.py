"""Does an average that does not arrive end as an error with a name, and the process after it?

    python -m benchmarks.gpu.late [--device cuda] [--hold-s 12]

A world of one rank over NCCL, and a kernel that holds the average back for longer than ``deslo.timeout_s``. Exits 1
unless ``optimizer.step()`` raises ``AverageError`` in time, the communicator lets go, and the interpreter can end.
"""

import argparse
import os
import time

WORLD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
os.environ |= WORLD | {"MASTER_PORT": os.environ.get("MASTER_PORT", "29556")}

import torch
import torch.distributed as dist

import deslo_plugin
from deslo_plugin.comm.replica_transport import ReplicaTransport

TIMEOUT_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hold-s", type=float, default=12.0)
    given = parser.parse_args()
    if given.device != "cuda":
        raise SystemExit("only a GPU is held by a kernel")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    periods = {"params": 1, "exp_avg": None, "exp_avg_sq": None}
    config = {
        "optimizer": {"type": "DesLoc", "params": {"lr": 1e-3, "sync_every": periods}},
        "deslo": {"replica_size": 1, "timeout_s": TIMEOUT_S},
    }
    model = torch.nn.Linear(64, 64, device="cuda")
    optimizer = deslo_plugin.DesLoc(model.parameters(), config)
    deslo_plugin.attach(model, optimizer)
    hold(given.hold_s)
    begin = time.monotonic()
    try:
        for _ in range(3):
            model(torch.randn(8, 64, device="cuda")).square().mean().backward()
            optimizer.step()
    except deslo_plugin.AverageError as error:
        print(f"after {time.monotonic() - begin:.1f} s: {error}")
    else:
        raise SystemExit("expected an AverageError, got none")


def hold(seconds: float) -> None:
    """From now on every average waits behind a kernel on a stream of its own."""
    stream, start = torch.cuda.Stream(), ReplicaTransport.start

    def held(transport: ReplicaTransport, chunk: torch.Tensor) -> object:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(seconds * 1.8e9))  # cycles
            return start(transport, chunk)

    ReplicaTransport.start = held


if __name__ == "__main__":
    main()
