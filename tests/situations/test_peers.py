"""What ranks tell each other is data: nothing that a peer sends is run, and numpy is not needed for it."""

import pickle
import sys

import pytest
import torch.distributed as dist

from deslo_plugin import ConfigError
from deslo_plugin.comm.consistency import check_same_on_all_ranks
from deslo_plugin.comm.process_groups import all_gather_by_rank


class Blocked:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pickle" or name.split(".")[0] == "numpy":
            raise ImportError(f"{name} was asked for")


def exchanged() -> list:
    rank = dist.get_rank()
    plain = [None, True, rank, 0.1 + rank, float("inf"), "ä" * (1 + 40 * rank), {"a": [1, {"b": None}]}, {}, []]
    loads, asked = pickle.Unpickler, Blocked()
    sys.meta_path.insert(0, asked)
    pickle.Unpickler = None
    try:
        return [
            all_gather_by_rank(plain),
            all_gather_by_rank(rank == 2),
            all_gather_by_rank(ConfigError("a", "b", "c", f"d{rank}") if rank else None),
        ]
    finally:
        sys.meta_path.remove(asked)
        pickle.Unpickler = loads


def test_plain_values_and_config_errors_reach_every_rank_as_they_were(four):
    for values, flags, errors in four().run(exchanged):
        for rank in range(4):
            assert values[rank] == [
                None,
                True,
                rank,
                0.1 + rank,
                float("inf"),
                "ä" * (1 + 40 * rank),
                {"a": [1, {"b": None}]},
                {},
                [],
            ]
        assert flags == {0: False, 1: False, 2: True, 3: False}
        assert errors.pop(0) is None
        assert [str(error) for error in errors.values()] == [f"a: expected b, got c; d{rank}" for rank in (1, 2, 3)]
        assert all(isinstance(error, ConfigError) for error in errors.values())


class Code:
    def __reduce__(self) -> tuple:
        return print, ("this ran on a peer",)


def test_what_is_not_data_is_refused_where_it_would_be_sent(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="expected plain data or a ConfigError, got Code"):
            all_gather_by_rank({"a": Code()})
        check_same_on_all_ranks("nothing", {"a": 1}, do="nothing")
    finally:
        dist.destroy_process_group()
