"""Whole models against Hugging Face transformers with SDPA: the same random weights, in turns, as ratios.

``python -m transformer_fast.benchmarks.model_speed [--output FILE.md]``; needs transformers. Each case compares its
results with float64 first, by the tolerance rule, and has no speed where they are wrong. Our model runs as it is, and
a copy of it with ``dropin.pack_linears``: three models in turns.
"""

from __future__ import annotations

import argparse
import copy
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
from transformer_fast.dropin import pack_linears
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


@dataclass(frozen=True)
class Case:
    """The same work by a model of ours and by one of transformers.

    Attributes:
        prepare: from our model to what is timed, a function of no arguments.
        theirs: what is timed of transformers.
        results: from a model, of whomever, to what is compared.
    """

    name: str
    prepare: Callable[[Any], Callable[[], object]]
    theirs: Callable[[], object]
    results: Callable[[Any], Tensor]


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


@dataclass(frozen=True)
class Models:
    """The same weights four times: ours as it is and packed, theirs, and theirs in float64."""

    ours: Any
    packed: Any
    theirs: Any
    exact: Any


def build(config: Any, auto: Any, dtype: torch.dtype) -> Models:
    """Models of random weights, made by transformers and read from its file."""
    theirs = auto.from_config(config, attn_implementation="sdpa").eval().to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = models.from_pretrained(folder, dtype=dtype)
        exact = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).eval()
    return Models(ours, pack_linears(copy.deepcopy(ours)), theirs, exact)


def encoder_cases(theirs: Any) -> Iterator[Case]:
    """A padded batch of which half is padding."""
    lengths = torch.linspace(1, 255, 31).round().long()
    keep = torch.arange(256) < torch.cat((lengths, torch.tensor([256])))[:, None]
    ids, mask = torch.randint(5, 30000, keep.shape), keep.long()

    def results(model: Any) -> Tensor:
        found: Tensor = model(input_ids=ids[::8], attention_mask=mask[::8]).last_hidden_state[keep[::8]]
        return found

    name = f"MiniLM-sized encoder, 32 x 256, {1 - keep.float().mean():.0%} padding"
    yield Case(name, lambda ours: lambda: ours.encode(ids, mask), lambda: theirs(ids, attention_mask=mask), results)


def next_token_logits(model: Any, ids: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    """Ours: what is timed. Theirs: the last ones of ``forward``, without padding."""
    if hasattr(model, "next_token_logits"):
        found: Tensor = model.next_token_logits(ids, mask, **how)
        return found
    rows = ids if mask is None else [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)]
    return torch.cat([model(row[None], logits_to_keep=1, use_cache=False).logits[:, -1] for row in rows])


def decoder_cases(theirs: Any) -> Iterator[Case]:
    """Reading a prompt, one token after another, and a batch of unequal prompts."""
    ids = torch.randint(5, 49000, (1, 2048))

    def reading(seqlen: int) -> Case:
        prompt = ids[:, :seqlen]
        return Case(
            f"SmolLM2-135M-sized decoder, prompt of {seqlen}",
            lambda ours: lambda: ours.next_token_logits(prompt),
            lambda: theirs(prompt, logits_to_keep=1, use_cache=False),
            lambda model: next_token_logits(model, prompt[:, :256]),
        )

    yield reading(512)
    yield reading(2048)
    token = torch.tensor([[7]])

    def after_a_prompt(ours: Any) -> Callable[[], object]:
        cache = ours.new_cache(1, 4096)
        ours.next_token_logits(ids, cache=cache)
        return lambda: ours.next_token_logits(token, cache=cache)

    def logits_after_a_prompt(model: Any) -> Tensor:
        prompt = ids[:, :256]
        if not hasattr(model, "next_token_logits"):
            return next_token_logits(model, torch.cat((prompt, token), dim=1))
        cache = model.new_cache(1, 512)
        next_token_logits(model, prompt, cache=cache)
        return next_token_logits(model, token, cache=cache)

    their_cache = theirs(ids, use_cache=True, logits_to_keep=1).past_key_values
    yield Case(
        "the same, one token after 2048",
        after_a_prompt,
        lambda: theirs(token, past_key_values=their_cache, use_cache=True),
        logits_after_a_prompt,
    )
    lengths = torch.tensor([128, 40, 90, 17, 64, 110, 30, 77])
    mask = (torch.arange(128) >= 128 - lengths[:, None]).long()
    prompts = torch.randint(5, 49000, mask.shape)
    how = dict(attention_mask=mask, max_new_tokens=16, pad_token_id=0)
    yield Case(
        "the same, 16 tokens after 8 unequal prompts",
        lambda ours: lambda: ours.generate(prompts, **how),
        lambda: theirs.generate(prompts, do_sample=False, **how),
        lambda model: next_token_logits(model, prompts, mask),
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
    import transformers

    kinds = (
        (transformers.BertConfig(**MINILM), transformers.AutoModel, encoder_cases),
        (transformers.LlamaConfig(**SMOLLM2), transformers.AutoModelForCausalLM, decoder_cases),
    )
    for dtype in DTYPES:
        for config, auto, cases in kinds:
            built = build(config, auto, dtype)
            for case in cases(built.theirs):
                yield measured(case, built, str(dtype).removeprefix("torch."), repeats)


def measured(case: Case, built: Models, dtype: str, repeats: int) -> Line:
    """One case; AssertionError where our results are wrong."""
    oracle, baseline = case.results(built.exact), case.results(built.theirs)
    for ours in (built.ours, built.packed):
        verdict = judge(case.results(ours), oracle, baseline, name=case.name)
        assert verdict.passed, str(verdict)
    steps = {"plain": case.prepare(built.ours), "packed": case.prepare(built.packed), "theirs": case.theirs}
    samples = interleaved(steps, repeats)
    plain, packed = (ratio(samples["theirs"], samples[name]).median for name in ("plain", "packed"))
    return Line(case.name, dtype, plain, packed, *shares(built.packed, steps["packed"]))


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
