"""TokenTexts: what single tokens are as text. A token of byte-level BPE may be half a character."""

from typing import NamedTuple

from tokenizers import Tokenizer


class TokenText(NamedTuple):
    """One token of the vocabulary."""

    token_id: int
    text: str  # U+FFFD where bytes are no whole character
    raw: bytes
    is_whole: bool  # whether `text` says all that `raw` does


class TokenTexts(dict[int, TokenText]):
    """Token id -> its text, made when it is first asked for; ids beyond the vocabulary are empty.

    A control token is the name it has.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()

    def __missing__(self, token_id: int) -> TokenText:
        name = self._tokenizer.id_to_token(token_id) or ""
        is_plain = token_id not in self._added and all(char in _BYTES for char in name)
        raw = bytes(_BYTES[char] for char in name) if is_plain else name.encode()
        text = raw.decode(errors="replace")
        found = self[token_id] = TokenText(token_id, text, raw, text.encode() == raw)
        return found


def _byte_of_char() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable ones as themselves, the others from 256 on.

    https://github.com/openai/gpt-2/blob/9b63575ef42771a015060c964af2c3da4cf7c8ab/src/encoder.py#L9
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = [(byte, byte) for byte in printable] + [(256 + n, b) for n, b in enumerate(others)]
    return {chr(code): byte for code, byte in pairs}


_BYTES = _byte_of_char()
