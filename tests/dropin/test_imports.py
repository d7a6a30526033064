"""What importing the package costs, and what is there afterwards without a further import."""

from __future__ import annotations

import subprocess
import sys

LIGHT = """
import sys
import transformer_fast as tf
heavy = ("transformers", "torch._dynamo", "torch.nn.attention.flex_attention", "flash_attn", "xformers", "triton")
ours = ("dropin", "flash_attn", "models", "generation", "tasks")
found = [name for name in (*heavy, *(f"transformer_fast.{name}" for name in ours)) if name in sys.modules]
assert not found, found
"""
THERE = """
import transformer_fast as tf
for found in (tf.accelerate, tf.register_with_transformers, tf.dropin.varlen_attn, tf.dropin.replace_modules,
              tf.flash_attn.flash_attn_func, tf.models.from_pretrained):
    assert callable(found)
assert {"MultiheadAttention", "flex_attention"} <= set(dir(tf.dropin))
for owner in (tf, tf.dropin):
    try:
        owner.nothing
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError(owner)
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_no_drop_in_nor_what_it_needs() -> None:
    run(LIGHT)


def test_every_part_is_there_when_it_is_asked_for() -> None:
    run(THERE)
