"""Real English text that is on every machine: the language reference inside CPython's ``pydoc_data``."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What tells prose from the grammar rules, code, tables and headings around it: it starts like a sentence,
# ends like one, and has words in between.
_PROSE_START = re.compile(r"[A-Z“\"*]")
_PROSE_END = (".", ":", "!", "?", ")")
_NOT_PROSE = re.compile(r"[*=~^\-+|]{3,}|>>>|::=|\.\.\. ")
_SHORTEST_PARAGRAPH = 40
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!i\.e\.)(?<!e\.g\.)(?<!etc\.) +(?=[A-Z“\"*])")


@dataclass(frozen=True)
class Corpus:
    """Prose paragraphs, each on one line and each once, in two parts that share none."""

    training: tuple[str, ...]
    validation: tuple[str, ...]


def load_corpus(validation_every: int = 10) -> Corpus:
    """The prose of the language reference, unwrapped; one run of paragraphs in ``validation_every`` held out.

    The topics repeat each other (several include the same section), so paragraphs are made unique
    before they are divided: otherwise the validation text would have been seen in training.
    """
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise RuntimeError(
            "the demo reads its text from the standard library's pydoc_data, and this Python came without it: "
            "it may be in another package of the system, or use a Python from python.org"
        ) from error
    blocks = (_unwrap(block) for topic in topics.topics.values() for block in re.split(r"\n\s*\n", topic))
    paragraphs = tuple(dict.fromkeys(block for block in blocks if _is_prose(block)))
    # Neighbours speak of the same thing, so runs of them are held out, not single ones.
    run = 20
    parts: tuple[list[str], list[str]] = ([], [])
    for i, paragraph in enumerate(paragraphs):
        parts[i // run % validation_every == validation_every - 1].append(paragraph)
    return Corpus(training=tuple(parts[0]), validation=tuple(parts[1]))


def _unwrap(block: str) -> str:
    """A block's lines as one, without the term that stands above an indented definition."""
    lines = block.splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines]
    is_bullet = block.lstrip().startswith("* ")
    if len(lines) > 1 and indents[1] > indents[0] and not is_bullet:
        lines = lines[1:]
    # A word that was broken at its hyphen gets no space.
    return re.sub(r"(?<=\w)- (?=\w)", "-", " ".join(" ".join(lines).split()))


def _is_prose(block: str) -> bool:
    return (
        len(block) >= _SHORTEST_PARAGRAPH
        and _PROSE_START.match(block) is not None
        and block.endswith(_PROSE_END)
        and _NOT_PROSE.search(block) is None
    )


def sentences(corpus: Corpus, *, shortest: int = 20, longest: int = 600) -> list[str]:
    """The sentences of all of the corpus, in order and each once; lengths in characters."""
    found: dict[str, None] = {}
    for paragraph in corpus.training + corpus.validation:
        for sentence in _SENTENCE_END.split(paragraph.removeprefix("* ")):
            if shortest <= len(sentence) <= longest and sentence[-1] in ".!?":
                found[sentence] = None
    return list(found)


def spread(items: list[str], number: int) -> list[str]:
    """``number`` of the items, evenly from all of the list."""
    if number >= len(items):
        return list(items)
    return [items[i * len(items) // number] for i in range(number)]
