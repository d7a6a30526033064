"""The families of checkpoints that can be loaded. Adding one is a small file and a line here."""

from __future__ import annotations

from transformer_fast.models.families.bert import BERT
from transformer_fast.models.families.family import Family
from transformer_fast.models.families.native import NATIVE

FAMILIES: dict[str, Family] = {family.model_type: family for family in (BERT, NATIVE)}

__all__ = ["FAMILIES", "Family"]
