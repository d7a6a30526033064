"""The repair of Triton's interpreter: without it bfloat16 could not be judged there."""

from __future__ import annotations

import torch


def test_bfloat16_means_bfloat16() -> None:
    """Casts round to nearest even, and a product multiplies numbers, not their bit patterns."""
    import triton
    import triton.language as tl

    @triton.jit
    def ask(wide, narrow, product, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        x = tl.load(wide + at).to(tl.bfloat16)
        tl.store(narrow + at, x)
        tl.store(product + at, tl.dot(x, x))

    wide = torch.randn(16, 16)
    wide[0, :4] = torch.tensor([float("nan"), float("inf"), 1.00390625, 3.3e38])  # 1 + 2^-8: a tie
    narrow, product = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    ask[(1,)](wide, narrow, product, N=16)
    wanted = wide.to(torch.bfloat16)
    assert torch.equal(narrow.nan_to_num(7.0), wanted.nan_to_num(7.0)) and narrow[0, 0].isnan()
    torch.testing.assert_close(product[1:, 4:], (wanted[1:].float() @ wanted.float())[:, 4:], equal_nan=True)
