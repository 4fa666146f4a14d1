"""A replica that may die and come back: plain torch, one process for each replica, and torchft's lighthouse.

    torchft_lighthouse --min_replicas 2 --join_timeout_ms 60000 --heartbeat_timeout_ms 1000     # one for the job, port
    29510 TORCHFT_LIGHTHOUSE=http://HEAD:29510 python examples/live.py --replica node-a
    TORCHFT_LIGHTHOUSE=http://HEAD:29510 python examples/live.py --replica node-b

Kill one with -9 and start it again by the same line: it takes over all that the others have come to, and trains on
beside them. ``examples/launch/torchft.sh`` does so for as long as the job lasts.
"""

from __future__ import annotations

import os
import socket
import zlib
from argparse import ArgumentParser, Namespace
from datetime import timedelta

import torch
from harness.corpus import load_bytes
from harness.gpt import GPT, GPTConfig
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL

import deslo_plugin


def main(args: Namespace) -> None:
    torch.manual_seed(0)  # replicas start equal, which is checked
    cuda = torch.cuda.is_available()
    model = GPT(GPTConfig(context=args.context)).to("cuda" if cuda else "cpu")
    optimizer = deslo_plugin.DesLoc(model.parameters(), lr=args.lr, sync_every={"params": args.sync_every})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 100))

    host, timeout = args.host or socket.gethostname(), timedelta(seconds=args.timeout)
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        (ProcessGroupNCCL if cuda else ProcessGroupGloo)(timeout=timeout),
        None,
        None,
        min_replica_size=args.least,  # fewer than these write no average
        use_async_quorum=False,  # whoever is behind takes over between two steps
        init_sync=False,  # all start from one seed
        timeout=timedelta(seconds=60),  # bounds a take-over, too
        rank=0,
        world_size=1,
        store_addr=host,
        store_port=store.port,
        hostname=host,
        replica_id=args.replica,
    )
    manager.register_state_dict_fn("schedule", schedule.load_state_dict, schedule.state_dict)  # what else comes along
    attachment = deslo_plugin.attach(model, optimizer, manager=manager)

    text = load_bytes().to(next(model.parameters()).device)
    # the clock, not a loop of one's own: a latecomer's starts where the others are
    while attachment.steps < args.steps:
        window = torch.Generator().manual_seed(zlib.crc32(f"{args.replica} {attachment.steps}".encode()))
        starts = torch.randint(len(text) - args.context - 1, (args.batch,), generator=window)
        tokens = torch.stack([text[start : start + args.context + 1] for start in starts.tolist()]).long()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if attachment.steps % 20 == 0:
            print(
                f"step {attachment.steps}  loss {loss.item():.3f}  replicas {attachment.topology.replicas}  averages "
                f"{attachment.stats.events['params']} of params, {attachment.stats.refused_averages} refused",
                flush=True,
            )
    os._exit(0)  # torchft's threads may be waiting for the others still


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replica", required=True, help="a name that this replica keeps when it is started again")
    parser.add_argument("--least", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sync-every", type=int, default=16, help="steps between averages of params; momenta 3x, 6x")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds after which an average is given up")
    parser.add_argument("--host", help="where the other replicas find this one; by default the hostname")
    main(parser.parse_args())
