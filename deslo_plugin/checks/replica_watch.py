"""Does training do what was attached? Watched until the first averages have landed, and whenever ``attachment.check()``
asks.

A mistake shows in what parameters do: they are equal before an average that should find them apart, they move while the
attached optimizer is not stepped, or no attached optimizer has them. Each is said once, on rank 0, with its likely
cause."""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.optimizer import register_optimizer_step_post_hook

from deslo_plugin.algorithm.state_names import PARAMS
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.metrics import SyncEvent
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.checks.replica_checks import differing, listed
from deslo_plugin.checks.watch_messages import TOGETHER, WITHIN
from deslo_plugin.comm.consistency import digests
from deslo_plugin.comm.process_groups import Groups, all_gather_by_rank
from deslo_plugin.kernels.local_tensors import local
from deslo_plugin.log import log_rank0
from deslo_plugin.optim.any_optimizer import AnyOptimizerAverager

AVERAGES, PATIENCE = 2, 8  # of parameters: so many that found them moved are watched, and no more than these in all
_averagings: "WeakSet[StateAverager]" = WeakSet()  # of all optimizers that were attached in this process
_watching: "WeakSet[Watch]" = WeakSet()
_hook: list[Any] = []  # torch's hook after every optimizer's step, while anybody watches


class Watch:
    """Looks at the parameters ``named``, of model and optimizer; a copy of an optimizer is not watched.

    Args:
        groups: of the attachment; in a process alone there is nothing to compare.
        whole: names of those that ranks of a replica must hold alike, as far as they hold them.
        names_left_out: says which trained parameters no attached optimizer has; once for each model is enough.
        in_engine: an engine says when a step has ended, which may be several calls of the optimizer's.
    """

    def __init__(
        self,
        averaging: StateAverager,
        groups: Groups,
        named: Mapping[str, Tensor],
        whole: Collection[str] = (),
        *,
        names_left_out: bool = True,
        in_engine: bool = False,
    ):
        self.averaging, self.groups, self.named, self.whole = averaging, groups, dict(named), whole
        self.problems: dict[str, str] = {}
        self.on_first_step: Callable[[], object] = lambda: None
        self._names = {id(param): name for name, param in named.items()}
        self._names_left_out, self._in_engine = names_left_out, in_engine
        self._began = self._inside = self._placed = False
        self._averages = self._looked = 0
        self._before: dict[str, str] = {}
        self._after: dict[str, str] = {}  # of what has landed, the parts
        self._landed: dict[str, str] = {}  # and the parameters that they are in
        _averagings.add(averaging)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def begin(self) -> None:
        """Watches every step from now on, until the first averages have landed."""
        self._known = self._asked = self._digests()
        self._asked_at = self.averaging.stats.steps
        if self.groups.topology.replicas == 1:
            return
        self.averaging.watch = self
        self.averaging.listeners.append(self._about_to_land)
        if not self._in_engine:
            _watching.add(self)
            if not _hook:
                _hook.append(register_optimizer_step_post_hook(_any_step))

    def step_begins(self) -> None:
        """The attached optimizer is stepped."""
        self._inside = True
        if self._placed:
            self._placed, self._known = False, self._digests()
        if not self._began:
            self._began = True
            if self._names_left_out:
                self._complain("left out", self._left_out("require gradients"))

    def placed(self) -> None:
        """Parameters are loaded, or made equal: that they are equal at the next step says nothing of training."""
        self._placed = True

    def landed(self, cohort: Cohort) -> None:
        """The mean of the parameters of ``cohort`` has been written."""
        both = zip(cohort.params, cohort.parts(local(cohort.params)))
        named = {self._names[id(param)]: (param, part) for param, part in both if id(param) in self._names}
        self._after |= digests((name, part) for name, (_, part) in named.items())
        self._landed |= digests(zip(named, local([param for param, _ in named.values()])))

    def step_ended(self, *, of_engine: bool = False) -> None:
        """Compares what an average of parameters found and left, if there was one. Collective in steps with one."""
        self._inside = False
        if self._in_engine and not of_engine:
            return
        if getattr(self.averaging, "periods_known", True):
            then, self.on_first_step = self.on_first_step, lambda: None
            then()
        if self.averaging.steps == self.averaging.deslo.synchronous_steps > 0:
            self._known = self._digests()  # until here replicas were equal anyway
        if self._before:
            self._compare()

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """What is stepped meanwhile is no step of training."""
        was, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = was

    def _about_to_land(self, event: SyncEvent) -> None:
        if PARAMS in event.drift and not self._before:
            self._before, self._landed_at = self._digests(), event.steps

    def _compare(self) -> None:
        before, after = self._before, self._after
        moved, self._known = before != self._known, before | self._landed
        self._before, self._after, self._landed = {}, {}, {}
        moved, together, apart = self._over_replicas(moved, before, after)
        if not self._in_engine and (within := self._within(before, self.groups.shard)):
            self._complain("within", WITHIN.format(ranks=within))
        self._looked += 1
        self._averages += moved
        if moved and together:
            self._complain("together", TOGETHER.format(steps=self._landed_at))
        if apart:
            self._complain(
                "apart",
                "deslo: parameters differ between replicas right after an average; see that nothing writes them "
                "on some ranks alone, and call attachment.check() on every rank",
            )
        if self._averages >= AVERAGES or self._looked >= PATIENCE:
            self._end()

    def _over_replicas(
        self, moved: bool, before: Mapping[str, str], after: Mapping[str, str]
    ) -> tuple[bool, bool, bool]:
        """(whether any moved, all were equal before, some differ after), by an average, which names a rank that has
        left.

        Collective.
        """
        words = [float(word) for each in (before, after) for word in bytes.fromhex(_hash(each)[:16])]
        device = local([next(iter(self.named.values()))])[0].device
        own = torch.tensor([float(moved), *words, *(word**2 for word in words)], dtype=torch.float64, device=device)
        average = self.averaging.transport
        chunk = own.repeat(average.divisor)
        average.start(chunk).wait()
        mean, square = chunk[1 : len(own)].view(2, 2, -1)
        differ = ((square - mean.square()).abs() > 1e-9).any(1).tolist()  # E w^2 = (E w)^2 where all are equal
        return average.any(bool(chunk[0] > 0)), not average.any(differ[0]), average.any(differ[1])

    def _end(self) -> None:
        self.averaging.watch = None
        self.averaging.listeners.remove(self._about_to_land)
        _watching.discard(self)
        if not _watching and _hook:
            _hook.pop().remove()

    def seen(self, optimizer: torch.optim.Optimizer) -> None:
        """Some optimizer of this process was stepped."""
        own = self.averaging.optimizer
        if self._inside or (optimizer is own and not isinstance(self.averaging, AnyOptimizerAverager)):
            return
        kind, name = type(optimizer).__name__, type(own).__name__
        if optimizer is own:
            return self._complain(
                "elsewhere",
                f"deslo: {name} is stepped past optimizer.step(): nothing is averaged; call "
                "optimizer.step() of the optimizer that was attached",
            )
        theirs = _params_of([optimizer])
        if theirs & _params_of([own]):
            self._complain(
                "elsewhere",
                f"deslo: a step of {kind} moves parameters of {name}, which is attached and not stepped: "
                f"nothing is averaged; attach that {kind}, such as optimizer.base_optimizer, or call {name}.step()",
            )
        elif self._names_left_out and not hasattr(optimizer, "deslo"):
            self._complain("left out", self._left_out(f"are stepped by {kind}", theirs))

    def check(self) -> list[str]:
        """What is wrong, as sentences that are the same on every rank; nothing if all is well. Collective over all
        ranks."""
        left = self._left_out("require gradients")
        now, steps, topology = self._digests(), self.averaging.stats.steps, self.groups.topology
        unasked = steps == self._asked_at and now != self._asked
        within = self._within(now, self.groups.world)
        everyone = self._everyone((unasked, _hash(now), left, self.problems))
        self._asked, self._asked_at = now, steps
        lasting = ("together", "apart", "elsewhere")
        found = {kind: said for *_, problems in everyone.values() for kind, said in problems.items() if kind in lasting}
        if left := next((left for _, _, left, _ in everyone.values() if left), ""):
            found["left out"] = left
        if any(unasked for unasked, *_ in everyone.values()):
            found["unasked"] = (
                "deslo: parameters have changed since the last check, or since attach, without a step of the "
                "attached optimizer; that is right after a load or a write of yours, else step what was attached"
            )
        if within:
            found["within"] = WITHIN.format(ranks=within)
        peers = topology.ranks_by_shard
        apart = [rank for first, *others in peers for rank in others if everyone[rank][1] != everyone[first][1]]
        if apart and not self.averaging.diverged:
            found["unequal"] = (
                f"deslo: rank(s) {sorted(apart)} differ from replica 0, and no step was taken since all were "
                "equal; load or write the same on every rank, or call deslo_plugin.sync_replicas(model)"
            )
        for kind, sentence in found.items():
            self._complain(kind, sentence)
        return list(found.values())

    def check_inside(self) -> None:
        """Says if ranks of a replica hold other values of what they must hold alike: a checkpoint keeps one.
        Collective."""
        if within := self._within(digests((name, self.named[name]) for name in self.whole), self.groups.world):
            self._complain("within", WITHIN.format(ranks=within))

    def _within(self, now: Mapping[str, str], group: ProcessGroup | None) -> list[int]:
        """The ranks of ``group`` that hold another value of one of ``whole`` than the first of their replica that has
        it. Collective over ``group``: a replica, or all ranks."""
        topology = self.groups.topology
        if topology.replica_size == 1:
            return []
        among = [topology.shard_group] if group is self.groups.shard else topology.ranks_by_replica
        found = differing({name: now[name] for name in self.whole}, among, group)
        return sorted({rank for ranks in found.values() for rank in ranks})

    def _everyone(self, mine: Any) -> dict[int, Any]:
        return (
            all_gather_by_rank(mine, self.groups.world)
            if self.groups.world is not None
            else {self.groups.topology.rank: mine}
        )

    def _left_out(self, how: str, among: Collection[int] | None = None) -> str:
        """What to say of trained parameters in no attached optimizer, or nothing: an engine empties groups between
        steps."""
        if self._in_engine:
            return ""
        attached = _params_of(averaging.optimizer for averaging in _averagings)
        left = [
            name
            for name, param in self.named.items()
            if param.requires_grad and id(param) not in attached and (among is None or id(param) in among)
        ]
        if not left:
            return ""
        return (
            f"deslo: {listed(left)} {how} and are in no attached optimizer: they are never averaged; call "
            "deslo_plugin.attach for the optimizer that steps them too, or freeze them with requires_grad_(False)"
        )

    def _complain(self, kind: str, sentence: str) -> None:
        if sentence and kind not in self.problems:
            self.problems[kind] = sentence
            self.averaging.stats.failed_checks += 1
            log_rank0(sentence, logging.WARNING)

    def _digests(self) -> dict[str, str]:
        return digests(zip(self.named, local(list(self.named.values()))))


def _any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for watch in list(_watching):
        watch.seen(optimizer)


def _params_of(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    return {id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}


def _hash(values: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()
