"""Models of transformers on our attention against the same models on SDPA: the same weights, in turns, as ratios.

``python -m transformer_fast.benchmarks.dropin_speed [--only WORD] [--dtypes float32] [--output FILE.md]``; needs
transformers. (Without AVX-512, PyTorch's bfloat16 matrix products take minutes: ask for float32 alone.) Each case
compares its results with float64 first, by the tolerance rule, and has no speed where they are wrong. First attention
alone, then with ``skip_padding``, ``pack_linears`` and ``fuse_pointwise`` where they apply. Then what a drop-in costs
a call beyond ``attention()``, on a problem of hardly any work.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import transformer_fast
from transformer_fast.dropin import fuse_pointwise, pack_linears, skip_padding
from transformer_fast.ops import runner_for
from transformer_fast.spec import Operands, parse_options
from transformer_fast.testing import judge
from transformer_fast.testing.environment import environment

from .measure import interleaved, ratio
from .model_speed import SMOLLM2

OURS, THEIRS = "transformer_fast", "sdpa"
ALSO = "with the rest"
#: Sizes of the models, as transformers' configurations name them.
BERT: dict[str, Any] = {}  # the base size is its default
LLAMA: dict[str, Any] = SMOLLM2
GPT2: dict[str, Any] = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
BOTH = (torch.float32, torch.bfloat16)


def _around(model: Any) -> Any:
    return pack_linears(fuse_pointwise(model))


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        config: of the model, and ``auto`` the class that builds it, by their names in transformers.
        prepare: from a model to what is timed, a function of no arguments.
        results: from a model to what is compared, on less input.
        rest: what else makes the model faster, from the model to itself.
    """

    name: str
    config: tuple[str, dict[str, Any]]
    auto: str
    prepare: Callable[[Any], Callable[[], object]]
    results: Callable[[Any], Tensor]
    rest: Callable[[Any], Any] = _around
    dtypes: tuple[torch.dtype, ...] = BOTH


@dataclass(frozen=True)
class Line:
    """How many times slower SDPA's model is than ours with our attention, and with the case's ``rest`` too."""

    name: str
    dtype: str
    ratio: float
    whole: float


def _ids(batch: int, seqlen: int) -> Tensor:
    return torch.randint(5, 30000, (batch, seqlen), generator=torch.Generator().manual_seed(seqlen))


def _padded() -> dict[str, Tensor]:
    """16 texts of up to 128 tokens."""
    lengths = torch.linspace(8, 128, 16).round().long()
    return {"input_ids": _ids(16, 128), "attention_mask": (torch.arange(128) < lengths[:, None]).long()}


def _without_padding(model: Any) -> Any:
    return pack_linears(skip_padding(model))


def _encode(model: Any) -> Callable[[], object]:
    batch = _padded()
    return lambda: model(**batch)


def _encoded(model: Any) -> Tensor:
    batch = {name: grid[::4] for name, grid in _padded().items()}
    found: Tensor = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
    return found


def _read(seqlen: int) -> Callable[[Any], Callable[[], object]]:
    def prepare(model: Any) -> Callable[[], object]:
        ids = _ids(1, seqlen)
        return lambda: model(ids, use_cache=False, logits_to_keep=1)

    return prepare


def _last_logits(model: Any) -> Tensor:
    found: Tensor = model(_ids(1, 384), use_cache=False, logits_to_keep=1).logits[:, -1]
    return found


def _decode(model: Any) -> Callable[[], object]:
    cache, token = model(_ids(1, 4096), use_cache=True, logits_to_keep=1).past_key_values, torch.tensor([[7]])

    def step() -> object:
        cache.crop(4096)
        return model(token, past_key_values=cache, use_cache=True)

    return step


def _train(model: Any, seqlen: int = 1024) -> Callable[[], object]:
    ids = _ids(1, seqlen)

    def step() -> object:
        with torch.enable_grad():
            model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        return None

    return step


def _gradient(model: Any) -> Tensor:
    ids = _ids(1, 128)
    with torch.enable_grad():
        loss = model(ids, labels=ids, use_cache=False).loss
        (found,) = torch.autograd.grad(loss, [model.transformer.h[0].attn.c_attn.weight])
    return found


def cases() -> list[Case]:
    """The table's rows."""
    llama, mistral = ("LlamaConfig", LLAMA), ("MistralConfig", LLAMA | {"sliding_window": 256})
    language = "AutoModelForCausalLM"
    return [
        Case(
            "BERT-base-sized, 16 x up to 128 tokens",
            ("BertConfig", BERT),
            "AutoModel",
            _encode,
            _encoded,
            _without_padding,
        ),
        Case("Llama 135M-sized, prompt of 2048", llama, language, _read(2048), _last_logits),
        Case("Mistral-style, window 256, prompt of 4096", mistral, language, _read(4096), _last_logits),
        Case("Llama 135M-sized, one token after 4096", llama, language, _decode, _last_logits),
        Case(
            "GPT-2-small-sized, training step of 1024",
            ("GPT2Config", GPT2),
            language,
            _train,
            _gradient,
            dtypes=BOTH[:1],
        ),
    ]


def build(case: Case, implementation: str, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None) -> Any:
    """The case's model, with fresh weights or with these, which are shared, not copied."""
    import transformers

    name, settings = case.config
    config = getattr(transformers, name)(**settings)
    auto = getattr(transformers, case.auto)
    model = auto.from_config(config, attn_implementation=implementation, dtype=dtype).eval()
    if weights is not None:
        model.load_state_dict({k: w.to(dtype) for k, w in weights.items()}, assign=True)
        model.tie_weights()
    return model


@torch.no_grad()
def run(repeats: int, only: str = "", dtypes: Collection[torch.dtype] = BOTH) -> Iterator[Line]:
    """Each case in those of its dtypes; AssertionError where our results are wrong."""
    transformer_fast.register_with_transformers(OURS)
    for case in cases():
        if only not in case.name:
            continue
        for dtype in (dtype for dtype in case.dtypes if dtype in dtypes):
            models = {THEIRS: build(case, THEIRS, dtype)}
            weights = models[THEIRS].state_dict()
            models[OURS] = build(case, OURS, dtype, weights)
            models[ALSO] = case.rest(build(case, OURS, dtype, weights))
            exact = case.results(build(case, "eager", torch.float64, weights))
            for ours in (OURS, ALSO):
                verdict = judge(case.results(models[ours]), exact, case.results(models[THEIRS]), name=case.name)
                assert verdict.passed, str(verdict)
            samples = interleaved({name: case.prepare(model) for name, model in models.items()}, repeats)
            ratios = {name: ratio(samples[THEIRS], samples[name]).median for name in models}
            yield Line(case.name, str(dtype).removeprefix("torch."), ratios[OURS], ratios[ALSO])


def peak_of_training(name: str) -> None:
    """Print this process's peak memory in MiB after two training steps; to be run in a process of its own."""
    transformer_fast.register_with_transformers(OURS)
    case = cases()[-1]
    model = build(case, THEIRS if name == THEIRS else OURS, torch.float32)
    step = case.prepare(case.rest(model) if name == ALSO else model)
    for _ in range(2):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # noqa: T201


def peaks() -> dict[str, float]:
    """Peak memory in MiB of a process that trains, by implementation."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--peak"]
    return {
        name: float(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout)
        for name in (OURS, ALSO, THEIRS)
    }


def overheads(repeats: int = 101) -> dict[str, float]:
    """Microseconds that a call takes: through each drop-in beyond ``attention()``, and that beyond the kernel.

    Tensors are as a model's projections give them.
    """
    from transformer_fast import attention, dropin
    from transformer_fast.dropin.huggingface import attention_forward
    from transformer_fast.flash_attn import flash_attn_func

    q, k, v = torch.randn(3, 1, 8, 2, 32)  # (batch, seqlen, num_heads, head_dim)
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    functional, scaled = torch.nn.functional, torch.nn.functional.scaled_dot_product_attention

    def bare() -> object:
        return attention(query, key, value, causal=True)

    dropins: dict[str, Callable[[], object]] = {
        "scaled_dot_product_attention": lambda: dropin.scaled_dot_product_attention(query, key, value, is_causal=True),
        "flash_attn_func": lambda: flash_attn_func(q, k, v, causal=True),
        "transformers' attention function": lambda: attention_forward(  # what a layer of Llama passes
            None, query, key, value, None, dropout=0.0, scaling=32**-0.5, position_ids=None, use_cache=False
        ),
        "PyTorch's SDPA": lambda: scaled(query, key, value, is_causal=True),
    }
    with torch.no_grad():
        found = _beyond(_kernel(query, key, value), {"attention() beyond the kernel": bare}, repeats)
        found |= _beyond(bare, dropins, repeats)
        with transformer_fast.accelerate():  # apart, since PyTorch's own function does not escape it
            by_name = lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True)  # noqa: E731
            found |= _beyond(bare, {"SDPA by name under accelerate()": by_name}, repeats)
    with torch.enable_grad():
        trained = {"attention() beyond the kernel, with gradients": lambda: attention(*leaves, causal=True)}
        found |= _beyond(_kernel(query, key, value, with_statistics=True), trained, repeats)
    return found


def _beyond(bare: Callable[[], object], steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Microseconds that each step takes beyond the bare one: medians over neighbouring samples."""
    bare_samples, *samples = interleaved({"bare": bare, **steps}, repeats).values()
    extra = [statistics.median(s - b for s, b in zip(found, bare_samples, strict=True)) for found in samples]
    return {name: 1e6 * seconds for name, seconds in zip(steps, extra, strict=True)}


def _kernel(query: Tensor, key: Tensor, value: Tensor, *, with_statistics: bool = False) -> Callable[[], object]:
    """The call into C++ that causal attention ends in, with everything at hand."""
    operands, rows = Operands(query, key, value), query.shape[:3]
    plan = runner_for(operands, parse_options(causal=True, backend="cpu")).plan  # type: ignore[attr-defined]
    out, lse, stats = torch.empty_like(query), torch.empty(rows), torch.empty(2, *rows)
    results = (out, lse, stats) if with_statistics else (out, None, None)
    pointers = [0 if t is None else t.data_ptr() for t in (*operands, *results)]

    def call() -> object:
        plan.forward(*pointers, torch.get_num_threads())
        return results  # which thereby live as long as this

    return call


def main() -> None:
    """Print the table, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    names = [str(dtype).removeprefix("torch.") for dtype in BOTH]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    parser.add_argument("--peak", choices=(OURS, ALSO, THEIRS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        peak_of_training(options.peak)
        return
    lines = [
        "| case | dtype | the model on SDPA, time over ours | with the other drop-ins too |",
        "| --- | --- | --- | --- |",
    ]
    console = Console(width=160)
    for line in run(options.repeats, options.only, [getattr(torch, name) for name in options.dtypes]):
        lines.append(f"| {line.name} | {line.dtype} | {line.ratio:.2f}x | {line.whole:.2f}x |")
        console.print(lines[-1], highlight=False)
    if not options.only:
        memory = peaks()
        ours, also = (f"{memory[THEIRS] / memory[name]:.2f}x" for name in (OURS, ALSO))
        lines.append(f"| peak memory of the training step's process | float32 | {ours} | {also} |")
        extra = ", ".join(f"{name} {us:+.1f} us" for name, us in overheads().items())
        lines += ["", f"A call beyond `attention()`, 2 heads of 8 tokens: {extra}."]
        console.print("\n".join(lines[-3:]), highlight=False)
    if options.output is not None:
        facts = "\n".join(f"- {name}: {value}" for name, value in environment().items())
        options.output.write_text("\n".join([*lines, "", facts, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
