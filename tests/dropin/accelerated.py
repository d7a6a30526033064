"""The doors to SDPA that accelerate() watches, and what of PyTorch it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as imported_before  # before any accelerate()

from transformer_fast.dropin.report import Report

FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def by_name(*args: Any, **kwargs: Any) -> Tensor:
    """As nearly all models call it."""
    return F.scaled_dot_product_attention(*args, **kwargs)


def flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
    """The operator below."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=is_causal, attn_mask=attn_mask
    )[0]


DOORS: dict[str, Callable[..., Tensor]] = {
    "by_name": by_name,
    "imported_before": imported_before,
    "operator": torch.ops.aten.scaled_dot_product_attention,
}
each_door = pytest.mark.parametrize("door", DOORS)


def pytorch_state() -> dict[str, Any]:
    """All that accelerate() changes."""
    ops = (FLASH, f"{FLASH}_backward", "aten::scaled_dot_product_attention")
    return {
        "name": F.scaled_dot_product_attention,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "cache": torch.compiler.config.cache_key_tag,
        **{op: torch._C._dispatch_dump(op) for op in ops},
    }


def taken_of(report: Report) -> list[bool]:
    return [site.taken for site in report]
