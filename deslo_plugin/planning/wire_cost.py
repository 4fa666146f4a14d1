"""What one average of one state sends from a rank, and what memory it takes there while it is under way."""

from collections.abc import Sequence
from dataclasses import dataclass

from deslo_plugin.config.schema import DesloConfig
from deslo_plugin.kernels.quantize import BLOCK, blocks_of

BYTES = {"float32": 4, "float64": 8}
LANDED = 4  # bytes of an element of a mean that travelled in few bits


@dataclass(frozen=True)
class WireCost:
    """Of averages over ``replicas``, where ``divisor`` ranks of a replica split each of them."""

    deslo: DesloConfig
    replicas: int
    divisor: int

    @property
    def word(self) -> int:
        """Bytes of an element that is not quantised."""
        return BYTES[self.deslo.wire.plain]

    @property
    def weight(self) -> int:
        """Bytes that travel with each average to say what a replica counts."""
        return self.word if self.deslo.replica_weights == "samples" else 0

    def plain(self, numel: int) -> int:
        return -(-numel // self.divisor) * self.word

    def sent(self, state: str, parts: Sequence[int]) -> int:
        """Bytes for ``parts`` of a state, of so many elements each."""
        records = self._records(state, parts)
        return self.weight + (self.plain(sum(parts)) if records is None else self.replicas * records[0] * records[1])

    def memory(self, state: str, parts: Sequence[int]) -> int:
        """Bytes for them from launch to landing: copies that travel and, if they take several steps, that they are
        taken off; of those in few bits what leaves, what arrives, and in float32 what this rank takes the mean of."""
        copies, records = 2 if self.deslo.sync_delay > 1 else 1, self._records(state, parts)
        if records is None:
            return copies * self.divisor * self.plain(sum(parts))
        blocks, nbytes = records
        return self.divisor * blocks * (2 * self.replicas * nbytes + 4 * BLOCK) + copies * LANDED * sum(parts)

    def _records(self, state: str, parts: Sequence[int]) -> tuple[int, int] | None:
        """How many this rank takes the mean of, and the bytes of one; None if the state is not quantised."""
        format = self.deslo.wire.format_of(state)
        if format is None or self.replicas == 1:
            return None
        return -(-sum(map(blocks_of, parts)) // (self.divisor * self.replicas)), format.record_bytes
