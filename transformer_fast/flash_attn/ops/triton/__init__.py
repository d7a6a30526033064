"""Stands where flash-attn has its Triton operations; what is here is plain PyTorch."""
