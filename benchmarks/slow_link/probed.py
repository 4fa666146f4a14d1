"""What ``deslo probe`` says of links whose rate and delay are known.

    python -m benchmarks.slow_link.probed [--rates 100 500 1000]

Two network namespaces are the nodes, as in benchmarks/slow_link/link.py, with one and with two ranks on each. Needs
Linux, root and iproute2; removes what it makes.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.slow_link.network import ADDRESSES, DEVICE, WIRE_PER_PAYLOAD, Cable

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 500.0, 1000.0], help="Mbit/s")
    args = parser.parse_args()
    columns = ("ranks of a replica", "payload Mbit/s", "probed Mbit/s", "quartiles", "error", "latency, ms")
    table = Table("link, Mbit/s", *columns, title="deslo probe between two nodes")
    with Cable() as cable:
        for mbit in args.rates:
            cable.shape(mbit)
            for ranks in (1, 2):
                measured, payload = probe(cable, ranks, mbit), mbit / WIRE_PER_PAYLOAD
                low, high = (each * 1e3 for each in measured["quartiles"]["gbit_per_s"])
                found = measured["gbit_per_s"] * 1e3
                table.add_row(
                    f"{mbit:g}",
                    str(ranks),
                    f"{payload:.1f}",
                    f"{found:.1f}",
                    f"{low:.1f} to {high:.1f}",
                    f"{found / payload - 1:+.1%}",
                    f"{measured['latency_ms']:.2f}",
                )
    Console(width=110).print(table)


def probe(cable: Cable, ranks: int, mbit: float) -> dict:
    """The JSON of ``deslo probe`` on two replicas of ``ranks`` ranks; samples of about half a second."""
    mib = max(1, round(mbit * 1e6 / 8 * 0.5 / 2**20 / ranks))
    command = [
        sys.executable,
        "-m",
        "deslo_plugin.cli",
        "probe",
        "--replica-size",
        str(ranks),
        "--mb",
        str(mib),
        "--json",
    ]
    processes = []
    try:
        for rank in range(2 * ranks):
            env = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(2 * ranks),
                "LOCAL_RANK": str(rank % ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": "29511",
                "GLOO_SOCKET_IFNAME": DEVICE,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", cable.nodes[rank // ranks], *command],
                    env=env,
                    text=True,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                )
            )
        out, _ = processes[0].communicate(timeout=TIMEOUT_S)
        for process in processes:
            if process.wait(timeout=30):
                sys.exit(f"probed: a rank ended with status {process.returncode}")
        return json.loads(out)
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=10)


if __name__ == "__main__":
    main()
