"""DeepSpeed: ``import deslo_plugin`` and two JSON blocks. Imported only after DeepSpeed itself."""

from deslo_plugin.frameworks.deepspeed import export, state_tree  # noqa: F401  (they say what of an engine is saved)
from deslo_plugin.frameworks.deepspeed.engine import install

__all__ = ["install"]
