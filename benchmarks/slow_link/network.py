"""Two nodes on one cable: network namespaces joined by a veth pair, both ends shaped by tc's token bucket.

Nothing outside the namespaces changes. The cable carries jumbo frames and drops none: its queue is longer than what TCP
sends ahead, so that the interface counters show payload, headers and acknowledgements, and no repetition.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

DEVICE = "link0"
ADDRESSES = ("10.9.0.1", "10.9.0.2")
MTU = 9000
HEADERS = 14 + 20 + 32  # Ethernet, IPv4, TCP with timestamps
WIRE_PER_PAYLOAD = (MTU + 14) / (MTU + 14 - HEADERS)
PREFIX = "deslo-link"


class NetworkError(RuntimeError):
    """The cable cannot be laid here; says what is missing."""


class Cable:
    """A context: namespaces exist inside it and are gone after it, whatever happens in between."""

    def __init__(self) -> None:
        self.nodes = tuple(f"{PREFIX}-{os.getpid()}-{side}" for side in "ab")

    def __enter__(self) -> "Cable":
        if os.geteuid() != 0:
            raise NetworkError("network namespaces need root: run this as root, or under sudo")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise NetworkError(f"expected the command {tool} on PATH, found none: install iproute2")
        try:
            self._sweep()
            self._lay()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def shape(self, mbit: float | None) -> None:
        """Both directions carry at most ``mbit`` Mbit/s from now on; None takes the shaping away."""
        for node in self.nodes:
            if mbit is None:
                _run("tc", "-n", node, "qdisc", "del", "dev", DEVICE, "root", check=False)  # there may be none
            else:
                _run(
                    "tc",
                    "-n",
                    node,
                    "qdisc",
                    "replace",
                    "dev",
                    DEVICE,
                    "root",
                    "tbf",
                    "rate",
                    f"{mbit}mbit",
                    "burst",
                    "128kb",
                    "limit",
                    "64mb",
                )

    def sent(self) -> tuple[int, int]:
        """Bytes that each node has put on the cable so far, by its interface's counter."""
        return tuple(self._stats(node)["tx"]["bytes"] for node in self.nodes)

    def _stats(self, node: str) -> dict:
        return json.loads(_run("ip", "-n", node, "-s", "-j", "link", "show", DEVICE))[0]["stats64"]

    def _lay(self) -> None:
        a, b = self.nodes
        for node in self.nodes:
            _run("ip", "netns", "add", node)
        _run("ip", "link", "add", DEVICE, "netns", a, "type", "veth", "peer", "name", DEVICE, "netns", b)
        for node, address in zip(self.nodes, ADDRESSES):
            ip = ("ip", "-n", node)
            _run(*ip, "link", "set", "lo", "up")  # ranks of one node talk over it, past the cable
            _run(*ip, "link", "set", DEVICE, "addrgenmode", "none", "mtu", str(MTU), "up")
            _run(*ip, "addr", "add", f"{address}/24", "dev", DEVICE)
            # whatever the machine's default is: BBR probes and paces, which would be measured too
            _run(*ip, "route", "replace", "10.9.0.0/24", "dev", DEVICE, "congctl", "reno")

    def _remove(self) -> None:
        for node in self.nodes:
            _run("ip", "netns", "del", node, check=False)

    def _sweep(self) -> None:
        """Removes what an earlier run left that was killed outright."""
        for line in _run("ip", "netns", "list").splitlines():
            name = line.split()[0]
            if name.startswith(PREFIX) and not Path("/proc", name.split("-")[2]).exists():
                _run("ip", "netns", "del", name)


def _run(*command: str, check: bool = True) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired as error:
        raise NetworkError(f"{' '.join(command)}: no answer within 20 s") from error
    if check and done.returncode:
        raise NetworkError(
            f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}; "
            "namespaces, veth and tbf need root and a kernel that has them"
        )
    return done.stdout
