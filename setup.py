"""Metadata is in pyproject.toml; this file is the place where the native extension is built from csrc/."""

from setuptools import setup

setup()
