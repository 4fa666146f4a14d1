"""DeepSpeed: ``import deslo_plugin`` and two JSON blocks. Imported only after DeepSpeed itself."""

from deslo_plugin.frameworks.deepspeed.engine import Attachment, install
from deslo_plugin.frameworks.deepspeed.export import averaged_state_dict

__all__ = ["Attachment", "averaged_state_dict", "install"]
