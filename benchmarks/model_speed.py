"""Whole models against Hugging Face transformers with SDPA: the same random weights, in turns, as ratios.

``python -m transformer_fast.benchmarks.model_speed [--output FILE.md]``; needs transformers. Each case compares its
results with float64 first, by the tolerance rule, and has no speed where they are wrong. Without and with
``dropin.pack_linears``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from transformer_fast import models
from transformer_fast.backends import cpu_linear
from transformer_fast.dropin import pack_linears, unpack_linears
from transformer_fast.models.layers import fused_attention
from transformer_fast.testing import judge
from transformer_fast.testing.environment import environment

from .measure import interleaved, ratio

MINILM = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    bos_token_id=None,
    eos_token_id=None,
)
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Pair:
    """One case: the same work by us and by transformers. ``results``: ours, theirs, and theirs in float64."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    results: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Line:
    """How many times slower transformers is than our model as it is, and with its linear layers packed.

    Of the latter's time: the shares of matrix products and attention.
    """

    name: str
    dtype: str
    ratio: float
    packed: float
    products: float
    attention: float | None


def _both(config: Any, auto: Any, dtype: torch.dtype, folder: str) -> tuple[Any, Any, Any]:
    """Ours and theirs in ``dtype``, and theirs in float64, of the same weights."""
    theirs = auto.from_config(config, attn_implementation="sdpa").eval().to(dtype)
    theirs.save_pretrained(folder)
    ours = models.from_pretrained(folder, dtype=dtype)
    exact = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).eval()
    return ours, theirs, exact


def encoder_pairs(dtype: torch.dtype, folder: str) -> Iterator[tuple[Any, Pair]]:
    """A padded batch of which half is padding."""
    import transformers

    ours, theirs, exact = _both(transformers.BertConfig(**MINILM), transformers.AutoModel, dtype, folder)
    lengths = torch.linspace(1, 255, 31).round().long()
    keep = torch.arange(256) < torch.cat((lengths, torch.tensor([256])))[:, None]
    ids, mask = torch.randint(5, 30000, keep.shape), keep.long()

    def results() -> tuple[Tensor, Tensor, Tensor]:
        some = {"input_ids": ids[::8], "attention_mask": mask[::8]}
        found = [model(**some).last_hidden_state[keep[::8]] for model in (ours, theirs, exact)]
        return found[0], found[1], found[2]

    name = f"MiniLM-sized encoder, 32 x 256, {1 - keep.float().mean():.0%} padding"
    yield ours, Pair(name, lambda: ours.encode(ids, mask), lambda: theirs(ids, attention_mask=mask), results)


def decoder_pairs(dtype: torch.dtype, folder: str) -> Iterator[tuple[Any, Pair]]:
    """Reading a prompt, one token after another, and a batch of unequal prompts."""
    import transformers

    config = transformers.LlamaConfig(**SMOLLM2)
    ours, theirs, exact = _both(config, transformers.AutoModelForCausalLM, dtype, folder)
    ids = torch.randint(5, 49000, (1, 2048))

    def results() -> tuple[Tensor, Tensor, Tensor]:
        some = ids[:, :256]
        baseline, oracle = (model(some, logits_to_keep=1).logits[:, -1] for model in (theirs, exact))
        return ours.next_token_logits(some), baseline, oracle

    for seqlen in (512, 2048):
        prompt = ids[:, :seqlen]

        def read(prompt: Tensor = prompt) -> object:
            return ours.next_token_logits(prompt)

        def they_read(prompt: Tensor = prompt) -> object:
            return theirs(prompt, logits_to_keep=1, use_cache=False)

        yield ours, Pair(f"SmolLM2-135M-sized decoder, prompt of {seqlen}", read, they_read, results)

    cache = ours.new_cache(1, 4096)
    ours.next_token_logits(ids, cache=cache)
    their_cache = theirs(ids, use_cache=True, logits_to_keep=1).past_key_values
    token = torch.tensor([[7]])
    yield (
        ours,
        Pair(
            "the same, one token after 2048",
            lambda: ours.next_token_logits(token, cache=cache),
            lambda: theirs(token, past_key_values=their_cache, use_cache=True),
        ),
    )
    lengths = torch.tensor([128, 40, 90, 17, 64, 110, 30, 77])
    mask = (torch.arange(128) >= 128 - lengths[:, None]).long()
    prompts = torch.randint(5, 49000, mask.shape)
    how = dict(max_new_tokens=16, pad_token_id=0)
    yield (
        ours,
        Pair(
            "the same, 16 tokens after 8 unequal prompts",
            lambda: ours.generate(prompts, attention_mask=mask, **how),
            lambda: theirs.generate(prompts, attention_mask=mask, do_sample=False, **how),
        ),
    )


def shares(model: Any, step: Callable[[], object]) -> tuple[float, float | None]:
    """Of one step's time: linear layers, and attention where it is not behind a cache."""
    spent = {"products": 0.0, "attention": 0.0}

    def timed(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            start = time.perf_counter()
            out = function(*args)
            spent[name] += time.perf_counter() - start
            return out

        return call

    multiply, twice = cpu_linear.multiply, cpu_linear.multiply_twice
    model.set_attention(timed("attention", fused_attention))
    cpu_linear.multiply, cpu_linear.multiply_twice = timed("products", multiply), timed("products", twice)
    try:
        start = time.perf_counter()
        step()
        whole = time.perf_counter() - start
    finally:
        cpu_linear.multiply, cpu_linear.multiply_twice = multiply, twice
        model.set_attention(fused_attention)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        step()
        profiled = time.perf_counter() - start
    names = ("aten::mm", "aten::addmm", "aten::linear")
    others = sum(row.self_cpu_time_total for row in profile.key_averages() if row.key in names) / 1e6
    return spent["products"] / whole + others / profiled, spent["attention"] / whole or None


@torch.no_grad()
def run(repeats: int = 7) -> Iterator[Line]:
    """Each case in each dtype; AssertionError where our results are wrong."""
    for dtype in DTYPES:
        for pairs in (encoder_pairs, decoder_pairs):
            with tempfile.TemporaryDirectory() as folder:
                for ours, pair in pairs(dtype, folder):
                    plain = measured(pair, repeats)
                    pack_linears(ours)
                    packed = measured(pair, repeats)
                    products, attention = shares(ours, pair.ours)
                    unpack_linears(ours)
                    name = str(dtype).removeprefix("torch.")
                    yield Line(pair.name, name, plain, packed, products, attention)


def measured(pair: Pair, repeats: int) -> float:
    """Their time over ours; AssertionError where our results are wrong."""
    if pair.results is not None:
        found, baseline, oracle = pair.results()
        verdict = judge(found, oracle, baseline, name=pair.name)
        assert verdict.passed, str(verdict)
    samples = interleaved({"ours": pair.ours, "theirs": pair.theirs}, repeats)
    return ratio(samples["theirs"], samples["ours"]).median


def main() -> None:
    """Print the table, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    lines = [
        "| case | dtype | transformers' time over ours | with pack_linears | products | attention |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    console = Console(width=160)
    for line in run(options.repeats):
        attention = "" if line.attention is None else f"{line.attention:.0%}"
        ratios = f"{line.ratio:.2f}x | {line.packed:.2f}x"
        lines.append(f"| {line.name} | {line.dtype} | {ratios} | {line.products:.0%} | {attention} |")
        console.print(lines[-1], highlight=False)
    if options.output is not None:
        facts = "\n".join(f"- {name}: {value}" for name, value in environment().items())
        options.output.write_text("\n".join([*lines, "", facts, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
