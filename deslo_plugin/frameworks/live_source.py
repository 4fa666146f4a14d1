"""From which replica a latecomer takes over, and how it reads what that one serves: as data, of which nothing runs."""

import pickle
import urllib.request
from datetime import timedelta
from typing import Any

from torch.distributed._serialization import _streaming_load

from deslo_plugin.errors import ConfigError, require
from deslo_plugin.frameworks.live_inside import Inside


class OneSource:
    """torchft's client of the manager's server, by which every rank of a replica takes over from the same replica, and
    serves the same ones, as its first rank does.

    torchft spreads the ranks of a replica that comes over those that are there. Between averages these differ: the
    latecomer would be a mixture of them, and where its ranks hold copies these would differ too."""

    def __init__(self, client: Any, inside: Inside):
        self._client, self._inside = client, inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def _quorum(self, **asked: Any) -> Any:
        """The quorum, or ``TimeoutError`` on every rank if any has got none."""
        quorum, problem, told = None, None, None
        try:
            quorum = self._client._quorum(**asked)
            source, address = quorum.recover_src_replica_rank, quorum.recover_src_manager_address
            told = [quorum.quorum_id, source, address, list(quorum.recover_dst_replica_ranks)]
        except (TimeoutError, RuntimeError) as error:
            problem = str(error)
        everyone = self._inside.gather([problem, told])
        for problem, _ in everyone:
            if problem is not None:
                raise TimeoutError(problem)
        _, (number, source, address, served) = everyone[0]
        if any(each[0] != number for _, each in everyone):
            raise TimeoutError(f"the ranks of this replica were given quorums {[each[0] for _, each in everyone]}")
        found = require(quorum)
        found.recover_src_replica_rank, found.recover_src_manager_address = source, address
        found.recover_dst_replica_ranks = served
        return found


class Unread(list[ConfigError]):
    """What could not be read of what others served; torchft itself only logs it, and asks again."""


def read_as_data(transport: Any) -> Unread:
    """From now on torchft's ``HTTPTransport`` reads what another replica serves with ``weights_only``, where torchft
    unpickles whatever comes. A transport of the user's own is left as it is.

    Raises ``ConfigError`` for chunks, whose description is pickled. Not collective."""
    unread = Unread()
    if type(transport).__module__ != "torchft.checkpointing.http_transport":
        return unread
    if transport._num_chunks:
        raise ConfigError(
            "torchft HTTPTransport(num_chunks=...)",
            "0, since the description of chunks cannot be read as data",
            str(transport._num_chunks),
            "remove it",
        )

    def load(address: str, timeout: timedelta) -> object:
        with urllib.request.urlopen(address, timeout=timeout.total_seconds()) as served:
            try:
                return _streaming_load(served, weights_only=True)
            except pickle.UnpicklingError as error:
                found = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
                unread.append(
                    ConfigError(
                        "state registered with the torchft manager",
                        "tensors, numbers and text in dicts and lists",
                        found.strip(),
                        "register plain state, or name its class in torch.serialization.add_safe_globals([...])",
                    )
                )
                raise

    transport._load_from_address = load
    return unread
