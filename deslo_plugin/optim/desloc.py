"""``DesLoc``: one torch optimizer that takes local steps and averages each of its states on a period of its own."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from deslo_plugin.algorithm.outer_optimizer import mean_, nesterov_
from deslo_plugin.algorithm.rules import RULES
from deslo_plugin.algorithm.state_names import ORIGIN, OUTER_MOMENTUM, OUTER_PARAMS, PARAMS, SECOND_MOMENT, STEP
from deslo_plugin.algorithm.switch import Switch
from deslo_plugin.averaging.cohort import Cohort
from deslo_plugin.averaging.flight import States
from deslo_plugin.averaging.members import trains
from deslo_plugin.averaging.metrics import Meter, SyncEvent
from deslo_plugin.averaging.state_averager import StateAverager
from deslo_plugin.averaging.step_counter import ParameterClock, counters_of
from deslo_plugin.comm.transport import SingleReplica, Transport
from deslo_plugin.config.load import check_periods, load_config
from deslo_plugin.config.periods import group_periods
from deslo_plugin.config.schema import Config, OptimizerConfig
from deslo_plugin.config.switch import switch_of_group
from deslo_plugin.errors import ConfigError
from deslo_plugin.kernels.availability import settle
from deslo_plugin.kernels.matrices import UPDATES, Whole, bound
from deslo_plugin.optim.adam_states import in_own_form
from deslo_plugin.optim.fresh_state import fresh_state
from deslo_plugin.optim.memory_layout import alike, refuse_sparse
from deslo_plugin.optim.rule_groups import groups_by_rule, refuse_parts, rule_named
from deslo_plugin.optim.step_checks import refuse_capture, refuse_unattached
from deslo_plugin.optim.switching import Switching

OWN = ("sync_every", "switch", "rule")  # of a param group: the config's, whatever is loaded


class DesLoc(torch.optim.Optimizer):
    """DES-LOC and MT-DAO (arXiv 2505.22549, Alg. 1; arXiv 2510.05361, Alg. 1) for one replica.

    Args:
        params: parameters or param groups, any shapes, float32, bfloat16, float16 or float64. A group may have its own
            ``lr``, ``weight_decay`` and ``sync_every`` (state name -> period), and of a config with a rule of matrices
            the ``rule`` of its parameters; without it matrices and others become groups of their own.
        config: both blocks as a ``Config``, a dict, or the path of a JSON or YAML file; or leave it out and give the
            keys of ``optimizer.params`` as keyword arguments: ``DesLoc(params, lr=1e-3, betas=(0.9, 0.95))``.
        transport: between replicas; None means one replica, the plain optimizer.
        on_average: called with a ``SyncEvent`` after every average.
        armed: False defers everything until ``attach``; steps do nothing until then.

    State of each parameter, float32 (float64 for float64 parameters) unless said otherwise: the momenta under their
    names (bfloat16 if ``state_dtype`` says so: rounded at random by the rule, to nearest where an average lands),
    ``step`` (completed steps, 0-dim int64 on the CPU) and ``origin`` (likewise), of momenta with adaptive periods
    ``<name>_every`` (likewise), and with an outer optimizer ``outer_params`` and ``outer_momentum``. A frozen parameter
    has none until it trains.

    Raises ``ConfigError`` for a config that cannot be meant; from ``step``, ``NonFiniteError`` if any replica brings
    NaN or inf to an average, and ``AverageError`` if an average times out.
    """

    whole: Whole | None = None
    """How parts of matrices that this rank steps become whole ones, where the tensors themselves do not show it."""

    _step_supports_amp_scaling = True  # GradScaler: call ``step`` always, so that every replica's clock ticks

    def __init__(
        self,
        params: Any,
        config: Config | Mapping[str, Any] | str | None = None,
        *,
        transport: Transport | None = None,
        on_average: Callable[[SyncEvent], object] | None = None,
        armed: bool = True,
        **options: Any,
    ):
        if "average" in options:
            raise ConfigError("DesLoc(average=...)", "transport=...", "its old name", "rename the argument")
        lr = options.get("lr")
        if isinstance(lr, Tensor):  # one that the script goes on to fill, as torch's optimizers take it
            options |= {"lr": lr.item()}
        if config is not None and options:
            raise ConfigError("DesLoc", "a config or keyword arguments", f"both ({', '.join(options)})", "keep one")
        self.config = load_config(config if config is not None else {"optimizer": {"params": options}})
        if self.config.optimizer is None:
            raise ConfigError(
                "DesLoc",
                'a config of "type": "DesLoc"',
                "one for a stock optimizer (deslo.sync_every)",
                "move the periods to optimizer.params.sync_every",
            )
        self._on_average, self.armed = on_average, False
        optimizer = self.config.desloc
        rate = lr if isinstance(lr, Tensor) else optimizer.lr
        super().__init__(params, {"lr": rate, "weight_decay": optimizer.weight_decay, **dict.fromkeys(OWN)})
        self._unattached = transport is None
        if armed:
            everything = chain.from_iterable(group["params"] for group in self.param_groups)
            self.attach(transport or SingleReplica(), everything)

    def rule_of(self, group: Mapping[str, Any]) -> OptimizerConfig:
        """What is computed of the parameters of a param group."""
        return self.config.desloc.by_rule[group["rule"]]

    def attach(
        self, transport: Transport, params: Any, on_average: Callable[[SyncEvent], object] | None = None
    ) -> None:
        """Creates the state of ``params`` where none was loaded, connects the transport and arms ``step``."""
        refuse_parts([] if self.whole else self.param_groups)
        settle(param for group in self.param_groups for param in group["params"])
        # not those that are as they were made
        trained = {param: state for param, state in self.state.items() if state.get(STEP)}
        self.state.clear()
        for param in params:
            if param in trained:
                self.state[param] = trained[param]
            elif trains(param):
                self._create_state(param)
        self._unattached = self._unattached and isinstance(transport, SingleReplica)
        self._clock = ParameterClock(self, self._create_state)
        self.averaging = StateAverager(
            self,
            self.config.deslo,
            transport,
            self._clock,
            receive=self._receive,
            bounds=lambda group, steps: self.rule_of(group).bounds(steps),
            on_average=on_average or self._on_average,
            wire_states=self.state,
        )
        self._switching = Switching(self.averaging)
        self.armed = True

    @property
    def on_switch(self) -> list[Callable[[Switch], object]]:
        """Whom to tell when the switch is made, at the start of its step."""
        return self._switching.listeners

    @property
    def stats(self) -> Meter:
        """What averaging has cost and found so far."""
        return self.averaging.stats

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the new parameters meet with the others, by the clock of all. Collective once it is attached."""
        for of_rule in groups_by_rule(param_group, self.config.desloc, f"param group {len(self.param_groups)}"):
            self._add_param_group(of_rule)

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        clock = self.averaging.steps if getattr(self, "armed", False) and self.state else 0
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        optimizer, where = self.rule_of(group), f"param group {len(self.param_groups) - 1}"
        betas = optimizer.after_switch.beta_of
        group["sync_every"] = group_periods(group["sync_every"] or {}, optimizer.periods, betas, where)
        group["switch"] = switch_of_group(group["switch"], optimizer.switch, where)  # for checkpoints
        check_periods(self.config.deslo, group["sync_every"], f" of {where}")
        if self.armed:
            self._call("DesLoc.add_param_group", f"parameters of {[tuple(param.shape) for param in group['params']]}")
            for param in filter(trains, group["params"]):
                self._create_state(param, clock)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every replica's own, after or before the averages that are due: Algorithm 1."""
        refuse_unattached(self.armed and self._unattached)
        refuse_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.armed:
            self._take_step(self._tick if self.averaging.gradients.vote_to_skip() else self._update)
        return loss

    def _take_step(self, update: Callable[[Sequence[Cohort]], None]) -> None:
        cohorts = self.averaging.before_update()  # x, u, v <- E_m[x], E_m[u], E_m[v]   where t % K = 0
        if cohorts is not None:
            for name, rule in self.config.desloc.by_rule.items():  # u <- 0 at the step of the switch
                self._switching.make(rule.switch, [each for each in cohorts if each.group["rule"] == name])
            update(cohorts)  # u, v, x <- OPT(g)
            self.averaging.after_update(cohorts)  # t <- t + 1; what is due at t starts to travel

    @torch.no_grad()
    def skip_step(self) -> None:
        """A step without an update, which every other replica may be taking: the clock ticks and averages land."""
        if self.armed:
            self._take_step(self._tick)

    def _receive(self, cohort: Cohort, states: States, means: States) -> None:
        """Replaces every state that has landed by its mean; parameters through the outer optimizer."""
        optimizer, part, outer = self.config.desloc, self.averaging.part, self.config.desloc.outer_optimizer
        for state, mean in means.items():
            if state == PARAMS and outer:
                anchor, momentum = (part(cohort, each) for each in (OUTER_PARAMS, OUTER_MOMENTUM))
                lr = outer.rate(self.averaging.transport.replicas)
                nesterov_(states[state], mean, anchor, momentum, lr=lr, beta=outer.momentum)
            else:
                mean_(states[state], mean)
        if PARAMS in means and optimizer.reset_momenta:
            for moment in self.rule_of(cohort.group).moments:
                torch._foreach_zero_(part(cohort, moment))
            self._clock.set(cohort, cohort.steps, ORIGIN)

    def _update(self, cohorts: Sequence[Cohort]) -> None:
        """The local rule, on those parameters that have a gradient; the others only age."""
        scale, part = getattr(self, "grad_scale", None), self.averaging.part
        unscaled = {} if scale is None else {"grad_scale": scale.float().reciprocal()}
        for cohort in cohorts:
            optimizer = self.rule_of(cohort.group).at(cohort.steps)
            operator, options = UPDATES[optimizer.rule], optimizer.constants | unscaled
            self._tick([cohort._replace(params=[p for p in cohort.params if p.grad is None])])
            trained = [p for p in cohort.params if p.grad is not None]
            for t, params in self._clock.by_steps(trained, since=ORIGIN):
                states = [self.state[p] for p in params]
                tensors = {"x": params, "g": [p.grad for p in params]}
                tensors["u"] = [[state[momentum] for state in states] for momentum in optimizer.momenta]
                if optimizer.beta2 is not None:
                    tensors["v"] = [state[SECOND_MOMENT] for state in states]
                lr = _rate(cohort.group["lr"], params[0].device) * optimizer.lr_factor
                decay = float(cohort.group["weight_decay"])
                numbers = {"t": t, "lr": lr, "weight_decay": decay, **bound(options, params, self.whole)}
                try:
                    operator(**tensors, **numbers)
                except ValueError:  # before anything was written: a layout that the operator does not take, or worse
                    refuse_sparse(params, lambda param: self.averaging.members.name(param, self.param_groups))
                    with alike(tensors) as copies:
                        operator(**copies, **numbers)
                if self.averaging.flights.delayed:
                    self.averaging.flights.decay(params, self._remains(optimizer, t, lr, decay))
            if optimizer.outer_optimizer and cohort.steps < self.config.deslo.synchronous_steps:
                # the outer optimizer begins where the warm-up ends: its progress is no pseudo-gradient
                torch._foreach_copy_(part(cohort, OUTER_PARAMS), part(cohort, PARAMS))

    def _remains(self, optimizer: OptimizerConfig, t: int, lr: float | Tensor, weight_decay: float) -> dict[str, float]:
        """What update ``t`` leaves of a difference in each state; a rate on a device is read for the decay only."""
        shrinks_by = float(lr) * weight_decay if weight_decay else 0.0
        return RULES[optimizer.rule].remains(t, shrinks_by, optimizer.beta_of)

    def _tick(self, cohorts: Sequence[Cohort]) -> None:
        """No update: the rule's own count t stays where it is while the clock goes on."""
        for cohort in cohorts:
            for param in cohort.params:
                self.state[param][ORIGIN] += 1

    def _call(self, what: str, traits: str) -> None:
        """Raises ``ConfigError`` on every rank unless all have made this call. Collective."""
        if self.averaging.transport.progress:
            self.averaging.transport.progress.change(what, traits, self.config.deslo.timeout_s)

    def _create_state(self, param: Tensor, clock: int = 0) -> dict[str, Tensor]:
        """A state without updates, at step ``clock``."""
        state, rule = self.state[param], self.config.desloc.by_rule[rule_named(self.param_groups, param)]
        state |= fresh_state(param, rule, self.config.deslo.wire, self.counters, clock)
        return state

    @property
    def counters(self) -> list[str]:
        """The 0-dim states of a parameter, which stay on the host."""
        return counters_of(self.param_groups, self.config.desloc.moments_of_all)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads states and drops averages in flight; the periods, and the dtypes of states, stay those of the config.

        The state dict of a plain Adam(W) is taken over: the clock is the most often updated parameter's ``step``, and
        every parameter keeps its own count of updates for bias correction. Collective once it is attached. Raises
        ``ConfigError`` on every rank, before anything is written, for other states than the config's, or another step
        on some rank, or another switch behind them."""
        states, clock = in_own_form(self, state_dict)
        if self.armed:
            self._call("DesLoc.load_state_dict", f"{len(state_dict['param_groups'])} param group(s) of step {clock}")
            self.averaging.abandon()
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        dtypes = {param: {name: value.dtype for name, value in state.items()} for param, state in self.state.items()}
        super().load_state_dict(state_dict)
        for group, before in zip(self.param_groups, own):
            group.update({key: value for key, value in before.items() if key in OWN or key not in group})
        # torch casts floating states to the parameter's dtype, and would round the float32 momenta of bfloat16
        # parameters
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if param not in states and trains(param):
                self._create_state(param, clock)
            for name, value in states.get(param, {}).items():
                device = "cpu" if name in self.counters else param.device
                dtype = dtypes.get(param, {}).get(name, value.dtype)
                self.state[param][name] = value.detach().to(device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the states and the config, without the replicas it is attached to."""
        return super().__getstate__() | {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "armed"):  # a copy, not a load
            self._on_average, self.armed, self._unattached = None, False, True
            self.attach(SingleReplica(), list(chain.from_iterable(group["params"] for group in self.param_groups)))


def _rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A rate on the device of the parameters stays there: reading it would make the host wait."""
    return lr if isinstance(lr, Tensor) and lr.device == device else float(lr)
