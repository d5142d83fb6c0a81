"""Many texts -> one regular expression that matches each of them and nothing else.

Texts that begin alike share their beginning, so that an automaton stands in one place where a
grammar of alternatives stands in as many as there are texts: llguidance allows 2,000 of those.
"""

from collections.abc import Iterable, Sequence


def choice_regex(choices: Iterable[str]) -> str:
    """Return the expression, in the notation of Rust's regex; 100,000 texts take a second."""
    texts = sorted(set(choices))
    return _branches(texts, 0, len(texts), 0)


def _branches(texts: Sequence[str], start: int, stop: int, depth: int) -> str:
    """What may follow the first `depth` characters, which texts[start:stop] have in common."""
    is_whole = len(texts[start]) == depth  # the shortest comes first
    at = start + is_whole
    branches = []
    while at < stop:
        end = at + 1
        while end < stop and texts[end][depth] == texts[at][depth]:
            end += 1
        shared = _num_shared(texts[at], texts[end - 1], depth)
        head = "".join(map(_escaped, texts[at][depth:shared]))
        branches.append(head + _branches(texts, at, end, shared))
        at = end
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and not is_whole else f"(?:{'|'.join(branches)})"
    return f"{joined}?" if is_whole else joined


def _num_shared(first: str, last: str, start: int) -> int:
    """Up to where two texts are alike, which are so at `start`; sorted, so are those between."""
    end = start
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    return end


def _escaped(char: str) -> str:
    return char if char.isalnum() or ord(char) > 0x7F else f"\\x{ord(char):02x}"
