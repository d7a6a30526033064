"""The tasks on the command line: what is printed and written, and the exit status."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tasks_hf import CONTEXT, TEXTS, save_pictures, save_speech, zoo
from typer.testing import CliRunner, Result

from transformer_fast import tasks
from transformer_fast.cli import app
from transformer_fast.tasks import commands, terminal

# ---------------------------------------------------------------------------------------------- the command line


def run(*arguments: Any, given: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=given, terminal_width=200)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def lines(*arguments: Any, given: str | None = None) -> list[Any]:
    """What a command printed, as JSON where it is that."""
    result = run(*arguments, given=given)
    assert result.exit_code == 0, result.output
    return [json.loads(line) if line.startswith("{") else line for line in result.stdout.splitlines()]


def test_generate_on_the_command_line(tmp_path: Path) -> None:
    folder = zoo("gpt")
    due = tasks.generate(folder, TEXTS, max_new_tokens=9)
    assert run("generate", folder, TEXTS[0], "-n", 9).stdout == due[0] + "\n"
    assert run("generate", folder, TEXTS[0], "-n", 9, "--echo").stdout == TEXTS[0] + due[0] + "\n"
    (tmp_path / "prompts").write_text("\n".join(TEXTS) + "\n\n")
    shown = [{"prompt": prompt, "text": text} for prompt, text in zip(TEXTS, due, strict=True)]
    assert lines("generate", folder, "--file", tmp_path / "prompts", "-n", 9, "--json") == shown
    assert lines("generate", folder, "--json", "-n", 9, given="\n".join(TEXTS)) == shown
    drawn = dict(do_sample=True, seed=4, top_k=0, temperature=0.7, num_return_sequences=2, no_repeat_ngram_size=2)
    due = tasks.generate(folder, TEXTS[:1], max_new_tokens=9, num_beams=2)
    assert run("generate", folder, TEXTS[0], "-n", 9, "--beams", 2).stdout == due[0] + "\n"
    found = lines("generate", folder, TEXTS[0], "--seed", 4, "--top-k", 0, "--temperature", 0.7, "--sequences", 2,
                  "-n", 9, "-o", "no-repeat-ngram-size=2", "--json")  # fmt: skip
    assert [each["text"] for each in found] == tasks.generate(folder, TEXTS[:1], max_new_tokens=9, **drawn)


def test_a_terminal_shows_prompts_progress_and_no_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    screens = [Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None) for _ in range(2)]
    for module in (terminal, commands):
        for name, screen in zip(("console", "errors"), screens, strict=True):
            monkeypatch.setattr(module, name, screen)
    folder = zoo("gpt")
    due = tasks.generate(folder, TEXTS, max_new_tokens=9, repetition_penalty=3.0)
    seen = [re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text) for text in due]
    run("generate", folder, TEXTS[0], "-n", 9, "--repetition-penalty", 3)
    assert screens[0].file.getvalue() == f"{TEXTS[0]}{seen[0]}\n"
    run("generate", folder, *TEXTS, "-n", 9, "--repetition-penalty", 3)
    assert screens[0].file.getvalue().endswith("".join(f"{a}{b}\n" for a, b in zip(TEXTS, seen, strict=True)))
    assert "writing" in screens[1].file.getvalue() and "9/9 tokens" in screens[1].file.getvalue()
    run("classify", zoo("one label"), "[red]\x1b[2Ja")
    assert "[red]\ufffd[2Ja" in screens[0].file.getvalue()
    assert "1/1 texts" in screens[1].file.getvalue()


def test_labels_on_the_command_line(tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path)
    label = tasks.classify(zoo("one label"), TEXTS)[1][0]
    found = lines("classify", zoo("one label"), *TEXTS)
    assert found[1] == f"{label.label}\t{label.score:.4f}\twho?" and len(found) == 3
    ranked = tasks.classify_images(zoo("vit"), pictures[:1])[0]
    due = [{"text": pictures[0], "labels": [each._asdict() for each in ranked[:2]]}]
    assert lines("classify", zoo("vit"), pictures[0], "--top", 2, "--json") == due
    best = tasks.zero_shot(zoo("nli"), TEXTS[:1], ["sea", "land"])[0]
    found = lines("classify", zoo("nli"), TEXTS[0], "--labels", "sea, land")
    assert [line.split("\t")[0] for line in found] == [each.label for each in best]
    entities = tasks.tag(zoo("names"), TEXTS[:1])[0]
    assert lines("tag", zoo("names"), TEXTS[0], "--json")[0]["entities"] == [each._asdict() for each in entities]
    assert len(lines("tag", zoo("names"), TEXTS[0])) == len(entities)
    best = tasks.answer(zoo("answers"), "Where?", CONTEXT)[0]
    found = lines("answer", zoo("answers"), "Where?", "Who?", given=CONTEXT)
    assert found[0].split("\t")[0] == best.text and len(found) == 2


def test_new_text_on_the_command_line(tmp_path: Path) -> None:
    spoken = save_speech(tmp_path)
    (tmp_path / "text").write_text(f"{TEXTS[0]}\n{TEXTS[1]}\n")
    whole = f"{TEXTS[0]}\n{TEXTS[1]}"
    assert lines("summarize", zoo("t5"), "-f", tmp_path / "text", "--json") == [
        {"text": whole, "summary": tasks.summarize(zoo("t5"), [whole])[0]}
    ]
    due = tasks.translate(zoo("t5"), TEXTS[:2], source="en", target="de")
    assert run("translate", zoo("t5"), "-f", tmp_path / "text", "--from", "en", "--to", "de").stdout == "\n".join(
        [*due, ""]
    )
    due = [{"file": spoken, "text": tasks.transcribe(zoo("whisper"), spoken, max_new_tokens=8)}]
    assert lines("transcribe", zoo("whisper"), spoken, "-n", 8, "--json") == due


def test_vectors_on_the_command_line(tmp_path: Path) -> None:
    vectors = tasks.embed(zoo("bert"), TEXTS)
    assert run("embed", zoo("bert"), *TEXTS, "--output", tmp_path / "v.npy").exit_code == 0
    assert np.array_equal(np.load(tmp_path / "v.npy"), vectors.numpy())
    due = [{"text": text, "vector": vector} for text, vector in zip(TEXTS, vectors.tolist(), strict=True)]
    assert lines("embed", zoo("bert"), given="\n".join(TEXTS)) == due
    run("embed", zoo("bert"), *TEXTS, "--output", tmp_path / "v.jsonl")
    assert [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()] == due


def test_errors_are_one_line_and_status_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, no_image = tmp_path / "empty", tmp_path / "no.png"
    empty.mkdir()
    no_image.write_text("not an image")
    bare = tmp_path / "bare"
    bare.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        for folder in (bare, broken):
            (folder / name).symlink_to(zoo("one label") / name)
    (bare / "vocab.txt").write_text("[PAD]")
    (broken / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    cases: list[tuple[list[Any], str]] = [
        (["classify", zoo("masked"), "a"], "classification head; this checkpoint is a BertForMaskedLM"),
        (["classify", empty, "a"], "has no config.json"),
        (["classify", tmp_path / "nowhere", "a"], "has no config.json"),
        (["classify", bare, "a"], "bare has no tokenizer.json (there is: vocab.txt). transformers makes one"),
        (["classify", broken, "a"], "tokenizer.json cannot be read as a tokenizer: "),
        (["classify", zoo("vit"), no_image], "no.png is no image that Pillow can read"),
        (["classify", zoo("vit"), tmp_path / "gone.png"], "gone.png"),
        (["classify", zoo("one label")], "stdin is empty"),
        (["classify", zoo("one label"), "a", "--dtype", "int8"], "--dtype is int8; allowed: float32"),
        (["classify", zoo("one label"), "a", "--device", "abacus"], "--device abacus cannot be used here"),
        (["classify", zoo("one label"), "a", "--backend", "abacus"], "abacus"),
        (["generate", zoo("gpt"), "a", "--top-p", 7], "top_p=7.0; allowed: float from 0 to 1"),
        (["generate", zoo("gpt"), "a", "-o", "wild"], "--option 'wild'; allowed: name=value"),
        (["generate", zoo("gpt"), "a", "-f", tmp_path / "gone"], "allowed: one of them"),
        (["generate", zoo("gpt"), "-f", tmp_path / "gone"], "gone"),
        (["embed", zoo("bert"), "a", "--output", "x.csv"], "--output is x.csv; allowed: a name that ends in"),
        (["transcribe", zoo("whisper"), no_image], "pip install soundfile"),
    ]  # fmt: skip
    for arguments, message in cases:
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments
        assert message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    picture = save_pictures(tmp_path)[0]
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = run("classify", zoo("vit"), picture)
    assert result.exit_code == 2 and "reading images needs Pillow: pip install Pillow" in result.stderr
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "tokenizing needs tokenizers" in run("classify", zoo("one label"), "a").stderr


def test_warnings_are_one_line() -> None:
    result = run("classify", zoo("one label"), " ".join(TEXTS * 3))
    assert result.exit_code == 0
    assert result.stderr == "warning: 1 of 1 texts are too long and were cut to 48 tokens\n"
