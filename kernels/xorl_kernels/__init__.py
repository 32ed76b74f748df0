"""Kernels of the training server, each with a plain PyTorch twin."""
