"""Octavo: from raw text to a language model you can talk to, on the machine you have."""

__version__ = "0.1.0"
