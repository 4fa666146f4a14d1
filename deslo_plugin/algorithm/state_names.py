"""What each averaged state is called: the keys of ``optimizer.state[p]``, of ``sync_every`` and of every report.

The parameters are x in the papers, ``exp_avg``, ``exp_avg_2``, ... the first momenta u^1, u^2, ... and
``exp_avg_sq`` the second momentum v. They are torch's own names, so that tools which know Adam know these.
"""

PARAMS = "params"
SECOND_MOMENT = "exp_avg_sq"

BUFFERS = "buffers"  # of the model, averaged with the parameters
GRADIENTS = "gradients"  # averaged at every step of a synchronous warm-up

STEP = "step"  # completed optimizer steps of this parameter: the clock of every period
ORIGIN = "origin"  # clock value at which the rule's own count t began (skipped steps and resets move it)
OUTER_PARAMS = "outer_params"  # parameters after the last outer step (outer optimizer only)
OUTER_MOMENTUM = "outer_momentum"


def period_key(state: str) -> str:
    """Where a parameter keeps the period in force of a ``state`` whose period adapts; 0 before its first average."""
    return f"{state}_every"


def common_key(state: str) -> str:
    """Where a parameter keeps what all replicas had in common at the last average of a ``state`` that travels as a
    difference."""
    return f"{state}_common"


def error_key(state: str) -> str:
    """Where it keeps what was lost of that average, if that is sent with the next."""
    return f"{state}_error"


def is_of_wire(name: str) -> bool:
    """Whether a state serves averages in few bits alone: training goes on without it."""
    return name.endswith((common_key(""), error_key("")))


def first_momenta(count: int) -> tuple[str, ...]:
    """``("exp_avg", "exp_avg_2", ..., "exp_avg_<count>")``."""
    return tuple("exp_avg" if j == 1 else f"exp_avg_{j}" for j in range(1, count + 1))
