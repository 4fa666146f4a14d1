"""What cannot be shared inside a replica: refused before the first step, on every rank, with what to do."""

import re

import pytest

from tests.support import parallel_error_jobs as jobs
from tests.support.worlds import Processes


@pytest.mark.parametrize("kind", jobs.MISTAKES)
def test_a_mistake_is_refused_on_every_rank(four, kind):
    errors = four().run(jobs.refused, kind)
    assert len({error.split(";")[0] for error in errors}) == 1, errors
    assert re.match(f"ConfigError: (attach.model. )?{jobs.MISTAKES[kind][1]}", errors[0]), errors[0]


def test_replicas_of_unequal_size_are_refused(tmp_path):
    world = Processes(4, tmp_path)  # its groups are uneven
    try:
        for wrap in ("fsdp", "ddp"):
            for error in world.run(jobs.uneven, wrap):
                assert re.match(
                    r"ConfigError: attach.model.: expected replicas of equally many ranks.*got the groups \[0, 1, 2\], "
                    r"\[3\]; wrap the model on one dimension of mesh",
                    error,
                ), error
    finally:
        world.close()
