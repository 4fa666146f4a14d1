"""Where DeepSpeed makes the host wait for the whole device, and with it for averages in flight."""

import logging

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from deslo_plugin.log import log_rank0


def let_averages_travel(engine: DeepSpeedEngine) -> None:
    """Turns off what would end the overlap of averages of ``engine`` at every step, and says what a setting costs."""
    if not engine.deslo.config.deslo.overlap_comm:
        return
    if get_accelerator().resolves_data_dependency():  # as the CPU does, which nothing waits for
        return
    timer = engine.tput_timer.config
    if timer.enabled and timer.synchronized:
        timer.synchronized = False
        log_rank0(
            "deslo: timers.throughput.synchronized is off in this engine: it would wait for averages in flight at the "
            "end of every step; samples per second count the time of the host"
        )
    if engine.deslo.config.deslo.sync_delay > 1 and getattr(engine.optimizer, "persistent_parameters", None):
        log_rank0(
            "deslo: ZeRO-3 waits for the device at the end of each step, where it gathers parameters that it keeps "
            "whole: an average travels under one step only, whatever deslo.sync_delay says; set "
            "zero_optimization.stage3_param_persistence_threshold to 0",
            logging.WARNING,
        )
    if engine.zero_optimization_stage() in (1, 2) and engine.zero_overlap_comm():
        log_rank0(
            "deslo: zero_optimization.overlap_comm waits for the device at the end of each backward: an average "
            "travels under the first micro-batch only; set it to false",
            logging.WARNING,
        )
