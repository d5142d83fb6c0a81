"""Stop strings: where a sequence's text first holds one. The engine knows token ids only."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


class StopStrings:
    """Watches one sequence for `stop`; the same answer however its tokens arrive in pieces."""

    def __init__(self, stop: tuple[str, ...], decode: Decode) -> None:
        self._stop = stop
        self._decode = decode
        # A token is at least one byte of the text, so a match ends within so many tokens.
        self._tail = max(len(text.encode()) for text in stop) + 4
        self.token_ids: list[int] = []
        self._num_matched: int | None = None  # tokens up to the one that completes a stop string

    def add(self, token_ids: Sequence[int]) -> bool:
        """Take in new tokens; True once a stop string is complete."""
        first_new = len(self.token_ids)
        self.token_ids += token_ids
        if self._num_matched is None and self._holds_one(first_new, len(self.token_ids)):
            self._num_matched = next(
                end
                for end in range(first_new + 1, len(self.token_ids) + 1)
                if self._holds_one(first_new, end)
            )
        return self._num_matched is not None

    @property
    def matched_token_ids(self) -> list[int]:
        """The tokens up to the one that completes a stop string."""
        return self.token_ids[: self._num_matched]

    def cut(self, text: str) -> str:
        """`text` up to its first stop string; all of it where it has none."""
        return text[
            : min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        ]

    def _holds_one(self, first_new: int, end: int) -> bool:
        text = self._decode(self.token_ids[max(0, first_new - self._tail) : end])
        return any(stop in text for stop in self._stop)
