"""Scripts that train, to be started by their paths; ``examples.harness`` is what the larger ones share."""
