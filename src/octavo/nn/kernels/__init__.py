"""Kernels in C++, built on the machine they run on."""
