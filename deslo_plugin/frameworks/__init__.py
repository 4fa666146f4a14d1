"""One adapter per framework; each imports its framework only when that is imported by the user."""
