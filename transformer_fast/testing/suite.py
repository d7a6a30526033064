"""The list of cases that every back end has to pass: each variant by itself, at awkward sizes, and in combination."""

from __future__ import annotations

from typing import Any

from transformer_fast.testing.cases import BIAS_FORMS, Case

ODD_SIZES = (1, 17, 63, 129)
PAGE_SIZES = (1, 7, 16, 64, 128, 256)
HEAD_DIMS = (1, 17, 40, 63, 64, 80, 96, 128, 129, 256, 320)


def standard_cases() -> list[Case]:
    """The conformance suite, in reporting order. Names are unique."""
    cases = [
        *_full(),
        *_causal(),
        *_windows(),
        *_key_lengths(),
        *_padding(),
        *_bias(),
        *_score_options(),
        *_dropout(),
        *_heads(),
        *_head_dims(),
        *_decode(),
        *_packed(),
        *_paged(),
        *_layouts(),
        *_poisoned(),
        *_combinations(),
        *_empty(),
    ]
    names = [c.name for c in cases]
    assert len(set(names)) == len(names), "case names must be unique"
    return cases


def _named(variant: str, **cases: dict[str, Any]) -> list[Case]:
    return [Case(variant, name, **options) for name, options in cases.items()]


def _full() -> list[Case]:
    return [
        *(Case("full", f"full_{n}", seqlen_q=n, core=n in (17, 129)) for n in ODD_SIZES),
        *_named(
            "full",
            full_long_keys=dict(seqlen_q=17, seqlen_k=300),
            full_long_queries=dict(seqlen_q=300, seqlen_k=17),
            full_growing_maximum=dict(seqlen_q=65, seqlen_k=300, key_growth=6.0, core=True),
            full_falling_maximum=dict(seqlen_q=65, seqlen_k=300, key_growth=1 / 6),
            full_large_logits=dict(seqlen_q=63, seqlen_k=129, score_size=10.0),
            full_lse_gradient=dict(seqlen_q=63, seqlen_k=129, lse_gradient=True, core=True),
            full_deterministic=dict(seqlen_q=129, deterministic=True),
        ),
    ]


def _causal() -> list[Case]:
    return [
        *(Case("causal", f"causal_{n}", seqlen_q=n, causal=True, core=n in (17, 129)) for n in ODD_SIZES),
        *_named(
            "causal",
            causal_more_keys=dict(seqlen_q=63, seqlen_k=200, causal=True, core=True),
            causal_one_more_key=dict(seqlen_q=64, seqlen_k=65, causal=True),
            # Here the first rows see nothing.
            causal_more_queries=dict(seqlen_q=200, seqlen_k=63, causal=True, core=True),
            causal_one_more_query=dict(seqlen_q=65, seqlen_k=64, causal=True),
            causal_long=dict(seqlen_q=513, num_heads=1, batch=1, causal=True),
            causal_growing_maximum=dict(seqlen_q=257, causal=True, key_growth=6.0),
            causal_lse_gradient=dict(seqlen_q=65, seqlen_k=60, causal=True, lse_gradient=True),
        ),
    ]


def _windows() -> list[Case]:
    sides: dict[str, tuple[int | None, int | None]] = {
        "left": (20, None),
        "right": (None, 20),
        "both": (16, 8),
        "self_only": (0, 0),
        "minus_one": (-1, 5),
        "unbounded": (None, None),
        "wider_than_all": (1000, 1000),
    }
    cases = [
        Case("window", f"window_{name}", seqlen_q=129, window_size=w, core=name in ("left", "right", "both"))
        for name, w in sides.items()
    ]
    cases += [
        Case("window", f"window_{name}_causal", seqlen_q=129, window_size=sides[name], causal=True, core=name == "left")
        for name in ("left", "right", "both", "self_only")
    ]
    cases += _named(
        "window",
        window_more_keys=dict(seqlen_q=63, seqlen_k=200, window_size=(30, 4)),
        # The first rows stand before the first key and see nothing.
        window_more_queries=dict(seqlen_q=200, seqlen_k=63, window_size=(30, 4)),
        window_long=dict(batch=1, num_heads=1, seqlen_q=700, window_size=(64, 0), causal=True),
        window_tile_aligned=dict(seqlen_q=256, window_size=(63, 64)),
    )
    return cases


def _key_lengths() -> list[Case]:
    lengths = (0, 1, 17, 64, 100)
    common: dict[str, Any] = dict(batch=5, seqlen_q=40, seqlen_k=100, seqlens_k=lengths)
    return _named(
        "seqlens_k",
        lengths_full=dict(common, core=True),
        lengths_causal=dict(common, causal=True, core=True),
        lengths_window=dict(common, window_size=(12, 5)),
        lengths_window_causal=dict(common, window_size=(12, None), causal=True),
        lengths_all_zero=dict(batch=2, seqlen_q=5, seqlen_k=9, seqlens_k=(0, 0)),
        lengths_lse_gradient=dict(common, lse_gradient=True),
    )


def _padding() -> list[Case]:
    common: dict[str, Any] = dict(batch=4, seqlen_q=70, seqlen_k=100)
    return _named(
        "key_padding_mask",
        padding_left=dict(common, padding="left", core=True),
        padding_right=dict(common, padding="right", core=True),
        padding_holes=dict(common, padding="holes", core=True),
        padding_empty_entries=dict(common, padding="empty_entries", core=True),
        padding_left_causal=dict(common, padding="left", causal=True),
        padding_holes_causal_window=dict(common, padding="holes", causal=True, window_size=(25, None)),
        padding_right_window=dict(common, padding="right", window_size=(25, 9)),
        padding_and_lengths=dict(common, padding="holes", seqlens_k=(100, 3, 50, 0)),
        padding_one_key=dict(batch=3, seqlen_q=4, seqlen_k=1, padding="holes"),
    )


def _bias() -> list[Case]:
    common: dict[str, Any] = dict(batch=2, num_heads=4, num_kv_heads=2, seqlen_q=35, seqlen_k=70)
    core_forms = ("bhqk", "1hqk", "b11k")
    return [
        *(
            Case("bias", f"bias_{form}", bias="float", bias_form=form, **common, core=form in core_forms)
            for form in BIAS_FORMS
        ),
        *_named(
            "bias",
            bias_causal=dict(common, bias="float", causal=True, bias_form="1hqk"),
            bias_window=dict(common, bias="float", window_size=(9, 9)),
            bias_minus_inf=dict(common, bias="float_some_minus_inf", core=True),
            bias_high=dict(common, bias="float_high", bias_form="1hqk"),
            bias_lowest=dict(common, bias="float_lowest", bias_form="b1qk"),
            bias_lowest_rows=dict(common, bias="float_lowest_rows", bias_form="b1qk"),
            bias_lowest_rows_sinks=dict(common, bias="float_lowest_rows", bias_form="qk", sinks="finite"),
            bias_lse_gradient=dict(common, bias="float", lse_gradient=True),
        ),
        *_named(
            "boolean mask",
            mask_bool=dict(common, bias="bool", core=True),
            mask_bool_qk=dict(common, bias="bool", bias_form="qk"),
            mask_bool_b11k=dict(common, bias="bool", bias_form="b11k"),
            mask_bool_1h1k=dict(common, bias="bool", bias_form="1h1k"),
            mask_window=dict(common, bias="bool_window", bias_form="11qk", core=True),
            mask_window_long=dict(batch=1, num_heads=2, seqlen_q=500, bias="bool_window", bias_form="qk"),
            mask_empty_rows=dict(common, bias="bool_empty_rows", core=True),
            mask_bool_causal=dict(common, bias="bool", causal=True),
        ),
    ]


def _score_options() -> list[Case]:
    return [
        *_named(
            "alibi",
            alibi=dict(num_heads=4, seqlen_q=70, alibi="heads", core=True),
            alibi_batch=dict(num_heads=4, seqlen_q=70, alibi="batch_heads"),
            alibi_causal_more_keys=dict(num_heads=4, seqlen_q=33, seqlen_k=120, alibi="heads", causal=True, core=True),
            alibi_lengths=dict(
                batch=3, num_heads=4, seqlen_q=33, seqlen_k=90, alibi="batch_heads", seqlens_k=(90, 7, 33)
            ),
        ),
        *_named(
            "softcap",
            softcap=dict(seqlen_q=70, softcap=5.0, core=True),
            softcap_tight=dict(seqlen_q=70, softcap=0.5, score_size=4.0),
            softcap_loose_causal=dict(seqlen_q=129, softcap=50.0, causal=True, score_size=10.0),
        ),
        *_named(
            "sinks",
            sinks=dict(num_heads=4, seqlen_q=70, sinks="finite", core=True),
            sinks_minus_inf=dict(num_heads=4, seqlen_q=70, sinks="some_minus_inf"),
            sinks_causal_empty_rows=dict(num_heads=4, seqlen_q=90, seqlen_k=40, causal=True, sinks="finite", core=True),
            sinks_minus_inf_empty_rows=dict(num_heads=4, seqlen_q=90, seqlen_k=40, causal=True, sinks="some_minus_inf"),
            sinks_window_gqa=dict(
                num_heads=8, num_kv_heads=2, seqlen_q=129, window_size=(31, None), causal=True, sinks="finite"
            ),
            sinks_lse_gradient=dict(num_heads=4, seqlen_q=40, sinks="finite", lse_gradient=True),
        ),
        *_named(
            "softmax_scale",
            scale_one=dict(seqlen_q=40, softmax_scale=1.0),
            scale_small=dict(seqlen_q=40, softmax_scale=0.01),
            scale_negative=dict(seqlen_q=40, softmax_scale=-0.3),
        ),
    ]


def _dropout() -> list[Case]:
    return _named(
        "dropout",
        dropout=dict(seqlen_q=70, dropout_p=0.2, core=True),
        dropout_causal_gqa=dict(num_heads=4, num_kv_heads=2, seqlen_q=65, seqlen_k=130, causal=True, dropout_p=0.5),
        dropout_packed=dict(num_heads=2, seqlens_q=(17, 0, 40), seqlens_k=(17, 5, 63), dropout_p=0.3),
        dropout_decode=dict(seqlen_q=1, seqlen_k=600, dropout_p=0.1),
    )


def _heads() -> list[Case]:
    return _named(
        "grouped heads",
        gqa=dict(num_heads=6, num_kv_heads=2, seqlen_q=63, core=True),
        gqa_causal=dict(num_heads=6, num_kv_heads=2, seqlen_q=63, seqlen_k=129, causal=True, core=True),
        mqa=dict(num_heads=5, num_kv_heads=1, seqlen_q=63),
        mqa_causal=dict(num_heads=16, num_kv_heads=1, seqlen_q=33, causal=True),
        one_head=dict(batch=1, num_heads=1, seqlen_q=63),
    )


def _head_dims() -> list[Case]:
    return [
        *(
            Case("head_dim", f"head_dim_{d}", num_heads=2, seqlen_q=37, seqlen_k=70, head_dim=d, causal=True,
                 core=d in (1, 17, 80, 129))
            for d in HEAD_DIMS
        ),
        *_named(
            "value head_dim",
            value_dim_smaller=dict(seqlen_q=37, seqlen_k=70, head_dim=64, head_dim_v=17, core=True),
            value_dim_larger=dict(seqlen_q=37, seqlen_k=70, head_dim=17, head_dim_v=96, causal=True),
            value_dim_mla=dict(seqlen_q=20, seqlen_k=40, head_dim=192, head_dim_v=128, causal=True),
            value_dim_one=dict(seqlen_q=20, seqlen_k=40, head_dim=64, head_dim_v=1),
        ),
    ]  # fmt: skip


def _decode() -> list[Case]:
    grouped: dict[str, Any] = dict(num_heads=8, num_kv_heads=2, head_dim=64, causal=True)
    return _named(
        "decode",
        decode=dict(grouped, batch=2, seqlen_q=1, seqlen_k=1500, core=True),
        decode_lengths=dict(grouped, batch=5, seqlen_q=1, seqlen_k=700, seqlens_k=(700, 0, 1, 129, 600), core=True),
        decode_few_rows=dict(grouped, batch=3, seqlen_q=4, seqlen_k=700, seqlens_k=(700, 2, 300), core=True),
        decode_head_dim_128=dict(batch=1, num_heads=32, num_kv_heads=8, head_dim=128, seqlen_q=1, seqlen_k=600),
        decode_head_dim_63=dict(batch=1, num_heads=4, num_kv_heads=4, head_dim=63, seqlen_q=1, seqlen_k=600),
        decode_group_of_three=dict(batch=1, num_heads=9, num_kv_heads=3, seqlen_q=1, seqlen_k=700),
        decode_group_of_seven=dict(batch=1, num_heads=7, num_kv_heads=1, head_dim=80, seqlen_q=1, seqlen_k=300),
        decode_window=dict(grouped, seqlen_q=1, seqlen_k=900, window_size=(100, None)),
        decode_softcap_sinks=dict(grouped, seqlen_q=1, seqlen_k=500, softcap=10.0, sinks="finite"),
        decode_sinks_empty=dict(grouped, seqlen_q=1, seqlen_k=500, seqlens_k=(0, 500), sinks="finite"),
        decode_alibi=dict(grouped, seqlen_q=2, seqlen_k=500, alibi="heads"),
        decode_padding_left=dict(grouped, batch=3, seqlen_q=1, seqlen_k=500, padding="left"),
        decode_bias=dict(grouped, seqlen_q=1, seqlen_k=500, bias="float", bias_form="1hqk"),
        decode_mask_heads=dict(
            batch=3, num_heads=4, num_kv_heads=2, seqlen_q=1, seqlen_k=20, bias="bool", bias_form="bhqk", core=True
        ),
        decode_growing_maximum=dict(grouped, seqlen_q=1, seqlen_k=1100, key_growth=8.0),
        decode_mqa_layout=dict(batch=2, num_heads=8, num_kv_heads=1, seqlen_q=1, seqlen_k=400, layout="heads_last"),
    )


def _packed() -> list[Case]:
    lengths: dict[str, Any] = dict(seqlens_q=(17, 0, 64, 1, 100), seqlens_k=(17, 0, 64, 1, 100))
    unlike: dict[str, Any] = dict(seqlens_q=(9, 0, 40, 12, 1), seqlens_k=(30, 5, 0, 12, 129))
    return _named(
        "packed",
        packed_full=dict(lengths, core=True),
        packed_causal=dict(lengths, causal=True, core=True),
        packed_window=dict(lengths, window_size=(10, 3)),
        packed_window_causal_gqa=dict(lengths, window_size=(10, None), causal=True, num_heads=6, num_kv_heads=2),
        packed_unlike=dict(unlike, core=True),
        packed_unlike_causal=dict(unlike, causal=True, lse_gradient=True),
        packed_decode=dict(seqlens_q=(1, 1, 1), seqlens_k=(300, 1, 77), num_heads=8, num_kv_heads=2, causal=True),
        packed_alibi_softcap_sinks=dict(unlike, num_heads=4, alibi="batch_heads", softcap=4.0, sinks="finite"),
        packed_layout=dict(lengths, causal=True, layout="heads_last", dout="heads_last"),
        packed_gaps=dict(unlike, layout="gaps", dout="gaps"),
        packed_head_dim=dict(unlike, head_dim=80, head_dim_v=17),
        packed_one=dict(seqlens_q=(129,), seqlens_k=(129,), causal=True),
    )


def _paged() -> list[Case]:
    """A cache in pages of every size, for one row, for a few and for many, then each option with it."""
    grouped: dict[str, Any] = dict(num_heads=4, num_kv_heads=2, causal=True)
    decode: dict[str, Any] = dict(grouped, batch=4, seqlen_q=1, seqlen_k=150, seqlens_k=(150, 0, 1, 77), page_size=16)
    prefill: dict[str, Any] = dict(grouped, batch=3, seqlen_q=40, seqlen_k=210, seqlens_k=(200, 57, 40), page_size=16)
    core = {(7, 1), (16, 1), (16, 4), (7, 40), (64, 40)}
    cases = []
    for size in PAGE_SIZES:
        # Nothing, one key, whole pages, one key more and one less; a table that is full and entries to spare.
        lengths = (2 * size + 1, 0, 1, 2 * size, max(3 * size - 1, 90))
        sizes: dict[str, Any] = dict(grouped, batch=5, seqlen_k=max(lengths), seqlens_k=lengths, page_size=size)
        cases += [
            Case("paged", f"paged_{size}_rows_{rows}", seqlen_q=rows, core=(size, rows) in core, **sizes)
            for rows in (1, 4, 40)
        ]
    for name, of in (("decode", decode), ("prefill", prefill)):
        cases += _named(
            "paged",
            **{
                f"paged_{name}_full": dict(of, causal=False),
                f"paged_{name}_window": dict(of, window_size=(30, 2), causal=False),
                f"paged_{name}_window_poison": dict(of, window_size=(20, None), poison=True, core=True),
                f"paged_{name}_alibi": dict(of, alibi="batch_heads"),
                f"paged_{name}_softcap_sinks": dict(of, softcap=5.0, sinks="some_minus_inf"),
                f"paged_{name}_heads_last": dict(of, layout="heads_last", core=True),
                f"paged_{name}_gaps": dict(of, layout="gaps", core=True),
                f"paged_{name}_pages_last": dict(of, layout="sequence_first"),
                f"paged_{name}_shared": dict(of, shared_pages=3, core=True),
                f"paged_{name}_head_dims": dict(of, head_dim=63, head_dim_v=17),
                f"paged_{name}_growing_maximum": dict(of, key_growth=8.0),
            },
        )
    # Long enough for several chunks a sequence, which begin and end inside pages; the last with many rows a chunk.
    cases += _named(
        "paged",
        paged_decode_long=dict(
            batch=2, num_heads=8, num_kv_heads=2, head_dim=128, seqlen_q=1, seqlen_k=1500, seqlens_k=(1490, 1001),
            page_size=16, causal=True, layout="heads_last", core=True,
        ),
        paged_decode_long_window=dict(
            batch=2, num_heads=2, seqlen_q=1, seqlen_k=1500, seqlens_k=(1490, 1001), page_size=7, causal=True,
            window_size=(700, None),
        ),
        paged_few_rows_long=dict(
            batch=1, num_heads=4, num_kv_heads=1, seqlen_q=9, seqlen_k=2200, seqlens_k=(2150,), page_size=64,
            causal=True,
        ),
        paged_gpt_oss=dict(
            batch=2, num_heads=8, num_kv_heads=1, head_dim=64, seqlen_q=33, seqlen_k=300, seqlens_k=(300, 129),
            page_size=64, causal=True, window_size=(127, 0), sinks="finite", layout="heads_last",
        ),
        paged_nothing=dict(batch=2, seqlen_q=3, seqlen_k=32, seqlens_k=(0, 0), page_size=16, sinks="finite"),
        paged_no_table=dict(batch=2, seqlen_q=3, seqlen_k=0, seqlens_k=(0, 0), page_size=16),
        paged_no_rows=dict(batch=2, seqlen_q=0, seqlen_k=20, seqlens_k=(20, 3), page_size=16),
        paged_no_batch=dict(batch=0, seqlen_q=2, seqlen_k=20, seqlens_k=(), page_size=16),
    )  # fmt: skip
    return cases


def _layouts() -> list[Case]:
    common: dict[str, Any] = dict(batch=3, num_heads=4, num_kv_heads=2, seqlen_q=35, seqlen_k=70, head_dim=24)
    return _named(
        "strides",
        layout_heads_last=dict(common, layout="heads_last", dout="heads_last", core=True),
        layout_gaps=dict(common, layout="gaps", dout="gaps", core=True),
        layout_sequence_first=dict(common, layout="sequence_first", dout="heads_last", causal=True),
        layout_shared_batch=dict(common, layout="shared_batch", dout="ones_expanded"),
        layout_dout_expanded=dict(common, dout="ones_expanded", causal=True, core=True),
    )


def _poisoned() -> list[Case]:
    common: dict[str, Any] = dict(batch=4, num_heads=4, num_kv_heads=2, seqlen_q=30, seqlen_k=100, poison=True)
    return _named(
        "poisoned padding",
        poison_lengths=dict(common, seqlens_k=(100, 0, 1, 37), core=True),
        poison_lengths_causal=dict(common, seqlens_k=(100, 0, 1, 37), causal=True),
        poison_padding_left=dict(common, padding="left", core=True),
        poison_padding_holes=dict(common, padding="holes", core=True),
        poison_padding_empty=dict(common, padding="empty_entries"),
        # More queries than keys or a window: keys at the far end are seen by nobody.
        poison_window=dict(common, window_size=(8, 0), core=True),
        poison_window_right=dict(common, window_size=(None, -1), padding="right"),
        poison_mask=dict(common, bias="bool", bias_form="b11k"),
        poison_bias=dict(common, bias="float_some_minus_inf", bias_form="b11k", core=True),
        poison_bias_heads=dict(common, bias="float_some_minus_inf", bias_form="1h1k"),
        poison_bias_decode=dict(common, bias="float_some_minus_inf", bias_form="k") | dict(seqlen_q=1),
        poison_mask_window=dict(common, bias="bool_window", bias_form="qk"),
        poison_decode=dict(common, seqlens_k=(100, 0, 1, 37)) | dict(seqlen_q=1, seqlen_k=400, core=True),
        poison_decode_window=dict(common, causal=True, window_size=(50, None)) | dict(seqlen_q=1, seqlen_k=400),
        poison_packed_window=dict(
            seqlens_q=(4, 9), seqlens_k=(60, 33), window_size=(5, 0), poison=True, num_heads=2
        ),
        poison_sinks_softcap=dict(common, padding="holes", sinks="finite", softcap=3.0),
    )  # fmt: skip


def _combinations() -> list[Case]:
    """Several options at once, as real models have them."""
    return _named(
        "combined",
        combined_gemma2=dict(
            num_heads=4, num_kv_heads=2, seqlen_q=129, head_dim=256, causal=True, window_size=(40, None),
            softcap=50.0, softmax_scale=0.05,
        ),
        combined_gpt_oss=dict(
            num_heads=8, num_kv_heads=1, seqlen_q=129, head_dim=64, causal=True, window_size=(31, 0), sinks="finite",
            layout="heads_last", core=True,
        ),
        combined_t5=dict(num_heads=4, seqlen_q=63, bias="float", bias_form="1hqk", padding="right", batch=3,
                         softmax_scale=1.0, score_size=0.2),
        combined_chunked_prefill=dict(batch=3, num_heads=4, num_kv_heads=2, seqlen_q=40, seqlen_k=200, causal=True,
                                      seqlens_k=(200, 57, 40), layout="heads_last", window_size=(70, None)),
        combined_everything=dict(
            batch=3, num_heads=6, num_kv_heads=3, seqlen_q=65, seqlen_k=129, head_dim=40, head_dim_v=24, causal=True,
            window_size=(50, None), padding="holes", bias="float", bias_form="b1qk", alibi="heads", softcap=6.0,
            sinks="some_minus_inf", softmax_scale=0.2, dropout_p=0.1, layout="gaps", dout="gaps", lse_gradient=True,
            poison=True, core=True,
        ),
        combined_lengths_mask=dict(
            batch=4, num_heads=4, num_kv_heads=1, seqlen_q=33, seqlen_k=96, seqlens_k=(96, 5, 0, 64),
            padding="empty_entries", bias="bool", bias_form="1hqk", window_size=(30, 10), alibi="batch_heads",
            sinks="finite",
        ),
    )  # fmt: skip


def _empty() -> list[Case]:
    return _named(
        "empty",
        empty_batch=dict(batch=0, seqlen_q=5),
        empty_queries=dict(seqlen_q=0, seqlen_k=7),
        empty_keys=dict(seqlen_q=5, seqlen_k=0),
        empty_keys_sinks=dict(seqlen_q=5, seqlen_k=0, sinks="some_minus_inf"),
        empty_packed=dict(seqlens_q=(0, 0), seqlens_k=(0, 0)),
        # No key and a sink of -inf: a softmax over nothing at all.
        empty_packed_keys=dict(seqlens_q=(3, 4), seqlens_k=(0, 2), sinks="some_minus_inf"),
    )
