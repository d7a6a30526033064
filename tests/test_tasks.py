"""What models are for: texts, labels and answers, against the pipelines of transformers on tiny checkpoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks_hf import (
    CONTEXT,
    TEXTS,
    UNICODE,
    byte_pairs,
    check_scores,
    pipeline,
    split,
    their_tokenizer,
    theirs,
    word_pieces,
    zoo,
)

from transformer_fast import tasks
from transformer_fast.tasks import Tokenizer

# ------------------------------------------------------------------------------------------------- streamed text


@pytest.mark.parametrize("prompt", ["", "Angela lives"])
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_pieces_of_a_stream_are_the_text(kind: str, prompt: str) -> None:
    """Any ids at all: bytes that are no characters, special tokens, subwords without a beginning."""
    backend = word_pieces() if kind == "words" else byte_pairs("gpt")
    tokenizer = Tokenizer(backend)
    start = backend.encode(prompt, add_special_tokens=False).ids[:4]
    for _ in range(20):
        ids = torch.randint(backend.get_vocab_size(), (40,)).tolist()
        stream = tasks.TextStream(tokenizer.decode, start)
        pieces = [*map(stream.push, ids), stream.finish()]
        assert "".join(pieces) == tokenizer.decode(start + ids)[len(tokenizer.decode(start)) :]


def test_a_stream_shows_whole_characters_only() -> None:
    tokenizer = Tokenizer(byte_pairs("gpt"))
    ids = tokenizer.encode([UNICODE])[0].ids
    stream = tasks.TextStream(tokenizer.decode)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == UNICODE
    assert pieces.count("") > 8, "characters of several bytes come with their last one"
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""
    cut = tasks.TextStream(tokenizer.decode)
    assert [cut.push(token) for token in tokenizer.encode(["日"])[0].ids[:2]] == ["", ""]
    assert cut.finish() == "\ufffd"


# ------------------------------------------------------------------------------------------------------ new text


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_is_the_pipeline(options: dict[str, Any]) -> None:
    folder = zoo("gpt")
    options = options | dict(max_new_tokens=9, repetition_penalty=2.0)
    ours = tasks.generate(folder, TEXTS, **options)
    run = pipeline("text-generation", folder)
    due = [run(text, do_sample=False, return_full_text=False, **options) for text in TEXTS]
    assert ours == [each["generated_text"] for found in due for each in found]


@pytest.mark.parametrize("name", ["bart", "t5", "marian"])
def test_generate_by_an_encoder_decoder(name: str) -> None:
    folder = zoo(name)
    options = dict(max_new_tokens=9, repetition_penalty=2.0)
    assert tasks.generate(folder, TEXTS, **options) == [generated(folder, text, **options) for text in TEXTS]


def generated(folder: Path, text: str, **options: Any) -> str:
    """By transformers."""
    tokenizer = their_tokenizer(folder)
    ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.decode(theirs(folder).generate(**ids, **options)[0], skip_special_tokens=True)


def test_generate_streams_every_row_until_its_end() -> None:
    loaded = tasks.load(zoo("gpt"))
    batch = loaded.tokenizer(TEXTS, padding_side="left")
    options = dict(max_new_tokens=12, do_sample=True, seed=3, num_return_sequences=2)
    ids = loaded.model.generate(batch.input_ids, batch.attention_mask, **options, eos_token_id=())
    made = ids[:, batch.input_ids.shape[1] :].tolist()
    end = made[0][4]  # what the first row ends with
    cut = [row[: row.index(end)] if end in row else row for row in made]
    rows: dict[int, str] = dict.fromkeys(range(6), "")
    steps: list[int] = []

    def on_text(row: int, piece: str) -> None:
        rows[row] += piece

    ours = tasks.generate(loaded, TEXTS, on_text=on_text, on_step=lambda: steps.append(1), eos_token_id=end, **options)
    assert list(rows.values()) == ours
    assert ours == [loaded.tokenizer.decode(row) for row in cut]
    assert len(steps) == 12 and len(cut[0]) <= 4 and max(map(len, cut)) == 12


def test_lengths_and_unknown_options() -> None:
    loaded = tasks.load(zoo("gpt"))
    long = TEXTS[2] * 2
    room = 64 + 1 - len(loaded.tokenizer.encode([long])[0].ids)
    steps: list[int] = []
    tasks.generate(loaded, [long], on_step=lambda: steps.append(1), eos_token_id=())
    assert len(steps) == room, "as much as the position table holds"
    with pytest.raises(ValueError, match=r"beam_number; allowed: .*num_beams"):
        tasks.generate(loaded, TEXTS, beam_number=3)
    with pytest.raises(ValueError, match="text 2 of 2 is empty"):
        tasks.generate(loaded, ["a", ""])


def test_summaries_have_the_prefix_and_settings_of_the_checkpoint() -> None:
    folder = zoo("t5")
    done: list[int] = []
    ours = tasks.summarize(folder, TEXTS, batch_size=2, on_done=done.append)
    settings = dict(num_beams=2, max_length=9, length_penalty=2.0)
    assert ours == [generated(folder, "summarize: " + text, **settings) for text in TEXTS]
    assert done == [2, 1]
    assert tasks.summarize(folder, TEXTS[:1], prefix="", num_beams=1) == [
        generated(folder, TEXTS[0], max_length=9, num_beams=1)
    ]


def test_what_a_model_cannot_hold_is_cut_with_a_warning() -> None:
    long = " ".join(TEXTS * 3)
    with pytest.warns(UserWarning, match="1 of 2 texts are too long and were cut to 48 tokens"):
        first, _ = tasks.summarize(zoo("bart"), [long, "who?"], max_new_tokens=5)
    tokenizer = their_tokenizer(zoo("bart"))
    ids = tokenizer(long, return_tensors="pt", truncation=True, max_length=48, return_token_type_ids=False)
    due = theirs(zoo("bart")).generate(**ids, max_new_tokens=5)
    assert first == tokenizer.decode(due[0], skip_special_tokens=True)


def test_translations() -> None:
    t5, marian = zoo("t5"), zoo("marian")
    due = generated(t5, "translate English to French: " + TEXTS[0], max_length=8)
    assert tasks.translate(t5, TEXTS[:1], source="en", target="fr") == [due]
    assert tasks.translate(marian, TEXTS) == [generated(marian, text) for text in TEXTS]
    assert tasks.translate(marian, ["who?"], target="fra") == [generated(marian, ">>fra<< who?")]
    with pytest.raises(ValueError, match=r"source=None and target=None .*; allowed: en to de, en to fr, or a prefix"):
        tasks.translate(t5, TEXTS)
    with pytest.raises(ValueError, match=r"target='xx' .*; allowed: none, it translates as it is, or a prefix"):
        tasks.translate(marian, TEXTS, target="xx")


# -------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "name", ["one label", "many labels", "sigmoid", "regression", "gpt labels", "gpt labels with padding"]
)
def test_classify_is_the_pipeline(name: str) -> None:
    folder = zoo(name)
    run = pipeline("text-classification", folder, top_k=None)
    ours = tasks.classify(folder, TEXTS, batch_size=2)
    check_scores(split(ours), lambda: split([[(e["label"], e["score"]) for e in run([t])[0]] for t in TEXTS]), folder)


def test_classify_pairs() -> None:
    folder = zoo("one label")
    run = pipeline("text-classification", folder, top_k=None)
    texts, pairs = TEXTS[:2], TEXTS[1::-1]
    given = [dict(text=a, text_pair=b) for a, b in zip(texts, pairs, strict=True)]
    due = lambda: split([[(e["label"], e["score"]) for e in run(pair)] for pair in given])  # noqa: E731
    check_scores(split(tasks.classify(folder, texts, pairs)), due, folder)
    with pytest.raises(ValueError, match="pairs has 1 texts; allowed: 3"):
        tasks.classify(folder, TEXTS, ["a"])


@pytest.mark.parametrize("multi_label", [False, True])
def test_zero_shot_is_the_pipeline(multi_label: bool) -> None:
    folder, labels = zoo("nli"), ["sea", "Babylon", "they say so"]
    template = "This is {}!"
    ours = tasks.zero_shot(folder, TEXTS, labels, template=template, multi_label=multi_label, batch_size=4)
    run = pipeline("zero-shot-classification", folder)

    def due() -> Any:
        found = [run(text, labels, hypothesis_template=template, multi_label=multi_label) for text in TEXTS]
        return split([[*zip(each["labels"], each["scores"], strict=True)] for each in found])

    check_scores(split(ours), due, folder)


@pytest.mark.parametrize("aggregate", ["none", "simple", "first"])
def test_tag_is_the_pipeline(aggregate: str) -> None:
    folder = zoo("names")
    ours = tasks.tag(folder, TEXTS, aggregate=aggregate, batch_size=2)
    assert all(text[e.start : e.end] == e.text for text, found in zip(TEXTS, ours, strict=True) for e in found)
    run = pipeline("token-classification", folder, aggregation_strategy=aggregate)
    key = "entity" if aggregate == "none" else "entity_group"

    def due() -> Any:
        found = [[(e[key], float(e["score"]), e["start"], e["end"]) for e in run(text)] for text in TEXTS]
        return split(found)

    without_text = [[(e.label, e.score, e.start, e.end) for e in found] for found in ours]
    assert sum(map(len, ours)) > 4
    check_scores(split(without_text), due, folder)


# ------------------------------------------------------------------------------------------------------- answers


def best_spans(folder: Path, question: str, windows: list[tuple[int, int]], longest: int) -> tuple[list[Any], Any]:
    """By the definition: for each window of the context (in tokens), each pair of a first and a last token."""
    whole = their_tokenizer(folder)(question, CONTEXT, return_offsets_mapping=True)
    head = whole.token_type_ids.index(1)
    offsets = whole.offset_mapping[head:-1]
    found: dict[tuple[int, int], float] = {}
    for begin, stop in windows:
        ids = whole.input_ids[:head] + whole.input_ids[head:-1][begin:stop] + whole.input_ids[-1:]
        types = [0] * head + [1] * (len(ids) - head)
        with torch.no_grad():
            output = theirs(folder)(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        keep = [0, *range(head, len(ids) - 1)]
        first, last = (logits[0, keep].softmax(0)[1:].tolist() for logits in (output.start_logits, output.end_logits))
        for i in range(stop - begin):
            for j in range(i, min(i + longest, stop - begin)):
                span = offsets[begin + i][0], offsets[begin + j][1]
                found[span] = max(found.get(span, 0.0), first[i] * last[j])
    return [sorted(found)], [found[span] for span in sorted(found)]


@pytest.mark.parametrize(("seqlen", "overlap", "longest"), [(48, None, 30), (48, None, 2), (20, 4, 3)])
def test_answers_are_the_best_spans(seqlen: int, overlap: int | None, longest: int) -> None:
    folder, question = zoo("answers"), "Where?"
    whole = their_tokenizer(folder)(question, CONTEXT).token_type_ids
    head, tokens = whole.index(1) + 1, whole.count(1) - 1  # all but the context, special tokens too
    size = seqlen - head
    step = size - (overlap if overlap is not None else size // 2)
    starts = range(0, max(tokens - size, 0) + step, step)
    windows = [(start, min(start + size, tokens)) for start in starts]
    assert len(windows) > 1, "the context should be longer than the model"
    ours = tasks.answer(
        folder, question, CONTEXT, top_k=9999, max_answer_tokens=longest, max_seqlen=seqlen, overlap=overlap
    )
    assert all(CONTEXT[each.start : each.end] == each.text for each in ours)
    assert [each.score for each in ours] == sorted((each.score for each in ours), reverse=True)
    few = tasks.answer(
        folder, question, CONTEXT, top_k=3, max_answer_tokens=longest, max_seqlen=seqlen, overlap=overlap
    )
    assert few == ours[:3]
    ours.sort(key=lambda each: (each.start, each.end))
    mine = [[(each.start, each.end) for each in ours]], [each.score for each in ours]
    check_scores(mine, lambda: best_spans(folder, question, windows, longest), folder)


def test_questions_that_leave_no_room() -> None:
    with pytest.raises(ValueError, match=r"max_seqlen=48 leaves -?[0-9]+ tokens beside a text of 270 characters"):
        tasks.answer(zoo("answers"), "Where? " * 38 + "Why?", CONTEXT)
    with pytest.raises(ValueError, match="context is empty"):
        tasks.answer(zoo("answers"), "Where?", " ")


# ---------------------------------------------------------------------------------------------- loading, in general


def test_a_function_as_the_tokenizer(tmp_path: Path) -> None:
    for name, task in (("gpt", tasks.generate), ("one label", tasks.classify)):
        theirs_as_ours = their_tokenizer(zoo(name))
        loaded = tasks.load(zoo(name), tokenizer=theirs_as_ours)
        assert task(loaded, TEXTS) == task(zoo(name), TEXTS)
    ids = tasks.load(zoo("one label"), tokenizer=lambda text: their_tokenizer(zoo("one label"))(text).input_ids)
    assert tasks.classify(ids, TEXTS) == tasks.classify(zoo("one label"), TEXTS)
    with pytest.raises(ValueError, match="decode"):
        tasks.generate(tasks.load(zoo("gpt"), tokenizer=lambda text: [5, 6]), TEXTS)
    with pytest.raises(ValueError, match="the tokenizer gives id 1234; allowed: below the model's 300"):
        tasks.generate(tasks.load(zoo("gpt"), tokenizer=lambda text: [5, 1234]), TEXTS)
    for name, task in (("names", tasks.tag), ("answers", tasks.answer)):
        loaded = tasks.load(zoo(name), tokenizer=lambda *texts: [2, 5, 3])
        with pytest.raises(ValueError, match=r"need.* the offsets of .*tokens.*: a tokenizer.json, not a function"):
            task(loaded, *([TEXTS] if task is tasks.tag else ["Where?", CONTEXT]))


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        (tasks.generate, "masked", "generate needs a causal language head.*; this checkpoint is a BertForMaskedLM"),
        (tasks.generate, "whisper", "this checkpoint is a WhisperForConditionalGeneration"),
        (tasks.summarize, "gpt", "summarize needs an encoder-decoder.*; this checkpoint is a GPT2LMHeadModel"),
        (tasks.translate, "nli", "translate needs .*; this checkpoint is a BartForSequenceClassification"),
        (tasks.classify, "masked", "needs a sequence classification head; this checkpoint is a BertForMaskedLM"),
        (tasks.classify, "vit", "classify needs a model of text; this checkpoint is a ViTForImageClassification"),
        (tasks.classify_images, "one label", "needs a model of images; .* BertForSequenceClassification"),
        (tasks.tag, "one label", "tag needs a token classification head"),
        (tasks.embed, "gpt", "embed needs an encoder of text; this checkpoint is a GPT2LMHeadModel"),
        (lambda model, texts: tasks.answer(model, "q", "c"), "names", "answer needs a question answering head"),
        (lambda model, texts: tasks.zero_shot(model, texts, ["a"]), "one label", "label 'entailment'; .*LABEL_0"),
        (lambda model, texts: tasks.transcribe(model, "a.wav"), "bart", "transcribe needs an encoder of audio"),
    ],
)  # fmt: skip
def test_the_wrong_head(task: Callable[..., Any], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(zoo(name), TEXTS)


def test_importing_the_tasks_brings_nothing_else() -> None:
    heavy = ("transformers", "PIL", "soundfile", "torchaudio", "tokenizers", "numpy.testing", "typer")
    code = f"import sys, transformer_fast.tasks; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
