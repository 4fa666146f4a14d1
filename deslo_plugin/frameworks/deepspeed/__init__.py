"""DeepSpeed: ``import deslo_plugin`` and two JSON blocks. Imported only after DeepSpeed itself."""

from deslo_plugin.frameworks.deepspeed.engine import install

__all__ = ["install"]
