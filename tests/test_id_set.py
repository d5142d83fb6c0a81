"""IdSet says what a set of all ids would say, in a few bytes an id."""

import random
import tracemalloc

from nanovllm_cli.id_set import IdSet

Id = str | int | None


def random_ids(count: int) -> list[Id]:
    """Ids of every kind, some of them more than once, near and far."""
    rng = random.Random(0)
    ids: list[Id] = []
    for number in range(count):
        kind = rng.random()
        if kind < 0.02:
            ids.append(None)
        elif kind < 0.1 and ids:
            ids.append(rng.choice(ids))
        elif kind < 0.15 and ids:
            ids.append(ids[-1])
        elif kind < 0.5:
            ids.append(number)
        else:
            ids.append(f"{number}")
    return ids


def test_two_hundred_thousand_ids_are_known_exactly_when_a_set_knows_them() -> None:
    ids = random_ids(200_000)
    seen: set[Id] = {None} - {None}
    expected = []
    for value in ids:
        expected.append(value in seen)
        if value is not None:
            seen.add(value)
    rng = random.Random(1)
    known, found = IdSet(), []
    at = 0
    while at < len(ids):
        size = rng.choice((1, 2, 256, 256, 5000))
        found += known.add(ids[at : at + size])
        at += size
    assert found == expected
    assert sum(expected) > 20_000


def test_a_number_is_not_the_text_of_it() -> None:
    ids = IdSet()
    assert ids.add([7, "7", "07", 7, "7"]) == [False, False, False, True, True]
    assert ids.add([-7, "int 7", "str 7", ""]) == [False, False, False, False]


def test_rows_without_an_id_are_never_the_same() -> None:
    ids = IdSet()
    assert ids.add([None, None]) == [False, False]
    assert ids.add([]) == []
    assert ids.add([None, ""]) == [False, False]


def test_an_id_takes_eight_bytes_and_not_a_hundred() -> None:
    tracemalloc.start()
    try:
        ids = IdSet()
        for first in range(0, 98_304, 4096):
            assert not any(ids.add([f"row-{n}" for n in range(first, first + 4096)]))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1e6
