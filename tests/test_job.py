"""The loop between engine and output: samples, seeds, failures, stops; and the lines it writes."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import pytest

from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.request import Completion, Failure, Logprobs, NewTokens, Output, Request
from nanovllm_cli.feeder import TokenizedPrompt
from nanovllm_cli.job import Job
from nanovllm_cli.options import GenerateOptions
from nanovllm_cli.prompt_options import PromptOptions
from nanovllm_cli.prompts import Prompt, to_prompt
from nanovllm_cli.results import error_line, result_line
from nanovllm_cli.row_plan import sample_seed
from nanovllm_cli.rows import BadRow, Row
from nanovllm_cli.samples import Sample
from nanovllm_cli.signals import Signals
from nanovllm_cli.token_texts import TokenText
from nanovllm_cli.totals import Totals


def prompt_of(raw: bytes, index: int = 0) -> Prompt:
    row = Row(index=index, source="in.jsonl", line=index + 1, raw=raw, columns=orjson.loads(raw))
    prompt = to_prompt(row, PromptOptions())
    assert isinstance(prompt, Prompt), prompt
    return prompt


def sample(text: str = "done") -> Sample:
    return Sample(text=text, reasoning=None, finish_reason="stop", num_tokens=2)


def line_of(raw: bytes, count: int = 1) -> bytes:
    return result_line(
        prompt_of(raw), [sample(str(n)) for n in range(count)], 5, shape="columns", model="m"
    )


class FakeEngine:
    """Answers each request with what `script` says, one output a step."""

    def __init__(self, script: Callable[[Request], Sequence[Output]]) -> None:
        self.requests: list[Request] = []
        self.aborted: list[int] = []
        self.most_waiting = 0
        self._script = script
        self._outputs: deque[Output] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._outputs)

    def add(self, request: Request) -> Failure | None:
        self.requests.append(request)
        outputs = self._script(request)
        if outputs and isinstance(outputs[0], Failure):
            return outputs[0]
        self._outputs.extend(outputs)
        self.most_waiting = max(self.most_waiting, len(self._outputs))
        return None

    def abort(self, request_id: int) -> None:
        # What is on its way comes all the same, as it may from an engine.
        self.aborted.append(request_id)

    def step(self) -> list[Output]:
        return [self._outputs.popleft()]


class LetterTexts(dict[int, TokenText]):
    def __missing__(self, token_id: int) -> TokenText:
        return TokenText(token_id, chr(token_id), chr(token_id).encode(), True)


class FakeTokenizer:
    """A token is a letter; a prompt that ends with 9 thinks, until a !."""

    token_texts = LetterTexts()

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(map(ord, word)) for word in words)

    def end_think_of(self, prompt_token_ids: Sequence[int]) -> int | None:
        return ord("!") if prompt_token_ids[-1] == 9 else None

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def decode_completion(
        self, prompt: Sequence[int], token_ids: Sequence[int], cut: Callable[[str], str] | None
    ) -> tuple[str, str | None]:
        text = self.decode(token_ids)
        return (text if cut is None else cut(text)), None


class FakeFeeder:
    def __init__(self, fed: Sequence[TokenizedPrompt | BadRow]) -> None:
        self._fed = deque(fed)

    @property
    def is_done(self) -> bool:
        return not self._fed

    def get(self, *, wait: bool) -> TokenizedPrompt | BadRow | None:
        return self._fed.popleft() if self._fed else None


class FakeOutput:
    """Keeps the rows; `held` are those that an ordered output could not write yet."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.errors: dict[int, BadRow] = {}

    @property
    def num_held(self) -> int:
        done = {*self.rows, *self.errors}
        num_written = 0
        while num_written in done:
            num_written += 1
        return len(done) - num_written

    def flush(self) -> None:
        """Everything is in memory."""

    def write(self, index: int, line: bytes) -> None:
        assert index not in self.rows, "a row was written twice"
        self.rows[index] = json.loads(line)

    def write_error(self, row: BadRow) -> None:
        assert row.index not in self.errors, "a row failed twice"
        self.errors[row.index] = row


class FakeProgress:
    def say(self, event: str, message: str) -> None:
        """Nobody listens."""


def run_job(
    raws: Sequence[bytes | BadRow],
    script: Callable[[Request], Sequence[Output]],
    *,
    token_ids: Sequence[int] = (1, 2, 3),
    **options: Any,
) -> tuple[FakeEngine, FakeOutput, Totals]:
    fed: list[TokenizedPrompt | BadRow] = [
        TokenizedPrompt(prompt=prompt_of(raw, index), token_ids=[*token_ids])
        if isinstance(raw, bytes)
        else raw
        for index, raw in enumerate(raws)
    ]
    engine, output, totals = FakeEngine(script), FakeOutput(), Totals()
    fakes: dict[str, Any] = {
        "engine": engine,
        "tokenizer": FakeTokenizer(),
        "feeder": FakeFeeder(fed),
        "output": output,
    }
    given = GenerateOptions(inputs=[], **options)
    progress: Any = FakeProgress()
    Job(given, sampling=given.sampling, totals=totals, signals=Signals(), **fakes).run(progress)
    assert totals.num_rows == len(raws) == len(output.rows) + len(output.errors)
    return engine, output, totals


def letters(text: str) -> Any:
    return np.array([*map(ord, text)], np.int32)


def completed(
    request: Request, text: str, finish_reason: Any = "length", **logprobs: Logprobs
) -> Completion:
    return Completion(
        request_id=request.request_id,
        token_ids=letters(text),
        finish_reason=finish_reason,
        num_prompt_tokens=3,
        num_cached_tokens=0,
        **logprobs,
    )


def reported(request: Request, text: str, **more: Any) -> NewTokens:
    return NewTokens(request_id=request.request_id, token_ids=letters(text), **more)


def logprobs_of(values: Sequence[float], k: int = 0) -> Logprobs:
    """The n-th likeliest token is the n-th letter of the alphabet, and 1/2 less than the one."""
    chosen = np.array(values, np.float32)
    return Logprobs(
        values=chosen,
        top_ids=np.tile(np.arange(ord("a"), ord("a") + k, dtype=np.int32), (len(chosen), 1)),
        top_values=chosen[:, None] - np.arange(1, k + 1, dtype=np.float32) / 2,
    )


def test_the_stop_token_is_counted_and_not_shown() -> None:
    _, output, totals = run_job(
        [b'{"prompt": "a"}', b'{"prompt": "b"}'],
        lambda request: [completed(request, "xy$", "stop" if request.request_id else "length")],
    )
    assert output.rows[0]["completion"] == "xy$"
    assert output.rows[1]["completion"] == "xy"
    assert [row["usage"]["completion_tokens"] for row in output.rows.values()] == [3, 3]
    assert totals.finish_reasons == {"stop": 1, "length": 1}


def test_the_samples_of_a_row_come_in_their_order_with_seeds_of_their_own() -> None:
    order: list[Request] = []

    def script(request: Request) -> list[Output]:
        order.append(request)
        if len(order) < 3:
            return []
        return [completed(r, f"{r.request_id}") for r in reversed(order)]

    engine, output, _ = run_job([b'{"prompt": "a"}'], script, n=3)
    assert [c["completion"] for c in output.rows[0]["completions"]] == ["0", "1", "2"]
    assert output.rows[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3}
    assert len({request.sampling.seed for request in engine.requests}) == 3


def test_a_rows_own_settings_come_before_the_jobs() -> None:
    engine, output, _ = run_job(
        [b'{"prompt": "a", "n": 2, "temperature": 0.5, "seed": 9}', b'{"prompt": "b"}'],
        lambda request: [completed(request, "x")],
        n=3,
        seed=4,
        sampling={"temperature": 0.25, "top_p": 0.5},
    )
    assert [r.sampling.temperature for r in engine.requests] == [0.5] * 2 + [0.25] * 3
    assert {r.sampling.top_p for r in engine.requests} == {0.5}
    assert [len(row["completions"]) for row in output.rows.values()] == [2, 3]
    own = [sample_seed(4, 0, 9, n) for n in range(2)]
    assert [r.sampling.seed for r in engine.requests[:2]] == own


def test_a_stop_string_ends_a_sample_and_what_comes_later_is_dropped() -> None:
    def script(request: Request) -> list[Output]:
        assert request.reports_tokens
        parts = [NewTokens(request_id=request.request_id, token_ids=letters(t))
                 for t in ("abE", "NDc", "def")]  # fmt: skip
        return [*parts, completed(request, "abENDcdef")]

    engine, output, _ = run_job([b'{"prompt": "a", "stop": "END"}'], script)
    assert engine.aborted == [0]
    assert output.rows[0]["completion"] == "ab"
    assert output.rows[0]["finish_reason"] == "stop"
    assert output.rows[0]["usage"]["completion_tokens"] == 5  # up to the one that completes it


def test_a_stop_string_in_the_last_tokens_is_found_too() -> None:
    def script(request: Request) -> list[Output]:
        first = NewTokens(request_id=request.request_id, token_ids=letters("ab"))
        return [first, completed(request, "abENDc$", "stop")]

    engine, output, _ = run_job([b'{"prompt": "a"}'], script, stop=("zzz", "END"))
    assert engine.aborted == []
    assert output.rows[0]["completion"] == "ab"
    assert output.rows[0]["usage"]["completion_tokens"] == 5


def test_a_failed_sample_fails_its_row_once_and_ends_the_others() -> None:
    def script(request: Request) -> list[Output]:
        if request.request_id == 1024 + 1:
            return [completed(request, "x"), completed(request, "y")]
        if request.request_id == 1024 + 2:
            failed = Failure(request_id=request.request_id, code="nan_logits", message="no")
            return [NewTokens(request_id=request.request_id, token_ids=letters("q")), failed]
        return [completed(request, "x")]

    engine, output, totals = run_job([b'{"prompt": "a", "stop": "z"}'] * 3, script, n=4)
    assert sorted(output.rows) == [0, 2]
    assert output.errors[1].code == "nan_logits"
    assert set(engine.aborted) == {1024, 1025, 1026, 1027}
    assert totals.errors == {"nan_logits": 1}


def test_a_row_that_the_engine_refuses_fails_at_once() -> None:
    def script(request: Request) -> list[Output]:
        refused = Failure(request_id=request.request_id, code="prompt_too_long", message="too long")
        return [refused] if request.request_id // 1024 == 1 else [completed(request, "x")]

    engine, output, _ = run_job([b'{"prompt": "a", "id": 5}'] * 3, script, n=2)
    assert sorted(output.rows) == [0, 2]
    assert (output.errors[1].id, output.errors[1].line) == (5, 2)
    assert len(engine.requests) == 2 + 1 + 2


def test_log_probabilities_are_those_of_every_token_the_stop_token_too() -> None:
    values = np.array([-0.1, -1.2345678, -1e-9], np.float32)

    def script(request: Request) -> list[Output]:
        assert request.sampling.logprobs == 2
        return [completed(request, "xy$", "stop", logprobs=logprobs_of(values.tolist(), 2))]

    _, output, _ = run_job([b'{"prompt": "a", "logprobs": 2}'], script)
    row = output.rows[0]
    assert row["completion"] == "xy"
    assert [entry["token"] for entry in row["logprobs"]] == ["x", "y", "$"]
    # The shortest decimals that are these fp32 numbers.
    assert [entry["logprob"] for entry in row["logprobs"]] == [-0.1, -1.2345678, -1e-9]
    assert row["logprobs"][0] == {
        **{"token": "x", "token_id": ord("x"), "logprob": -0.1},
        "top": [
            {"token": "a", "token_id": ord("a"), "logprob": -0.6},
            {"token": "b", "token_id": ord("b"), "logprob": -1.1},
        ],
    }


def test_a_row_that_asks_for_no_log_probabilities_has_none() -> None:
    def script(request: Request) -> list[Output]:
        assert request.sampling.logprobs is None
        return [completed(request, "xy")]

    _, output, _ = run_job([b'{"prompt": "a"}'], script)
    assert list(output.rows[0]) == ["prompt", "completion", "reasoning", "finish_reason", "usage"]


def test_the_first_token_of_a_prompt_has_no_log_probability() -> None:
    asked = []

    def script(request: Request) -> list[Output]:
        asked.append(request.sampling.prompt_logprobs)
        prompt = {} if asked[1:] else {"prompt_logprobs": logprobs_of([-1, -2], 1)}
        return [completed(request, "x", **prompt)]

    raw = b'{"prompt": "a", "prompt_logprobs": 1, "n": 3}'
    _, output, _ = run_job([raw], script, token_ids=[*map(ord, "abc")])
    assert asked == [1, None, None]  # they are the same for all samples
    first, second, third = output.rows[0]["prompt_logprobs"]
    assert first == {"token": "a", "token_id": ord("a"), "logprob": None}
    assert (second["token"], second["logprob"], second["top"][0]["logprob"]) == ("b", -1.0, -1.5)
    assert (third["token"], third["logprob"]) == ("c", -2.0)
    assert list(output.rows[0]) == ["prompt", "n", "completions", "prompt_logprobs", "usage"]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_stop_string_cuts_log_probabilities_too(restarts: bool) -> None:
    def script(request: Request) -> list[Output]:
        lost = [reported(request, "zzz", logprobs=logprobs_of([-9, -9, -9]))]
        return [
            *(lost if restarts else []),
            reported(request, "ab", logprobs=logprobs_of([-1, -2]), starts_anew=restarts),
            reported(request, "cdEe", logprobs=logprobs_of([-3, -4, -5, -6])),
        ]

    engine, output, _ = run_job([b'{"prompt": "a", "stop": "dE", "logprobs": 0}'], script)
    row = output.rows[0]
    assert (row["completion"], row["finish_reason"]) == ("abc", "stop")
    assert [entry["logprob"] for entry in row["logprobs"]] == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert row["usage"]["completion_tokens"] == 5
    assert engine.aborted == [0]


def test_a_stop_string_at_the_very_end_cuts_the_completions_log_probabilities() -> None:
    def script(request: Request) -> list[Output]:
        first = reported(request, "ab", logprobs=logprobs_of([-1, -2]))
        return [first, completed(request, "abEf", logprobs=logprobs_of([-1, -2, -3, -4]))]

    _, output, _ = run_job([b'{"prompt": "a", "stop": "E", "logprobs": 0}'], script)
    assert [entry["token"] for entry in output.rows[0]["logprobs"]] == ["a", "b", "E"]


def test_the_best_of_several_samples_are_those_of_the_highest_mean() -> None:
    texts = {0: ("long", [-1, -1, -1, -1]), 1: ("x", [-1.5]), 2: ("no", [-9, -1]), 3: ("y", [-0.5])}

    def script(request: Request) -> list[Output]:
        assert request.sampling.logprobs == 0
        text, values = texts[request.request_id]
        return [completed(request, text, logprobs=logprobs_of(values))]

    raw = b'{"prompt": "a", "n": 2, "best_of": 4, "temperature": 1}'
    _, output, totals = run_job([raw], script)
    row = output.rows[0]
    assert [c["completion"] for c in row["completions"]] == ["y", "long"]
    assert "logprobs" not in row["completions"][0]
    assert row["usage"]["completion_tokens"] == 8  # of all that were drawn
    assert totals.finish_reasons == {"length": 4}


def test_equal_samples_stay_in_their_order() -> None:
    def script(request: Request) -> list[Output]:
        return [completed(request, f"{request.request_id}", logprobs=logprobs_of([-1], 1))]

    raw = b'{"prompt": "a", "best_of": 3, "logprobs": 1}'
    _, output, _ = run_job([raw], script, n=2, sampling={"temperature": 1.0})
    assert [c["completion"] for c in output.rows[0]["completions"]] == ["0", "1"]
    assert output.rows[0]["completions"][0]["logprobs"][0]["top"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"prompt": "a", "best_of": 2, "n": 3}', "best_of is 2; it must be at least n, 3"),
        (b'{"prompt": "a", "n": 5}', "best_of is 4; it must be at least n, 5"),
        (b'{"prompt": "a", "temperature": 0}', "best_of is 4 at temperature 0"),
        (b'{"prompt": "a", "temperature": 0.000001}', "best_of is 4 at temperature 0"),
    ],
)
def test_a_best_of_that_cannot_be_fails_the_row(raw: bytes, words: str) -> None:
    engine, output, _ = run_job([raw], lambda request: [], best_of=4)
    assert output.errors[0].code == "bad_parameters"
    assert words in output.errors[0].message
    assert engine.requests == []


def test_as_many_as_there_are_need_no_comparison() -> None:
    raw = b'{"prompt": "a", "n": 4, "temperature": 0}'
    engine, output, _ = run_job([raw], lambda request: [completed(request, "x")], best_of=4)
    assert len(output.rows[0]["completions"]) == 4
    assert {request.sampling.logprobs for request in engine.requests} == {None}


def test_of_a_long_prompt_the_last_tokens_are_kept() -> None:
    raws = [b'{"prompt": "a"}', b'{"prompt": "a", "truncate_prompt_tokens": 1}',
            b'{"prompt": "a", "truncate_prompt_tokens": 9}']  # fmt: skip
    engine, output, _ = run_job(
        raws, lambda request: [completed(request, "x")], truncate_prompt_tokens=2
    )
    assert [request.prompt_token_ids for request in engine.requests] == [[2, 3], [3], [1, 2, 3]]
    assert [row["usage"]["prompt_tokens"] for row in output.rows.values()] == [2, 1, 3]


def test_a_rows_bad_words_come_before_the_jobs() -> None:
    raws = [b'{"prompt": "a"}', b'{"prompt": "a", "bad_words": ["no"]}',
            b'{"prompt": "a", "bad_words": []}']  # fmt: skip
    engine, _, _ = run_job(raws, lambda request: [completed(request, "x")], bad_words=("ab", "c"))
    found = [request.sampling.bad_words for request in engine.requests]
    assert found == [((97, 98), (99,)), ((110, 111),), ()]


def test_a_bad_word_of_too_many_tokens_is_named() -> None:
    long = b'{"prompt": "a", "bad_words": ["%s"]}' % (b"x" * 17)
    _, output, _ = run_job([long], lambda request: [])
    assert "the tokens of a bad word is 17" in output.errors[0].message
    with pytest.raises(UserError, match="--bad-word"):
        run_job([long], lambda request: [], bad_words=("x" * 17,))


CHAT = b'{"messages": [{"role": "user", "content": "a"}]%s}'


def test_a_budget_is_for_the_chats_that_think() -> None:
    def budgets(raw: bytes, token_ids: Sequence[int], **options: Any) -> list[Any]:
        engine, _, _ = run_job(
            [raw], lambda request: [completed(request, "x")], token_ids=token_ids, **options
        )
        (request,) = engine.requests
        return [request.sampling.thinking_budget, request.sampling.end_think_token_id]

    own, end = CHAT % b', "thinking_budget": 0', ord("!")
    assert budgets(own, [1, 9]) == [0, end]
    assert budgets(own, [1, 9], thinking_budget=5) == [0, end]
    assert budgets(CHAT % b"", [1, 9], thinking_budget=5) == [5, end]
    assert budgets(CHAT % b"", [1, 9]) == [None, None]
    # The job's is for those that think; a row's own is an error where it does not.
    assert budgets(CHAT % b"", [1], thinking_budget=5) == [None, None]
    assert budgets(b'{"prompt": "a"}', [1, 9], thinking_budget=5) == [None, None]
    _, output, _ = run_job([own], lambda request: [], token_ids=[1])
    assert output.errors[0].code == "bad_parameters"
    assert "this chat does not think" in output.errors[0].message


TOOLS = b', "tools": [{"type": "function", "function": {"name": "f"}}]'
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


def test_tool_calls_are_split_off_where_tools_were_offered() -> None:
    raws = [CHAT % TOOLS, CHAT % (TOOLS + b', "tool_choice": "none"'), CHAT % b""]
    _, output, totals = run_job(raws, lambda r: [completed(r, f"So: {CALL}$", "stop")])
    called, *others = output.rows.values()
    assert (called["completion"], called["finish_reason"]) == ("So:", "tool_calls")
    (call,) = called["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}
    for row in others:
        assert (row["completion"], row["finish_reason"]) == (f"So: {CALL}", "stop")
        assert "tool_calls" not in row
    assert totals.finish_reasons == {"tool_calls": 1, "stop": 2}


def test_no_call_is_null_and_a_cut_one_is_text_at_the_limit() -> None:
    texts = ["Hello", f"{CALL}{CALL[:-3]}"]
    _, output, _ = run_job(
        [CHAT % TOOLS] * 2, lambda r: [completed(r, texts[r.request_id // 1024])]
    )
    none, cut = output.rows.values()
    assert (none["completion"], none["tool_calls"]) == ("Hello", None)
    assert (cut["completion"], cut["finish_reason"]) == (CALL[:-3], "length")
    assert len(cut["tool_calls"]) == 1


def test_calls_of_different_samples_have_different_ids() -> None:
    raw = CHAT % (TOOLS + b', "n": 2, "parallel_tool_calls": false')
    _, output, _ = run_job([raw], lambda r: [completed(r, f"{CALL}{CALL}$", "stop")])
    calls = [c["tool_calls"] for c in output.rows[0]["completions"]]
    assert [len(of_sample) for of_sample in calls] == [1, 1]
    assert calls[0][0]["id"] != calls[1][0]["id"]


def test_settings_that_do_not_go_together_fail_the_row() -> None:
    _, output, _ = run_job(
        [b'{"prompt": "a", "max_tokens": 3}', b'{"prompt": "b"}'],
        lambda request: [completed(request, "x")],
        sampling={"min_tokens": 5},
    )
    assert output.errors[0].code == "bad_parameters"
    assert sorted(output.rows) == [1]


def test_rows_that_were_bad_before_are_counted_too() -> None:
    bad = BadRow(index=0, source="in", line=1, id=None, code="invalid_json", message="no")
    _, output, totals = run_job([bad, b'{"prompt": "a"}'], lambda r: [completed(r, "x")])
    assert output.errors == {0: bad}
    assert totals.num_failed_rows == 1


def test_no_more_rows_are_taken_in_than_may_be_in_flight() -> None:
    waiting: list[Request] = []

    def script(request: Request) -> list[Output]:
        # The first row is the slowest: it ends when nothing more is taken in.
        waiting.append(request)
        if len(waiting) < 6:
            return []
        return [completed(r, "x") for r in reversed(waiting[:6])]

    engine, output, _ = run_job(
        [b'{"prompt": "a"}'] * 6, script, max_inflight=6, engine=EngineConfig(max_num_seqs=2)
    )
    assert engine.most_waiting == 6
    assert sorted(output.rows) == [*range(6)]
    engine, _, _ = run_job([b'{"prompt": "a"}'] * 20, lambda r: [completed(r, "x")], max_inflight=3)
    assert engine.most_waiting == 3


def test_the_rows_that_wait_for_an_earlier_one_are_in_flight_still() -> None:
    most_held = []

    class Slow(FakeEngine):
        """Ends the first row last of those that it was given."""

        def step(self) -> list[Output]:
            most_held.append(len(self._outputs))
            return [self._outputs.pop()]

    fed = [
        TokenizedPrompt(prompt=prompt_of(b'{"prompt": "a"}', index), token_ids=[1])
        for index in range(50)
    ]
    engine, output = Slow(lambda r: [completed(r, "x")]), FakeOutput()
    fakes: dict[str, Any] = {
        "engine": engine,
        "tokenizer": FakeTokenizer(),
        "feeder": FakeFeeder(fed),
        "output": output,
    }
    given = GenerateOptions(inputs=[], max_inflight=7)
    progress: Any = FakeProgress()
    Job(given, sampling={}, totals=Totals(), signals=Signals(), **fakes).run(progress)
    assert len(output.rows) == 50
    assert max(most_held) == 7


def test_seeds_differ_between_rows_and_samples_and_jobs() -> None:
    seeds = {
        sample_seed(job, row, None, sample)
        for job in (0, 1, 2**64 - 1)
        for row in (0, 1, 2, 10**9)
        for sample in range(4)
    }
    assert len(seeds) == 3 * 4 * 4
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_rows_own_seed_gives_the_same_wherever_the_row_stands() -> None:
    assert len({sample_seed(job, row, 7, 0) for job in range(3) for row in range(3)}) == 1
    assert len({sample_seed(0, 0, seed, n) for seed in (0, 7, 2**64 - 1) for n in range(4)}) == 12
    assert sample_seed(0, 0, 0, 0) != sample_seed(0, 0, None, 0)


def test_seeds_stay_what_they_are_from_version_to_version() -> None:
    # Old outputs are to be made again: change these numbers only with a note to the users.
    assert sample_seed(0, 0, None, 0) == 8376124999220038186
    assert sample_seed(5, 3, None, 1) == 13167257988374884115
    assert sample_seed(0, 0, 42, 0) == 1523174729521592341


EXACT = (
    rb'{"id": 7, "big": 123456789012345678901234567890, "price": 1.10, "tiny": 1e-400, '
    rb'"text": "\u00e9\ud83d\ude00\/ \u0000", "zero": -0.0, "same": [1.0, 1E2], "prompt": "a"}'
)


@pytest.mark.parametrize("end", [b"", b"  ", b"\t \r"])
def test_a_rows_columns_travel_as_they_were_written(end: bytes) -> None:
    line = line_of(EXACT + end)
    assert line.startswith(EXACT[:-1] + b',"completion":"0","reasoning":null,')
    assert json.loads(line)["usage"] == {"prompt_tokens": 5, "completion_tokens": 2}


@pytest.mark.parametrize("name", ["completion", "completions", "reasoning", "usage", "tool_calls"])
def test_a_column_of_a_results_name_gives_way_and_the_others_keep_their_values(name: str) -> None:
    after = b' "a\\"},{\\\\" : [{"b": "]},"}, [1.10]] , "after": 18446744073709551616'
    raw = EXACT[:-1] + b', "%s": {"old": [1, {}], "x": "}"},' % name.encode() + after + b" }"
    line = line_of(raw)
    assert line.startswith(EXACT[:-1] + b"," + after + b',"completion":"0"')
    assert b"old" not in line
    assert line.count(b'"%s":' % name.encode()) == (name not in ("completions", "tool_calls"))
    json.loads(line)


def test_a_row_may_have_no_other_columns_than_those_that_give_way() -> None:
    raw = b'{ "completion": "Once upon" }'
    row = Row(index=0, source="in.jsonl", line=1, raw=raw, columns=orjson.loads(raw))
    prompt = to_prompt(row, PromptOptions(prompt_column="completion"))
    assert isinstance(prompt, Prompt)
    line = result_line(prompt, [sample()], 5, shape="columns", model="m")
    assert list(json.loads(line)) == ["completion", "reasoning", "finish_reason", "usage"]


def test_a_deep_column_does_not_stop_a_job() -> None:
    deep = b'{"prompt": "a", "usage": 1, "deep": ' + b"[" * 1000 + b"]" * 1000 + b"}"
    line = line_of(deep)
    assert line.startswith(deep.replace(b' "usage": 1,', b"")[:-1] + b',"completion"')


def test_a_results_name_in_escapes_gives_way_too() -> None:
    line = line_of(rb'{"prompt": "a", "compl\u0065tion": "old", "finish_reason": "old"}')
    assert b"old" not in line
    assert json.loads(line)["finish_reason"] == "stop"


def test_several_completions_are_a_list() -> None:
    row = json.loads(line_of(b'{"prompt": "a"}', count=2))
    assert list(row) == ["prompt", "completions", "usage"]
    assert row["completions"][1] == {
        "completion": "1",
        "reasoning": None,
        "finish_reason": "stop",
    }
    assert row["usage"]["completion_tokens"] == 4


def test_openai_ids_come_from_the_row_and_nothing_else() -> None:
    raws = [
        b'{"custom_id": "%s", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}'
        % name
        for name in (b"x", b"y", b"x")
    ]
    lines = [
        result_line(prompt_of(raw, index), [sample()], 5, shape="openai", model="m")
        for index, raw in enumerate(raws)
    ]
    assert lines[0] == lines[2]
    ids = {json.loads(line)["id"] for line in lines}
    assert len(ids) == 2


def test_a_failed_row_says_what_and_where() -> None:
    bad = BadRow(index=4, source="in.jsonl", line=9, id="x", code="no_prompt", message="none")
    assert json.loads(error_line(bad)) == {
        "id": "x",
        "source": "in.jsonl",
        "line": 9,
        "error": {"code": "no_prompt", "message": "none"},
    }
    nameless = BadRow(index=4, source="s", line=9, id=None, code="c", message="m")
    assert "id" not in json.loads(error_line(nameless))
