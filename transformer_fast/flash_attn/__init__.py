"""flash-attn 2's interface on every back end: the CPU too, float32, any head_dim, all gradients.

``from transformer_fast.flash_attn import flash_attn_func`` where the code is yours; :func:`install_as_flash_attn` for
code that says ``import flash_attn``.
"""

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .install import Installation, install_as_flash_attn, uninstall_as_flash_attn

__all__ = [
    "Installation",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_as_flash_attn",
    "uninstall_as_flash_attn",
]
