"""Runs a training script that cannot be edited, with DesLoc known to DeepSpeed.

deepspeed --module deslo_plugin.run train.py --its --own arguments
torchrun --nproc_per_node 4 -m deslo_plugin.run train.py --its --own arguments
"""

import os
import runpy
import sys
import time
from pathlib import Path

import deslo_plugin  # noqa: F401  (its hooks)
from deslo_plugin.comm.consistency import first_to_say
from deslo_plugin.errors import ConfigError, NonFiniteError
from deslo_plugin.frameworks.import_hooks import on_import

HEARD_S = 2.0  # in which one process of a node says what is wrong, before the launcher ends it as another has ended


def main() -> None:
    """Runs ``sys.argv[1]`` as ``__main__`` with the arguments after it."""
    # launchers put their own --local_rank=... before the script's name
    launcher = [argument for argument in sys.argv[1:2] if argument.startswith("--local_rank")]
    script, *arguments = sys.argv[1 + len(launcher) :] or [""]
    if not Path(script).is_file():
        if os.environ.get("LOCAL_RANK", "0") != "0":  # a script may be missing on one node
            time.sleep(HEARD_S)
            sys.exit(1)
        sys.exit(
            f"deslo_plugin.run: expected the path of a training script, got {script!r}; "
            "write: deepspeed --module deslo_plugin.run train.py ..."
        )
    sys.argv = [script, *launcher, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    on_import("deepspeed", _expect_us)
    try:
        runpy.run_path(script, run_name="__main__")
    except (ConfigError, NonFiniteError) as error:  # on every rank
        if not first_to_say(str(error)):
            sys.exit(1)
        raise


def _expect_us() -> None:
    from deslo_plugin.frameworks.deepspeed import engine

    engine.expected = True


if __name__ == "__main__":
    main()
