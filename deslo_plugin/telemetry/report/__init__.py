"""What runs have written (``deslo.telemetry``), as figures, charts and a page: ``deslo report``."""
