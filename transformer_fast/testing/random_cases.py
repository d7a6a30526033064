"""Random attention problems: every option drawn independently, sizes biased to the awkward ones.

The source of randomness is a `random.Random`, so that a plain seeded one serves for fuzzing and hypothesis's
`st.randoms()`, which shrinks, for property tests.
"""

from __future__ import annotations

from random import Random
from typing import Any

from transformer_fast.testing.cases import (
    BIAS_FORMS,
    BIAS_KINDS,
    DOUTS,
    LAYOUTS,
    PADDINGS,
    Case,
)

#: Around the sizes of tiles and vectors, where kernels go wrong.
AWKWARD = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


def random_case(rng: Random, *, max_seqlen: int = 160, max_head_dim: int = 160) -> Case:
    """Draws a case of at most `max_seqlen` tokens a side and `max_head_dim` elements a head."""
    num_kv_heads = rng.choice((1, 2, 3))
    head_dim = _size(rng, max_head_dim)
    options: dict[str, Any] = dict(
        num_heads=num_kv_heads * rng.choice((1, 1, 2, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=rng.choice((head_dim, head_dim, _size(rng, max_head_dim))),
        causal=rng.choice((False, True)),
        window_size=_window(rng, max_seqlen),
        alibi=rng.choice((None, None, None, "heads", "batch_heads")),
        softcap=rng.choice((None, None, None, 1.0, 20.0)),
        sinks=rng.choice((None, None, None, "finite", "some_minus_inf")),
        softmax_scale=rng.choice((None, None, 0.1)),
        dropout_p=rng.choice((0.0, 0.0, 0.0, 0.25)),
        deterministic=rng.choice((False, False, True)),
        lse_gradient=rng.choice((False, False, True)),
        poison=rng.choice((False, True)),
        dout=rng.choice(DOUTS),
        layout=rng.choice(LAYOUTS),
        key_growth=rng.choice((1.0, 1.0, 4.0)),
    )
    kind = rng.random()
    options |= (_packed if kind < 0.3 else _paged if kind < 0.45 else _padded)(rng, max_seqlen)
    if options.get("page_size") is not None and options["poison"]:
        options["shared_pages"] = 0  # what one sequence sees, another does not
    if options.get("seqlens_q") is not None and options["layout"] not in ("contiguous", "heads_last", "gaps"):
        options["layout"] = "gaps"  # the other two speak of a batch dimension
    return Case("random", f"random_{rng.getrandbits(32):08x}", **options)


def _size(rng: Random, largest: int) -> int:
    awkward = [n for n in AWKWARD if n <= largest]
    return rng.choice(awkward) if rng.random() < 0.5 else rng.randint(1, largest)


def _window(rng: Random, max_seqlen: int) -> tuple[int | None, int | None] | None:
    if rng.random() < 0.5:
        return None
    sides = (None, 0, rng.randint(0, 8), rng.randint(0, max_seqlen))
    return rng.choice(sides), rng.choice(sides)


def _padded(rng: Random, max_seqlen: int) -> dict[str, Any]:
    batch = rng.choice((1, 2, 3))
    seqlen_k = _size(rng, max_seqlen)
    seqlen_q = rng.choice((1, rng.randint(1, 8), _size(rng, max_seqlen), seqlen_k, seqlen_k))
    lengths = tuple(rng.randint(0, seqlen_k) for _ in range(batch))
    return dict(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        seqlens_k=rng.choice((None, None, lengths)),
        padding=rng.choice((None, None, None, *PADDINGS)),
        bias=rng.choice((None, None, None, *BIAS_KINDS)),
        bias_form=rng.choice(BIAS_FORMS),
    )


def _paged(rng: Random, max_seqlen: int) -> dict[str, Any]:
    batch = rng.choice((1, 2, 3))
    seqlen_k = _size(rng, max_seqlen)
    return dict(
        batch=batch,
        seqlen_q=rng.choice((1, 1, rng.randint(1, 8), _size(rng, max_seqlen))),
        seqlen_k=seqlen_k,
        seqlens_k=tuple(rng.choice((0, 1, seqlen_k, rng.randint(0, seqlen_k))) for _ in range(batch)),
        page_size=rng.choice((1, 7, 16, 64, _size(rng, max_seqlen))),
        shared_pages=rng.choice((0, 0, 1, 3)),
        layout=rng.choice(("contiguous", "heads_last", "gaps", "sequence_first")),
        dropout_p=0.0,
        deterministic=False,
        lse_gradient=False,
    )


def _packed(rng: Random, max_seqlen: int) -> dict[str, Any]:
    batch = rng.randint(1, 4)
    lengths = tuple(rng.choice((0, 1, _size(rng, max_seqlen))) for _ in range(batch))
    unlike = tuple(rng.choice((0, 1, _size(rng, max_seqlen))) for _ in range(batch))
    return dict(seqlens_q=lengths, seqlens_k=rng.choice((lengths, unlike)))
