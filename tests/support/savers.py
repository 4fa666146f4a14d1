"""What tests of somebody else's saver share: configs, the bare module, and the messages of a rank."""

import logging

EVERY_4 = {"params": {"rule": "adam", "lr": 1e-2, "sync_every": {"params": 4, "exp_avg": 4, "exp_avg_sq": 4}}}


def config_of(kind, mode, **deslo):
    size = 1 if kind in ("plain", "ddp") else 2
    config = {"optimizer": {"type": "DesLoc"} | EVERY_4, "deslo": {"replica_size": size, "state_dict": mode} | deslo}
    return config | ({"zero_optimization": {"stage": int(kind.split()[1])}} if kind.startswith("zero") else {})


def module_of(model):
    return model.module if hasattr(model, "module") else model


class Lines(logging.Handler):
    """What deslo_plugin says."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())

    def __enter__(self):
        logger = logging.getLogger("deslo_plugin")
        self.before, _ = logger.level, logger.addHandler(self)
        logger.setLevel(logging.INFO)
        return self.said

    def __exit__(self, *_):
        logging.getLogger("deslo_plugin").removeHandler(self)
        logging.getLogger("deslo_plugin").setLevel(self.before)
