"""Algorithm 1: what is due starts, travels and lands."""
