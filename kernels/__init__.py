"""Raw Triton kernels and their launchers; they import torch and triton only.

This directory imports as ``fastagglo.kernels``.
"""
