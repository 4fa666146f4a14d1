"""The tests, in a folder for each folder of the package; what they share is in ``tests.support``."""
