"""Runs a training script that cannot be edited, with DesLoc known to DeepSpeed.

    deepspeed --module deslo_plugin.run train.py --its --own arguments
    torchrun --nproc_per_node 4 -m deslo_plugin.run train.py --its --own arguments
"""

import runpy
import sys
from pathlib import Path

import deslo_plugin  # noqa: F401  (teaches DeepSpeed our optimizer)


def main() -> None:
    """Runs ``sys.argv[1]`` as ``__main__`` with the arguments after it."""
    # launchers put their own --local_rank=... before the script's name
    launcher = [argument for argument in sys.argv[1:2] if argument.startswith("--local_rank")]
    script, *arguments = sys.argv[1 + len(launcher) :] or [""]
    if not Path(script).is_file():
        sys.exit(f"deslo_plugin.run: expected the path of a training script, got {script!r}; "
                 "write: deepspeed --module deslo_plugin.run train.py ...")
    sys.argv = [script, *launcher, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
