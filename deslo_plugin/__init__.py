from deslo_plugin.optimizer import DesLoc
