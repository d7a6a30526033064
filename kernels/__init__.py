"""Triton kernels, installed as ``transformer_fast.kernels``.

The folder stands at the top of the repository, beside ``csrc/``; ``package_dir`` in setup.py maps
it into the package. Nothing here imports torch: the adapter, ``transformer_fast/backends/triton.py``, launches.
"""
