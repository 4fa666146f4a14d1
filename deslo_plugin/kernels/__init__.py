"""The operators, each with its reference in torch."""
