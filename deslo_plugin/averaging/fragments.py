"""Which rows of which parameters are a fragment, on this rank."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from torch import Tensor

from deslo_plugin.algorithm.fragments import due_fragments
from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.averaging.cohort import Cohort, Rows
from deslo_plugin.kernels.local_tensors import local


class Fragments:
    """Cuts what averages into ``count`` fragments of equal size, between rows of parameters: large ones fall into
    several, and so do ZeRO's flat partitions, whose rows are elements.

    The cut depends on the parameters of a group and device as this rank holds them, frozen ones too: on nothing that
    changes while they train, and peers of all replicas cut alike.
    """

    def __init__(self, count: int):
        self.count = count
        self._cuts: dict[int, Sequence[Rows]] = {}  # id of a parameter -> its rows in each fragment
        self._alive: list[Tensor] = []  # so that no id is given anew
        self._made: dict[tuple[int, ...], tuple[list[Tensor], tuple[Rows, ...]]] = {}  # by index and ids

    def due(self, cohort: Cohort, whole: bool = False) -> list[tuple[Cohort, Sequence[str]]]:
        """The fragments of ``cohort`` that are due, with its states; ``whole``: if parameters of one are due, those of
        all are."""
        due = due_fragments(cohort.periods, self.count, cohort.steps)
        if whole and any(PARAMS in states for states in due.values()):
            others = [[state for state in due.get(index, ()) if state != PARAMS] for index in range(self.count)]
            due = {index: (PARAMS, *states) for index, states in enumerate(others)}
        return [(self.of(cohort, index), states) for index, states in due.items()]

    def of(self, cohort: Cohort, index: int) -> Cohort:
        """That fragment of ``cohort``; a part without elements where it has none on this rank."""
        if self.count == 1:
            return cohort
        name = (index, *map(id, cohort.params))
        if name not in self._made:
            cuts = [self._rows_of(param, cohort)[index] for param in cohort.params]
            seats = [seat for seat, rows in enumerate(cuts) if rows.size] or [0]
            self._made[name] = [cohort.params[seat] for seat in seats], tuple(cuts[seat] for seat in seats)
        params, rows = self._made[name]
        return cohort._replace(params=params, rows=rows, fragment=index)

    def forget(self) -> None:
        """The parameters are others now."""
        self._cuts.clear()
        self._made.clear()
        self._alive.clear()

    def numels(self, cohort: Cohort) -> list[list[int]]:
        """Of each fragment of ``cohort`` the elements of its parts, on this rank."""
        fragments = [self.of(cohort, index) for index in range(self.count)] if cohort.params else []
        return [[part.numel() for part in each.parts(local(each.params))] for each in fragments] or [[]] * self.count

    def _rows_of(self, param: Tensor, cohort: Cohort) -> Sequence[Rows]:
        if id(param) not in self._cuts:
            beside = [each for each in cohort.group["params"] if each.device == param.device]
            new = [each for each in beside if id(each) not in self._cuts]
            self._cuts |= zip(map(id, new), self.cut(local(new)))
            self._alive += new
        return self._cuts[id(param)]

    def cut(self, tensors: Sequence[Tensor]) -> Iterator[list[Rows]]:
        """Of each of ``tensors``, one after the other, the rows in each fragment."""
        total = sum(tensor.numel() for tensor in tensors)
        for tensor, before in zip(tensors, accumulate((each.numel() for each in tensors), initial=0)):
            rows = tensor.shape[0] if tensor.dim() else 1
            row = tensor.numel() // rows if rows else 0  # elements
            # fragment i begins at element i total / count: at the first row that does not begin before it
            starts = [
                min(max(-(-(i * total - before * self.count) // (row * self.count)), 0), rows) if row else rows
                for i in range(self.count)
            ]
            yield [Rows(start, end - start, rows) for start, end in pairwise([*starts, rows])]
