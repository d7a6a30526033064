"""The tasks on the command line: ``transformer-fast generate | classify | tag | answer | summarize | ...``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.markup import escape

from transformer_fast import tasks
from transformer_fast.models import DecoderModel
from transformer_fast.tasks.embedding import save_vectors
from transformer_fast.tasks.generating import generation_config
from transformer_fast.tasks.loading import Loaded, load
from transformer_fast.tasks.terminal import (
    console,
    errors,
    parse_options,
    progress,
    read_texts,
    say,
    say_json,
    say_rows,
    usage_errors,
)

Texts = Annotated[list[str] | None, typer.Argument(help="Texts; else --file or stdin.", show_default=False)]
File = Annotated[Path | None, typer.Option("--file", "-f", help="A file with the text; one text a line, unless said.")]
Json = Annotated[bool, typer.Option("--json", help="Print a line of JSON for each.")]
Batch = Annotated[int, typer.Option(min=1, help="So many at a time.")]
NewTokens = Annotated[int | None, typer.Option("--max-new-tokens", "-n", min=1, help="The longest new text.")]
Beams = Annotated[int | None, typer.Option(min=1, help="Beam search with so many beams; 1 for none.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="Any other setting, as in -o no_repeat_ngram_size=3. Repeat for more."),
]
_SAMPLING = {"rich_help_panel": "Sampling (each of them turns it on)"}
_MODEL = {"rich_help_panel": "Model"}


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    for function in (generate, classify, tag, answer, summarize, translate, transcribe, embed):
        app.command()(_command(function))


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """A function of a loaded model as a command: of its folder, and of how to load it."""
    loading, own = _parameters(_load), _parameters(function)[1:]

    @functools.wraps(function)
    def run(**given: Any) -> None:
        with usage_errors():
            model = _load(**{parameter.name: given.pop(parameter.name) for parameter in loading})
            function(model, **given)

    every = [loading[0], *own, *loading[1:]]
    run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return run


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """With what their annotations stand for."""
    hints = get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters.values()
    return [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in found]


def _load(
    model: Annotated[str, typer.Argument(help="The folder of a checkpoint, or a repository on the hub.")],
    device: Annotated[str, typer.Option(help="Where to compute, as in cuda.", **_MODEL)] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the file's if left out.", **_MODEL)
    ] = None,
    backend: Annotated[str, typer.Option(help="The attention back end.", **_MODEL)] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Number of threads.", **_MODEL)] = None,
) -> Loaded:
    if threads is not None:
        torch.set_num_threads(threads)
    where, kind = _device(device), _dtype(dtype)
    with errors.status(f"loading {escape(model)}"):
        return load(model, dtype=kind, device=where, backend=backend)


def _dtype(name: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise ValueError(f"--dtype is {name}; allowed: {', '.join(known)}")
    return None if name is None else known[name]


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


# ------------------------------------------------------------------------------------------------------- new text


def generate(
    model: Loaded,
    prompts: Texts = None,
    file: File = None,
    max_new_tokens: NewTokens = None,
    sample: Annotated[bool | None, typer.Option("--sample/--greedy", help="Draw tokens, or take the best.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Above 1 is wilder.", **_SAMPLING)] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Only the best so many; 0 for all.", **_SAMPLING)] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the best of this probability.", **_SAMPLING)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes draws repeatable.", **_SAMPLING)] = None,
    beams: Beams = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="So many texts for each prompt.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 against repetition.")] = None,
    option: Options = None,
    echo: Annotated[bool | None, typer.Option(help="Show prompts too; by default on a terminal.")] = None,
    as_json: Json = False,
) -> None:
    """Continue prompts by a causal model, or answer them by an encoder-decoder (T5, BART).

    One text is shown while it is written. Several prompts are one batch, with a progress bar.
    """
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "num_beams": beams,
        "num_return_sequences": sequences,
        "repetition_penalty": repetition_penalty,
        **parse_options(option),
    }
    draws = ("temperature", "top_k", "top_p", "min_p", "seed")
    if options["do_sample"] is None and any(options.get(name) is not None for name in draws):
        options["do_sample"] = True
    texts = read_texts(prompts, file)
    config = generation_config(model, options, 1)
    echo = console.is_terminal if echo is None else echo
    between = "" if isinstance(model.model, DecoderModel) else "\n"
    if len(texts) * config.num_return_sequences == 1 and config.num_beams == 1 and not as_json:
        shown = [texts[0] + between] if echo else []  # not before there is something behind it: it may be an error

        def show(_: int, piece: str) -> None:
            while shown:
                say(shown.pop(), end="", style="dim")
            say(piece, end="")

        tasks.generate(model, texts, on_text=show, **options)
        show(0, "\n")
        return
    counts = config.num_beams == 1
    with progress("writing", config.max_new_tokens if counts else None, "tokens" if counts else "") as advance:
        on_step = (lambda: advance(1)) if counts else None
        found = tasks.generate(model, texts, on_step=on_step, **options)
    for number, text in enumerate(found):
        prompt = texts[number // config.num_return_sequences]
        if as_json:
            say_json(prompt=prompt, text=text)
            continue
        if echo:
            say(prompt, end=between, style="dim")
        say(text)


def summarize(
    model: Loaded,
    texts: Texts = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file: all of it is one text.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Written before each text; the checkpoint's by default.")] = None,
    max_new_tokens: NewTokens = None,
    beams: Beams = None,
    option: Options = None,
    batch_size: Batch = 8,
    as_json: Json = False,
) -> None:
    """Summarize texts by an encoder-decoder (BART, T5). What comes by --file or stdin is one text."""
    given = read_texts(texts, file, whole=True)
    options = {"max_new_tokens": max_new_tokens, "num_beams": beams, **parse_options(option)}
    with progress("summarizing", len(given), "texts") as advance:
        found = tasks.summarize(model, given, prefix=prefix, batch_size=batch_size, on_done=advance, **options)
    _say_pairs("text", given, "summary", found, as_json)


def translate(
    model: Loaded,
    texts: Texts = None,
    file: File = None,
    source: Annotated[str | None, typer.Option("--from", help="A language as config.json has it, as in en.")] = None,
    target: Annotated[str | None, typer.Option("--to", help="The same, as in de.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Written before each text, in place of --from and --to.")] = None,
    max_new_tokens: NewTokens = None,
    beams: Beams = None,
    option: Options = None,
    batch_size: Batch = 8,
    as_json: Json = False,
) -> None:
    """Translate texts by an encoder-decoder (Marian, T5), one a line."""
    given = read_texts(texts, file)
    options = {"max_new_tokens": max_new_tokens, "num_beams": beams, **parse_options(option)}
    languages = {"source": source, "target": target, "prefix": prefix}
    with progress("translating", len(given), "texts") as advance:
        found = tasks.translate(model, given, **languages, batch_size=batch_size, on_done=advance, **options)
    _say_pairs("text", given, "translation", found, as_json)


def transcribe(
    model: Loaded,
    files: Annotated[list[str], typer.Argument(help="WAV files; others need the package soundfile.")],
    language: Annotated[str | None, typer.Option(help="As in en; what is heard, if left out.")] = None,
    task: Annotated[str, typer.Option(help="transcribe, or translate into English.")] = "transcribe",
    max_new_tokens: NewTokens = None,
    beams: Beams = None,
    option: Options = None,
    batch_size: Batch = 1,
    as_json: Json = False,
) -> None:
    """Write down what is said, by Whisper, 30 seconds at a time."""
    options = {"max_new_tokens": max_new_tokens, "num_beams": beams, **parse_options(option)}
    for name in files:
        with progress("listening", None, "pieces") as advance:
            text = tasks.transcribe(
                model,
                name,
                language=language,
                task=task,
                batch_size=batch_size,
                on_piece=lambda _, total, advance=advance: advance(1, total),  # type: ignore[misc]
                **options,
            )
        _say_pairs("file", [name], "text", [text], as_json)


def _say_pairs(given: str, sources: Sequence[str], made: str, results: Sequence[str], as_json: bool) -> None:
    for source, result in zip(sources, results, strict=True):
        if as_json:
            say_json(**{given: source, made: result})
        else:
            say(result)


# --------------------------------------------------------------------------------------------------------- labels


def classify(
    model: Loaded,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts, or paths of images; else --file or stdin.", show_default=False)
    ] = None,
    file: File = None,
    labels: Annotated[
        str | None, typer.Option(help="Zero-shot: any labels, separated by commas, by an MNLI checkpoint.")
    ] = None,
    template: Annotated[str, typer.Option(help="The sentence that says a label.")] = "This example is {}.",
    multi_label: Annotated[bool, typer.Option("--multi-label", help="Zero-shot: each label by itself.")] = False,
    top: Annotated[int | None, typer.Option(min=1, help="So many labels; 1, or 5 of a single text.")] = None,
    batch_size: Batch = 32,
    as_json: Json = False,
) -> None:
    """Label texts or images by a classifier, or texts by any labels (--labels)."""
    given = read_texts(texts, file)
    choices = [label.strip() for label in (labels or "").split(",") if label.strip()]
    images = model.model.stacks[0].config.front_end == "patches"
    count = len(given) * max(len(choices), 1)
    unit = "images" if images else "pairs" if choices else "texts"
    with progress("classifying", count, unit) as advance:
        if labels is not None:
            found = tasks.zero_shot(
                model,
                given,
                choices,
                template=template,
                multi_label=multi_label,
                batch_size=batch_size,
                on_done=advance,
            )
        else:
            function = tasks.classify_images if images else tasks.classify
            found = function(model, given, batch_size=batch_size, on_done=advance)
    top = top or (5 if len(given) == 1 else 1)
    if as_json:
        for text, ranked in zip(given, found, strict=True):
            say_json(text=text, labels=[label._asdict() for label in ranked[:top]])
        return
    rows = [(*label, text) for text, ranked in zip(given, found, strict=True) for label in ranked[:top]]
    say_rows(("label", "score", "image" if images else "text"), rows)


def tag(
    model: Loaded,
    texts: Texts = None,
    file: File = None,
    aggregate: Annotated[
        str,
        typer.Option(help="none: tokens; simple: neighbours of one label; first: whole words, by their first token."),
    ] = "simple",
    batch_size: Batch = 32,
    as_json: Json = False,
) -> None:
    """Find names and other labelled parts of texts by a token classifier."""
    given = read_texts(texts, file)
    with progress("tagging", len(given), "texts") as advance:
        found = tasks.tag(model, given, aggregate=aggregate, batch_size=batch_size, on_done=advance)  # type: ignore[arg-type]
    if as_json:
        for text, entities in zip(given, found, strict=True):
            say_json(text=text, entities=[entity._asdict() for entity in entities])
        return
    rows = [(number, *entity) for number, entities in enumerate(found, 1) for entity in entities]
    say_rows(("text", "label", "score", "part", "start", "end"), rows)


def answer(
    model: Loaded,
    questions: Annotated[list[str], typer.Argument(help="Questions about the context.")],
    context: Annotated[str | None, typer.Option("--context", "-c", help="The text that holds the answers.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file with it; else stdin.")] = None,
    top: Annotated[int, typer.Option(min=1, help="So many answers.")] = 1,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="No answer is longer.")] = 30,
    as_json: Json = False,
) -> None:
    """Find the part of a text that answers a question. A long text is read in windows that overlap."""
    (text,) = read_texts(None if context is None else [context], file, whole=True)
    with progress("reading", len(questions), "questions") as advance:
        found = []
        for question in questions:
            found.append(tasks.answer(model, question, text, top_k=top, max_answer_tokens=max_answer_tokens))
            advance(1)
    if as_json:
        for question, answers in zip(questions, found, strict=True):
            say_json(question=question, answers=[each._asdict() for each in answers])
        return
    rows = [(*each, question) for question, answers in zip(questions, found, strict=True) for each in answers]
    say_rows(("answer", "score", "start", "end", "question"), rows)


# -------------------------------------------------------------------------------------------------------- vectors


def embed(
    model: Loaded,
    texts: Texts = None,
    file: File = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="A .npy file, or .jsonl; JSON lines on stdout if left out.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="mean or cls; what the checkpoint says, if left out.")] = None,
    normalize: Annotated[bool | None, typer.Option(help="Length 1; what the checkpoint says, if left out.")] = None,
    batch_size: Batch = 32,
) -> None:
    """Encode texts as vectors by an encoder (sentence-transformers and kin)."""
    if output is not None and output.suffix not in (".npy", ".jsonl"):
        raise ValueError(f"--output is {output}; allowed: a name that ends in .npy or .jsonl")
    given = read_texts(texts, file)
    with progress("encoding", len(given), "texts") as advance:
        vectors = tasks.embed(
            model, given, pooling=pooling, normalize=normalize, batch_size=batch_size, on_done=advance
        )
    if output is None:
        for text, vector in zip(given, vectors.tolist(), strict=True):
            say_json(text=text, vector=vector)
        return
    save_vectors(output, given, vectors)
    errors.print(f"{len(given)} vectors of {vectors.shape[1]} numbers: {output}", highlight=False, soft_wrap=True)
