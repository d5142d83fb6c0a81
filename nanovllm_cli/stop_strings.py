"""Stop strings: where a sequence's text first holds one. The engine knows token ids only."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


class StopStrings:
    """Watches one sequence for `stop`; the same answer however its tokens arrive in pieces."""

    def __init__(self, stop: tuple[str, ...], decode: Decode) -> None:
        self._stop = stop
        self._decode = decode
        # A token with text is at least a byte of it, so a match ends within so many of them.
        self._tail = max(len(text.encode()) for text in stop) + 4
        self.token_ids: list[int] = []
        self._recent: list[int] = []  # the last tokens with any text; special ones have none
        self._num_matched: int | None = None  # tokens up to the one that completes a stop string

    def add(self, token_ids: Sequence[int]) -> bool:
        """Take in new tokens; True once a stop string is complete."""
        first_new = len(self.token_ids)
        self.token_ids += token_ids
        if self._num_matched is not None:
            return True
        if self._hold_one(token_ids):
            counts = range(1, len(token_ids) + 1)
            num_new = next(count for count in counts if self._hold_one(token_ids[:count]))
            self._num_matched = first_new + num_new
            return True
        with_text = [token_id for token_id in token_ids if self._has_text(token_id)]
        self._recent = (self._recent + with_text)[-self._tail :]
        return False

    @property
    def matched_token_ids(self) -> list[int]:
        """The tokens up to the one that completes a stop string."""
        return self.token_ids[: self._num_matched]

    def cut(self, text: str) -> str:
        """`text` up to its first stop string; all of it where it has none."""
        return text[
            : min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        ]

    def _has_text(self, token_id: int) -> bool:
        """Whether it adds to a text; special ones do not.

        A blank at a text's beginning is left out by some tokenizers, so it is not looked at alone.
        """
        return bool(self._decode([token_id] * 4))

    def _hold_one(self, new_token_ids: Sequence[int]) -> bool:
        text = self._decode([*self._recent, *new_token_ids])
        return any(stop in text for stop in self._stop)
