"""Many replicas in one process, one row of a matrix each: what an algorithm does at M = 4 or M = 256, on a laptop.

The optimizer is ``DesLoc`` itself, as it trains across nodes; only the transport is another, a mean over rows.
"""

from deslo_plugin.simulation.membership import Failures, Growth
from deslo_plugin.simulation.module_objective import Network
from deslo_plugin.simulation.objectives import Logistic, Objective, Quadratic, Rosenbrock
from deslo_plugin.simulation.replicas import Replicas
from deslo_plugin.simulation.run import SimulationStep, simulate, warmup_cosine

__all__ = [
    "Failures",
    "Growth",
    "Logistic",
    "SimulationStep",
    "Network",
    "Objective",
    "Quadratic",
    "Replicas",
    "Rosenbrock",
    "simulate",
    "warmup_cosine",
]
