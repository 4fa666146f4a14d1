from pathlib import Path

import pytest
from worlds import Processes


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    """Four real gloo ranks, started once; started again if a test broke them."""
    worlds: list[Processes] = []

    def world() -> Processes:
        if not worlds or not worlds[-1].alive:
            worlds.append(Processes(4, Path(tmp_path_factory.mktemp("world"))))
        return worlds[-1]

    yield world
    for each in worlds:
        each.close()
