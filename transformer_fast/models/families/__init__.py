"""The families of checkpoints that can be loaded. Adding one is a small file, and a line here or a call of
:func:`register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_fast.models.families.bart import BART, MARIAN
from transformer_fast.models.families.bert import BERT, ROBERTA
from transformer_fast.models.families.distilbert import DISTILBERT
from transformer_fast.models.families.family import Family
from transformer_fast.models.families.gpt import GPT, GPT2
from transformer_fast.models.families.llama import GEMMA2, LLAMA, MISTRAL
from transformer_fast.models.families.native import NATIVE
from transformer_fast.models.families.t5 import T5
from transformer_fast.models.families.vit import VIT
from transformer_fast.models.families.whisper import WHISPER

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make checkpoints of ``family.model_type`` loadable; an earlier family of that name is replaced."""
    FAMILIES[family.model_type] = family


def family_of(values: Mapping[str, Any]) -> Family:
    """The family that config.json's ``model_type`` names; ValueError where there is none. Without one: our own."""
    name = values.get("model_type") or ("transformer_fast" if not values else None)
    if name not in FAMILIES:
        raise ValueError(f"model_type={name!r} is not known; allowed: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


for _family in (BERT, ROBERTA, DISTILBERT, GPT, GPT2, T5, BART, MARIAN, LLAMA, MISTRAL, GEMMA2, WHISPER, VIT, NATIVE):
    register(_family)

__all__ = ["FAMILIES", "Family", "family_of", "register"]
