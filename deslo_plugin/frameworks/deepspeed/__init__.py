"""DeepSpeed: ``import deslo_plugin`` and two JSON blocks. Imported only after DeepSpeed itself."""

from deslo_plugin.frameworks.deepspeed.engine import install
from deslo_plugin.frameworks.deepspeed.export import averaged_state_dict

__all__ = ["averaged_state_dict", "install"]
