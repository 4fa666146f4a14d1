"""What one rank does alone, at any place in a period: never a hang, and an error or the right values on every rank."""

import pytest
import torch.distributed as dist

import deslo_plugin
from tests.support import sequence_jobs
from tests.support.sequence_oracle import Oracle, apart

WHO, STEPS, LIMIT = 1, 6, 300
PERIODS = {"params": 2, "exp_avg": 4, "exp_avg_sq": 4}


class Job(sequence_jobs.Job):
    """What ``WHO`` may do alone; see ``sequence_jobs.Job`` for the rest."""

    def save(self):
        deslo_plugin.save(self.folder / "alone", self.model)

    def load(self):
        deslo_plugin.load(self.folder / "before", self.model)

    def averaged(self):
        deslo_plugin.averaged_state_dict(self.model)

    def evaluate(self):
        with deslo_plugin.averaged_weights(self.model):
            pass

    def state_of_model(self):
        self.model.state_dict()

    def state_of_optimizer(self):
        self.optimizer.state_dict()


# All ranks must make these calls: who makes one alone is told, nothing was sent, and all may go on as if it had not
# been made.
CALLS = ["save", "load", "average_now", "averaged", "evaluate", "state_of_model", "state_of_optimizer"]
# These change what is averaged, and replicas that disagree on it cannot go on.
CHANGES = ["freeze", "join", "load_optimizer"]
# These are a replica's own business.
OWN = ["keep", "write"]
ARGUMENTS = {"write": ("add", None), "load_optimizer": (WHO,)}


def alone(wrap, stock, what, at, number, folder):
    """(What the call alone raised, what training raised, this replica's states)."""
    from deslo_plugin.comm import progress, replica_transport

    monkeypatch = pytest.MonkeyPatch()
    for module, name, seconds in (
        (replica_transport, "PEER_CHECK_INTERVAL_S", 0.2),
        (progress, "LOOK_EVERY", 0.2),
        (progress, "STORE_TIMEOUT_S", 2.0),
    ):
        monkeypatch.setattr(module, name, seconds)  # impatient, so that many cases fit into a test
    # groups of its own, by their time limit: what is left of an average that failed must meet nobody else's
    deslo = {"timeout_s": 60.0 + number, "state_dict": "averaged" if what.startswith("state_of") else "refuse"}
    job, said = Job(wrap, PERIODS, deslo, stock, folder), ""
    deslo_plugin.save(job.folder / "before", job.model)
    try:
        for _ in range(at):
            job.train()
        if dist.get_rank() == WHO:
            try:
                getattr(job, what)(*ARGUMENTS.get(what, ()))
            except deslo_plugin.ConfigError as error:
                if what not in CALLS:
                    raise
                said = str(error)
        for _ in range(STEPS - at):
            job.train()
    except Exception as error:
        return said, f"{type(error).__name__}: {error}", {}
    finally:
        monkeypatch.undo()
    return said, "", job.states()


CASES = [("plain", stock, what) for stock in (False, True) for what in CALLS + CHANGES + OWN] + [
    ("ddp", False, what) for what in ("save", "freeze", "join", "write")
]


@pytest.mark.parametrize("wrap, stock, what", CASES)
def test_what_one_rank_does_alone_ends_alike_on_every_rank(four, wrap, stock, what, tmp_path):
    for at in range(PERIODS["params"] + 1):  # before the first step, inside a period, and where an average is to land
        number = at + 4 * CASES.index((wrap, stock, what))
        results = four().run(alone, wrap, stock, what, at, number, tmp_path / str(at), timeout=LIMIT)
        oracle = Oracle(sequence_jobs.RANKS, PERIODS, {}, stock)
        for step in range(STEPS):
            if step == at and what == "write":
                oracle.write("add", WHO)
            oracle.train()
        equal = at == 0 and what.startswith("state_of")  # replicas do not differ yet, so that nobody needs be asked
        for rank, (said, error, states) in enumerate(results):
            assert bool(error) == (what in CHANGES), (rank, at, error)
            assert bool(said) == (rank == WHO and what in CALLS and not equal), (rank, at, said)
            for name, value in states.items():
                state, param = name.split(" of ")
                assert apart(value, oracle.state[rank][state][param]) <= 1e-4, (rank, at, name)
