"""M replicas as the rows of one matrix: the mean over rows is their transport, and rows come and go."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.adaptive_periods import shortest
from deslo_plugin.algorithm.fragments import due_fragments, sizes
from deslo_plugin.algorithm.state_names import ORIGIN, PARAMS, STEP
from deslo_plugin.averaging.cohort import Rows
from deslo_plugin.averaging.fragments import Fragments
from deslo_plugin.config.load import load_config
from deslo_plugin.config.schema import Config
from deslo_plugin.errors import ConfigError
from deslo_plugin.optim.desloc import DesLoc
from deslo_plugin.simulation.row_mean import RowMean

UNCUT = 1 << 30  # MiB in a chunk: every average travels whole, all rows of it


class Columns(Fragments):
    """Fragments of replicas that are rows: each has the same columns of all of them."""

    def cut(self, tensors: Sequence[Tensor]) -> Iterator[list[Rows]]:
        for columns in (tensor.shape[1] for tensor in tensors):
            ends = accumulate(sizes(columns, self.count))
            yield [Rows(end - size, size, columns, dim=1) for end, size in zip(ends, sizes(columns, self.count))]


class Replicas:
    """Replicas of one model that take ``DesLoc`` steps together (arXiv 2505.22549, Alg. 1), and may join and leave.

    Replicas whose rule has made equally many updates share one parameter of shape (rows, n), so that a step costs one
    pass over memory however many they are. There are more parameters than one only after replicas have joined without
    momenta: their bias correction starts anew.

    Args:
        start: where all replicas start, (n,), float32 or float64.
        config: both blocks, as ``DesLoc`` takes them. Of ``deslo``, what says how ranks are connected has no meaning
        here.
        count: replicas at the start, numbered from 0.

    Raises ``ConfigError`` for a config without ``DesLoc``, for ``on_nonfinite: "skip"``: rows step together, and for
    ``weights: "samples"``: the mean over rows counts all alike.
    """

    def __init__(self, start: Tensor, config: Config | Mapping[str, Any] | str | Path, count: int):
        if start.ndim != 1 or count < 1:
            raise ValueError(
                f"Replicas: expected start of shape (n,) and a count >= 1, got {list(start.shape)} and {count}"
            )
        config = load_config(config)
        for key, only in (("on_nonfinite", "stop"), ("replica_weights", "uniform")):
            if (value := getattr(config.deslo, key)) != only:
                raise ConfigError(f"deslo.{key}", f'"{only}" where replicas are simulated', f'"{value}"', "remove it")
        if config.optimizer is not None and config.optimizer.beside is not None:
            raise ConfigError(
                "optimizer.params.rule",
                "a rule of elements where replicas are simulated, whose parameters are one vector",
                repr(config.optimizer.rule),
                "take another rule, or train threads or processes",
            )
        self._mean = RowMean(count)
        rows = start.detach().expand(count, -1).clone()
        self.optimizer = DesLoc(
            [rows], replace(config, deslo=replace(config.deslo, bucket_cap_mb=UNCUT)), transport=self._mean
        )
        self.optimizer.averaging.fragments = Columns(config.deslo.fragments)
        self.ids = list(range(count))
        self.away: dict[int, int] = {}
        """Who has left -> after how many steps."""

    @property
    def config(self) -> Config:
        return self.optimizer.config

    @property
    def steps(self) -> int:
        """Completed steps: the clock is one for all replicas, also for those that join late."""
        return self.optimizer.averaging.steps

    def state(self, name: str) -> Tensor:
        """A copy of ``params`` or a momentum, (M, n); row i is replica ``ids[i]``."""
        return torch.cat(list(self.optimizer.averaging.local_tensors(name, self._blocks)))

    def meets(self, steps: int) -> bool:
        """Whether parameters, of fragments the first, are averaged once ``steps`` steps are complete."""
        periods = shortest(self.config.desloc.periods)
        return PARAMS in due_fragments(periods, self.config.deslo.fragments, steps).get(0, ())

    @torch.no_grad()
    def step(self, gradients: Tensor, *, rate: float = 1.0, norm_clip: float | None = None) -> None:
        """One step of every replica.

        Args:
            gradients: (M, n), in the order of ``ids``; overwritten.
            rate: multiplies ``optimizer.params.lr``.
            norm_clip: bound on the norm of each row, as ``clip_grad_norm_`` on each replica.
        """
        averaging = self.optimizer.averaging
        for block, rows in zip(self._blocks, gradients.split([len(block) for block in self._blocks])):
            block.grad = rows
        if averaging.synchronous:
            averaging.gradients.average(averaging.steps + 1, averaging.gradients.local())
        if norm_clip is not None:
            gradients *= (norm_clip / (gradients.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
        self._group["lr"] = self.config.desloc.lr * rate
        self.optimizer.step()

    def leave(self, ids: Iterable[int]) -> None:
        """Replicas ``ids`` are gone with all that they had; averages are over the others."""
        gone = set(ids)
        if not gone <= set(self.ids) or gone == set(self.ids):
            raise ValueError(f"Replicas.leave: expected some of {self.ids}, not all, got {sorted(gone)}")
        staying = [index for index, replica in enumerate(self.ids) if replica not in gone]
        states, origins = self._states()
        self._seat(
            [self.ids[i] for i in staying], {name: rows[staying] for name, rows in states.items()}, origins[staying]
        )
        self.away |= dict.fromkeys(gone, self.steps)

    def join(self, ids: Iterable[int], *, momenta: bool = True) -> None:
        """Replicas ``ids`` come, or come back, at the mean of those that are there; the means stay as they are.

        They receive parameters, momenta and the rule's count of updates, as a checkpoint of ours would give them.
        Without ``momenta`` they receive parameters (and the outer optimizer's state), and their rule starts anew, as
        where nothing but parameters is ever exchanged.
        """
        coming = sorted(ids)
        if set(coming) & set(self.ids):
            raise ValueError(f"Replicas.join: expected replicas other than {self.ids}, got {coming}")
        states, origins = self._states()
        reset = () if momenta else self.config.desloc.moments
        for name, rows in states.items():
            mean = torch.zeros_like(rows[0]) if name in reset else rows.mean(0)
            states[name] = torch.cat([rows, mean.expand(len(coming), -1)])
        origin = float(origins.min()) if momenta else float(self.steps)
        self._seat(self.ids + coming, states, torch.cat([origins, origins.new_full((len(coming),), origin)]))
        for replica in coming:
            self.away.pop(replica, None)

    @property
    def _group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]

    @property
    def _blocks(self) -> list[Tensor]:
        return self._group["params"]

    def _states(self) -> tuple[dict[str, Tensor], Tensor]:
        """Every state that has a row for each replica, (M, n), and the clock at which each one's rule began, (M,)."""
        states = [self.optimizer.state[block] for block in self._blocks]
        rows = {name: self.state(name) for name in (PARAMS, *(name for name, value in states[0].items() if value.ndim))}
        return rows, torch.cat([state[ORIGIN].expand(len(block)) for state, block in zip(states, self._blocks)])

    def _seat(self, ids: Sequence[int], states: Mapping[str, Tensor], origins: Tensor) -> None:
        """Everyone takes a row: those whose rule began together in one block."""
        steps, optimizer = int(self.steps), self.optimizer
        before = optimizer.state[self._blocks[0]]  # its periods are those of all
        optimizer.averaging.abandon()  # what flies was launched of the old rows; it is taken anew when it lands
        optimizer.averaging.members.forget()
        optimizer.averaging.fragments.forget()
        optimizer.state.clear()
        self._group["params"], self.ids = [], []
        for origin in origins.unique():
            rows = (origins == origin).nonzero().flatten().tolist()
            block = states[PARAMS][rows]
            optimizer.state[block] = {name: value.clone() for name, value in before.items() if not value.ndim}
            optimizer.state[block] |= {STEP: torch.tensor(steps), ORIGIN: origin.clone()}
            optimizer.state[block] |= {name: each[rows] for name, each in states.items() if name != PARAMS}
            self._group["params"].append(block)
            self.ids += [ids[row] for row in rows]
        self._mean.seat(len(self.ids))
