"""Names of earlier versions: who writes one is told the name of today, by an error and never by a silent alias."""

import importlib.abc
import sys
from collections.abc import Mapping
from typing import NoReturn

FUNCTIONS: Mapping[str, str] = {
    "latest": "latest_checkpoint",
    "meet": "sync_replicas",
    "one_replica": "local_state_dict",
    "saved_state_dict": "load_averaged_state_dict",
}
MODULES: Mapping[str, str] = {
    "collectives": "comm.transport",
    "forecast": "planning.forecast",
    "frameworks.attachment": "attachment",
    "frameworks.checkpoint": "checkpoint.save_load",
    "frameworks.fsdp": "frameworks.fsdp2",
    "frameworks.trainer": "frameworks.hf_trainer",
    "ops": "kernels.update",
    "optimizer": "optim.desloc",
    "plan": "planning.plan",
    "rules": "algorithm.rules",
    "schedule": "algorithm.schedule",
    "stock": "optim.any_optimizer",
    "strict": "errors",
    "sync": "averaging.synchronizer",
    "topology": "comm.topology",
    "weights": "comm.sample_weights",
}


def explain(owner: str, name: str, renamed: Mapping[str, str]) -> AttributeError:
    """What ``owner.name`` raises."""
    today = f"; it is called {owner}.{renamed[name]} now" if name in renamed else ""
    return AttributeError(f"{owner} has no attribute {name!r}{today}", name=name)


class Renamed:
    """An attribute of earlier versions: raises what ``explain`` gives, and hides no other error of its class."""

    def __init__(self, today: str):
        self._today = today

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise explain(owner.__name__, self._name, {self._name: self._today})


class _Moved(importlib.abc.MetaPathFinder):
    """The last finder: it sees what no other has found."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        package, _, module = fullname.partition(".")
        if package == "deslo_plugin" and module in MODULES:
            raise ModuleNotFoundError(
                f"{fullname} is deslo_plugin.{MODULES[module]} now; import what is public from deslo_plugin itself",
                name=fullname,
            )


def explain_moved_modules() -> None:
    """Makes an import of a module that has moved say where it is."""
    sys.meta_path.append(_Moved())
