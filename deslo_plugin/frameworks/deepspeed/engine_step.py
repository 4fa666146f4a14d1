"""A DeepSpeed engine's step as a step of Algorithm 1, from top to bottom."""

import logging
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from deslo_plugin.averaging.step_counter import GROUP_STEP
from deslo_plugin.errors import NonFiniteError
from deslo_plugin.frameworks.deepspeed import zero
from deslo_plugin.frameworks.versions import release
from deslo_plugin.log import log_rank0
from deslo_plugin.optim.desloc import DesLoc

ZERO_3_SINCE = (0, 19, 8)  # on CPUs, where the releases before it are not even equal to themselves


class EngineStep:
    """In place of the engine's ``_take_model_step``, which it calls: all ranks of all replicas step together.

    While the synchronous warm-up lasts, a step begins with the mean of the replicas' gradients. A step that DeepSpeed
    leaves out on one replica alone (overflow, NaN) still counts, averages and moves the learning rate."""

    def __init__(self, engine: DeepSpeedEngine, take_model_step: Callable[[Any], None]):
        self.engine, self._take_model_step = engine, take_model_step
        self._attachment, self._averaging = engine.deslo, engine.deslo.averaging

    @torch.no_grad()
    def __call__(self, lr_kwargs: Any) -> None:
        engine, attachment = self.engine, self._attachment
        if engine.global_steps < attachment.config.deslo.synchronous_steps:
            self._averaging.gradients.average(engine.global_steps + 1, zero.gradients(engine))
        try:
            with self._averaging.launches_held():  # ZeRO-3 ends its step with a synchronisation of the device
                if isinstance(attachment.optimizer, DesLoc):
                    self._step_desloc(lr_kwargs)
                else:
                    self._step_any_optimizer(lr_kwargs)
        except NonFiniteError as error:
            raise self._explain(error) from error
        if self._averaging.watch:
            attachment.watch.step_ended(of_engine=True)
        attachment.recorder.step_ended()

    def _step_desloc(self, lr_kwargs: Any) -> None:
        """Its own ``step`` is Algorithm 1; ZeRO calls that once for each part of the parameters."""
        self._take_model_step(lr_kwargs)
        if not self.engine._step_applied:
            for _ in zero.each_sub_group(self.engine):
                self._attachment.optimizer.skip_step()
            zero.copy_masters_to_model(self.engine)
            self._count_skipped(lr_kwargs)

    def _step_any_optimizer(self, lr_kwargs: Any) -> None:
        for group in self._averaging.groups:
            group[GROUP_STEP] = self.engine.global_steps  # survives a resume
        cohorts = self._averaging.before_update()
        if cohorts is not None:
            self._take_model_step(lr_kwargs)
            if not self.engine._step_applied:
                self._count_skipped(lr_kwargs)
            self._averaging.learn_states(self.engine._step_applied)
            self._averaging.after_update(cohorts)
        if self._averaging.deslo.average_at == "after_step" or not self.engine._step_applied:
            zero.copy_masters_to_model(self.engine)

    def _count_skipped(self, lr_kwargs: Any) -> None:
        self._attachment.stats.skipped_steps += 1
        log_rank0(
            f"deslo: step {self.engine.global_steps} skipped on replica {self._attachment.topology.replica} (gradient "
            "not finite); it keeps its state and averages with the others",
            logging.WARNING,
        )
        if self.engine.lr_scheduler is not None:
            self.engine.lr_scheduler.step(**(lr_kwargs or {}))

    def _explain(self, error: NonFiniteError) -> NonFiniteError:
        """NaN that DeepSpeed itself is known for is named as such: a lower rate would not help."""
        partitioned = self.engine.zero_optimization_partition_weights()
        if partitioned and release("deepspeed") < ZERO_3_SINCE and self.engine.device.type == "cpu":
            return NonFiniteError(
                f"{error}; but first of all take DeepSpeed 0.19.8 or later: the ZeRO-3 of {deepspeed.__version__} "
                "gives NaN on CPUs by itself, at any lr"
            )
        return error
