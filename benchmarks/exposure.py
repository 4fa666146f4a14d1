from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Some steps of one contestant on one rank. Times are of the machine's monotonic clock, which all ranks share.

    ``payload`` has an entry for each step: what this rank hands to the reductions between nodes that belong to it.
    """

    start: float
    ends: list[float]
    payload: list[int]
    waited: float
