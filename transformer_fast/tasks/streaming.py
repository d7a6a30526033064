"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: What decoding gives for bytes that are no whole character (yet).
_INCOMPLETE = "\ufffd"

Decode = Callable[[Sequence[int]], str]


def continuation(decode: Decode, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ``ids`` add to that of ``prompt``: a space between the two belongs to it."""
    before, text = decode(prompt), decode([*prompt, *ids])
    return text[len(before) :] if text.startswith(before) else decode(ids)


class TextStream:
    """The text of a growing sequence of tokens, in pieces that are never taken back.

    A byte-level token may hold a part of a character: what ends in one is held back until its other bytes are there.
    What a token looks like depends on the one before it (many decoders drop the space in front of the first), so each
    piece is the difference of two decodings that begin at the same token, the first of the piece before: the work for
    a token does not grow with the text.

    Args:
        decode: from ids to text.
        prompt: ids whose text is known already and no part of any piece.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt)
        self._told = len(self._ids)  # of the ids, those whose text is known
        self._before = decode(self._ids)  # theirs

    def push(self, token: int) -> str:
        """What ``token`` completes: often a word, sometimes nothing yet."""
        self._ids.append(token)
        return self._take(hold=True)

    def finish(self) -> str:
        """What was held back, bytes that stayed incomplete as U+FFFD."""
        return self._take(hold=False)

    def _take(self, hold: bool) -> str:
        text = self._decode(self._ids)
        if len(text) <= len(self._before) or (hold and text.endswith(_INCOMPLETE)):
            return ""
        piece = text[len(self._before) :]
        self._ids = self._ids[self._told :]
        self._told, self._before = len(self._ids), self._decode(self._ids)
        return piece
