"""DeepSpeed: ``import deslo_plugin`` and two JSON blocks. Imported only after DeepSpeed itself."""

from deslo_plugin.frameworks.deepspeed import export  # noqa: F401  (it says what one model is of any engine)
from deslo_plugin.frameworks.deepspeed.engine import install

__all__ = ["install"]
