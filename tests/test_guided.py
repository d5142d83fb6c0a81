"""Rows with a grammar, in the real engine with the sample model: what comes out of them."""

import json
import os
import signal
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nanovllm_cli.core import guided
from nanovllm_cli.core.config import EngineConfig
from nanovllm_cli.core.engine import Engine
from nanovllm_cli.core.engine_process import EngineProcess
from nanovllm_cli.core.request import Completion, Failure, NewTokens, Output, Request
from nanovllm_cli.core.sampling_params import SamplingParams
from nanovllm_cli.structured_output import grammar_text

from .cli import SAMPLE, call, generate, read_rows, run, write_rows
from .schemas import EOS, MODEL, check_json, grammar_of_schema, random_schema

TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
QUESTION = TOKENIZER.encode("Q: 3+4=\nA:").ids
IM_START, END_THINK = 1001, 1025
CHAT = [IM_START, *TOKENIZER.encode("user\nWhat is 3+4?").ids, 1002, *TOKENIZER.encode("\n").ids,
        IM_START, *TOKENIZER.encode("assistant\n").ids]  # fmt: skip
Ended = dict[int, Completion | Failure]


def engine(**config: Any) -> Engine:
    return Engine.from_checkpoint(MODEL, EngineConfig(**{"device": "cpu", **config}))


def ask(request_id: int, prompt: Seq[int] = QUESTION, **sampling: Any) -> Request:
    defaults = {"temperature": 1.0, "seed": request_id, "max_tokens": 60}
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{**defaults, **sampling}),
    )


def wants_json(request_id: int, num_schemas: int, **sampling: Any) -> Request:
    schema = random_schema(request_id % num_schemas)
    return ask(request_id, grammar=grammar_of_schema(schema), **sampling)


def run_all(engine: Engine, requests: Seq[Request]) -> tuple[Ended, dict[int, list[int]]]:
    """How each ended, and the tokens that it reported before."""
    outputs: list[Output] = [f for r in requests if (f := engine.add(r)) is not None]
    while engine.has_work:
        outputs += engine.step()
    reported: dict[int, list[int]] = {}
    for output in outputs:
        if isinstance(output, NewTokens):
            reported.setdefault(output.request_id, []).extend(output.token_ids.tolist())
    ended = {o.request_id: o for o in outputs if not isinstance(o, NewTokens)}
    assert len(ended) == len(requests)
    return ended, reported


def completed(engine: Engine, requests: Seq[Request]) -> dict[int, Completion]:
    ended, _ = run_all(engine, requests)
    completions = {i: o for i, o in ended.items() if isinstance(o, Completion)}
    assert len(completions) == len(ended), [o for o in ended.values() if isinstance(o, Failure)]
    return completions


def tokens(engine: Engine, requests: Seq[Request]) -> dict[int, tuple[list[int], str]]:
    """And how they ended."""
    ended = completed(engine, requests)
    return {i: (ended[i].token_ids.tolist(), ended[i].finish_reason) for i in sorted(ended)}


def text_of(completion: Completion) -> str:
    token_ids = completion.token_ids.tolist()
    if completion.finish_reason == "stop":
        assert token_ids.pop() in EOS
    return TOKENIZER.decode(token_ids, skip_special_tokens=False)


def check_rows(num_rows: int, num_schemas: int, **config: Any) -> None:
    """Rows drawn at temperature 1, by a model that knows nothing of JSON."""
    requests = [wants_json(i, num_schemas, max_tokens=80) for i in range(num_rows)]
    running = engine(**{"max_num_seqs": 256, **config})
    ended = completed(running, requests)
    stopped = {i: c for i, c in ended.items() if c.finish_reason == "stop"}
    assert len(stopped) > 0.6 * num_rows
    for request_id, completion in stopped.items():
        check_json(text_of(completion), random_schema(request_id % num_schemas))
    assert all(len(c.token_ids) == 80 for i, c in ended.items() if i not in stopped)
    assert running.stats.num_forced_tokens > num_rows


def test_1000_rows_of_50_schemas_validate_where_they_stop() -> None:
    check_rows(1000, 50)


@pytest.mark.long
def test_10000_rows_of_500_schemas_validate_where_they_stop() -> None:
    check_rows(10_000, 500)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"enforce_eager": True}, {"max_num_seqs": 600}])
def test_rows_on_a_gpu_validate_where_they_stop(config: dict[str, Any]) -> None:
    check_rows(800, 40, device="cuda", **config)


# --- who runs beside whom, and how


MIXED = [
    *[ask(i, QUESTION[: 3 + i % 9]) for i in range(0, 12)],
    *[wants_json(i, 7, max_tokens=30 + i % 20) for i in range(12, 36)],
    *[
        wants_json(i, 7, prompt=CHAT, grammar_after_token_id=END_THINK, temperature=0.3)
        for i in range(36, 42)
    ],
]


@pytest.fixture(scope="module")
def alone() -> dict[int, tuple[list[int], str]]:
    """Each of MIXED by itself."""
    ended: dict[int, tuple[list[int], str]] = {}
    running = engine(max_num_seqs=4)
    for request in MIXED:
        ended |= tokens(running, [request])
    return ended


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_num_seqs": 5},
        {"max_window_steps": 8},
        {"max_window_steps": 8, "max_launches_in_flight": 1},
        {"max_window_steps": 3, "max_launches_in_flight": 2, "max_num_seqs": 9},
        {"max_num_batched_tokens": 7},
        {"enable_prefix_caching": False},
        {"block_size": 16, "kv_cache_bytes": 1 << 20, "max_model_len": 128},
        {
            **{"block_size": 16, "kv_cache_bytes": 1 << 20, "max_model_len": 128},
            **{"max_window_steps": 8, "max_launches_in_flight": 1},
        },
    ],
)
def test_rows_answer_in_any_company_as_they_do_alone(
    alone: dict[int, tuple[list[int], str]], config: dict[str, Any]
) -> None:
    """Free rows bitwise, too: they differ in nothing from what they are without the others."""
    running = engine(**config)
    assert tokens(running, MIXED) == alone
    if "kv_cache_bytes" in config:
        assert running.stats.num_preemptions > 0


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"block_size": 16, "kv_cache_bytes": 3 << 18}])
def test_mixed_rows_on_a_gpu_end_as_they_must(config: dict[str, Any]) -> None:
    """A product's last bits depend on the batch there, so their tokens may differ from alone."""
    running = engine(device="cuda", max_model_len=128, **config)
    ended = completed(running, MIXED)
    for request in MIXED[12:]:
        completion = ended[request.request_id]
        if completion.finish_reason == "stop":
            text = text_of(completion).rpartition("</think>")[2]
            check_json(text, random_schema(request.request_id % 7))
    assert sum(c.finish_reason == "stop" for c in ended.values()) > 10
    if config:
        assert running.stats.num_preemptions > 0


def test_forced_tokens_are_those_that_steps_give(
    alone: dict[int, tuple[list[int], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guided, "LEAST_FORCED_PER_ROW", 0)
    running = engine()
    assert tokens(running, MIXED) == alone
    assert running.stats.num_forced_tokens > 100
    monkeypatch.setattr(guided, "forced_token_ids", lambda sequence: [])
    stepping = engine()
    assert tokens(stepping, MIXED) == alone
    assert stepping.stats.num_forced_tokens == 0


def test_half_of_the_rows_may_be_aborted(alone: dict[int, tuple[list[int], str]]) -> None:
    running = engine(max_launches_in_flight=1, max_window_steps=4, max_num_seqs=16)
    for request in MIXED:
        assert running.add(request) is None
    ended: dict[int, tuple[list[int], str]] = {}
    for step in range(10**6):
        if not running.has_work:
            break
        for output in running.step():
            assert isinstance(output, Completion)
            ended[output.request_id] = output.token_ids.tolist(), output.finish_reason
        if step % 3 == 0 and step // 3 < len(MIXED) and (step // 3) % 2:
            running.abort(step // 3)
    assert len(ended) >= len(MIXED) // 2
    assert ended == {request_id: alone[request_id] for request_id in ended}


# --- what a grammar makes of a row


def test_a_choice_is_one_of_its_texts_and_the_likeliest_of_them() -> None:
    grammar = grammar_text("choice", [" 6", " 7", " 8"])
    completion = completed(engine(), [ask(0, grammar=grammar, temperature=0.0)])[0]
    assert text_of(completion) == " 7"
    assert completion.finish_reason == "stop"


def test_what_nothing_may_follow_ends_without_a_step_and_with_eos() -> None:
    running = engine()
    grammar = grammar_text("choice", ["Sunday the twelfth, half past nine"])
    completion = completed(running, [ask(0, grammar=grammar)])[0]
    assert text_of(completion) == "Sunday the twelfth, half past nine"
    assert completion.token_ids[-1] == EOS[0]
    stats = running.stats
    assert stats.num_forced_tokens > 4
    assert stats.num_decode_steps + stats.num_prefill_launches < len(completion.token_ids)


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_max_tokens_hold_for_forced_tokens_as_well(max_tokens: int) -> None:
    text = "one way to say it and no other"
    grammar = grammar_text("choice", [text])
    completion = completed(engine(), [ask(0, grammar=grammar, max_tokens=max_tokens)])[0]
    whole = completed(engine(), [ask(0, grammar=grammar)])[0]
    is_cut = max_tokens < len(whole.token_ids)
    assert completion.finish_reason == ("length" if is_cut else "stop")
    assert completion.token_ids.tolist() == whole.token_ids.tolist()[:max_tokens]


def test_a_prompt_near_max_model_len_leaves_what_room_there_is() -> None:
    running = engine(max_model_len=24)
    grammar = grammar_text("choice", ["one way to say it and no other"])
    for length in range(18, 24):
        prompt = (QUESTION * 3)[:length]
        completion = completed(running, [ask(0, prompt, grammar=grammar, max_tokens=None)])[0]
        assert length + len(completion.token_ids) <= 24


def test_a_row_without_a_way_on_fails_and_says_after_how_many_tokens() -> None:
    failing = [
        ask(0, grammar=grammar_text("grammar", "start: A\nA: /a/ & /b/")),
        ask(1, grammar=grammar_text("grammar", 'start: "a" "b" "c" <|im_end|> "d"')),
        ask(2, grammar=grammar_text("regex", "7+")),
    ]
    ended, _ = run_all(engine(), failing)
    for request_id, words in ((0, "after the completion's first 0"), (1, "first 2")):
        failure = ended[request_id]
        assert isinstance(failure, Failure)
        assert failure.code == "grammar_dead_end"
        assert words in failure.message
    assert isinstance(ended[2], Completion)


def test_a_grammar_that_does_not_compile_is_refused_at_once() -> None:
    running = engine()
    failure = running.add(ask(0, grammar='{"grammars":[{"lark_grammar":"start: /(/"}]}'))
    assert failure is not None
    assert (failure.code, "unclosed group" in failure.message) == ("bad_grammar", True)
    assert not running.has_work


def test_a_model_without_a_tokenizer_refuses_grammars(make_checkpoint: Any) -> None:
    running = Engine.from_checkpoint(make_checkpoint(), EngineConfig(device="cpu"))
    failure = running.add(ask(0, [1, 2], grammar=grammar_text("regex", "a")))
    assert failure is not None
    assert failure.code == "bad_grammar"
    other = EngineConfig(device="cpu", tokenizer_path=str(MODEL))
    running = Engine.from_checkpoint(make_checkpoint(vocab_size=1088), other)
    completion = completed(running, [ask(0, [1, 2], grammar=grammar_text("regex", "abc"))])[0]
    assert TOKENIZER.decode(completion.token_ids.tolist()) == "abc"


def test_eos_is_the_grammars_to_allow_whatever_ignore_eos_and_min_tokens_say() -> None:
    grammar = grammar_text("regex", "[0-9]{3,30}")
    ended = completed(
        engine(),
        [
            ask(0, grammar=grammar, ignore_eos=True),
            ask(1, grammar=grammar, min_tokens=12),
            ask(2, grammar=grammar),
        ],
    )
    for completion in ended.values():
        assert completion.finish_reason == "stop"
        assert 3 <= len(text_of(completion)) <= 30
    assert len(ended[1].token_ids) > 12


def test_a_rows_own_stop_token_stops_it_inside_its_grammar() -> None:
    comma = TOKENIZER.encode(",").ids[0]
    grammar = grammar_text("choice", ["one, two, three and four"])
    completion = completed(engine(), [ask(0, grammar=grammar, stop_token_ids=(comma,))])[0]
    assert completion.finish_reason == "stop"
    assert TOKENIZER.decode(completion.token_ids.tolist()) == "one,"


def test_the_end_of_a_thought_counts_as_a_stop_token() -> None:
    grammar = grammar_text("regex", "a")
    stops = tuple(range(10, 24))
    running = engine()
    failure = running.add(
        ask(0, grammar=grammar, grammar_after_token_id=END_THINK, stop_token_ids=stops)
    )
    assert failure is not None
    assert (failure.code, "17 stop token ids" in failure.message) == ("bad_parameters", True)
    assert running.add(ask(0, grammar=grammar, stop_token_ids=stops)) is None
    assert running.add(ask(1, grammar_after_token_id=END_THINK, stop_token_ids=stops)) is None


def test_reported_tokens_are_those_of_the_completion_forced_ones_included() -> None:
    requests = [replace(request, reports_tokens=True) for request in MIXED]
    ended, reported = run_all(engine(max_window_steps=4, max_launches_in_flight=1), requests)
    assert reported.keys() > set(range(12, 36))
    for request_id, token_ids in reported.items():
        completion = ended[request_id]
        assert isinstance(completion, Completion)
        assert completion.token_ids.tolist()[: len(token_ids)] == token_ids


def test_a_row_that_asks_for_log_probabilities_gets_one_for_every_token() -> None:
    with_logprobs = [wants_json(i, 5, logprobs=2) for i in range(5)]
    plain = [wants_json(i, 5) for i in range(5)]
    ended = completed(engine(), with_logprobs)
    for request_id, completion in completed(engine(), plain).items():
        asked = ended[request_id]
        assert asked.logprobs is not None
        assert len(asked.logprobs.values) == len(asked.token_ids)
        assert (asked.logprobs.values <= 0).all()
        # The end that a plain row gets without a step is drawn here: any of the model's eos.
        number = len(completion.token_ids) - (completion.finish_reason == "stop")
        assert asked.token_ids[:number].tolist() == completion.token_ids[:number].tolist()


def test_penalties_count_forced_tokens_as_well() -> None:
    grammar = grammar_text("grammar", 'start: "one two three four five " /[a-z ]{10}/')
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.7}
    requests = [ask(i, grammar=grammar, **penalties) for i in range(4)]
    at_once = tokens(engine(), requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guided, "forced_token_ids", lambda sequence: [])
        assert tokens(engine(), requests) == at_once


# --- where the model thinks first


def test_a_grammar_begins_after_the_thought_and_not_before() -> None:
    schema = {**random_schema(3), "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    grammar = grammar_of_schema(schema)
    free = completed(engine(), [ask(0, CHAT, temperature=0.0)])[0].token_ids.tolist()
    request = ask(
        0, CHAT, temperature=0.0, grammar=grammar, grammar_after_token_id=END_THINK, max_tokens=120
    )
    for config in ({}, {"max_window_steps": 16, "max_launches_in_flight": 1}):
        completion = completed(engine(**config), [request])[0]
        token_ids = completion.token_ids.tolist()
        end = token_ids.index(END_THINK)
        assert token_ids[: end + 1] == free[: end + 1], "the thought is what it is without"
        assert completion.finish_reason == "stop"
        check_json(TOKENIZER.decode(token_ids[end + 1 : -1]), schema)


def test_a_thought_that_ends_with_the_text_is_closed_and_answered() -> None:
    """A raw prompt's completion ends with eos, and holds no end of a thought."""
    grammar = grammar_text("choice", [" yes", " no"])
    request = ask(0, grammar=grammar, grammar_after_token_id=END_THINK, temperature=0.0)
    for config in ({}, {"max_window_steps": 16, "max_launches_in_flight": 1}):
        completion = completed(engine(**config), [request])[0]
        token_ids = completion.token_ids.tolist()
        end = token_ids.index(END_THINK)
        assert TOKENIZER.decode(token_ids[:end]) == " 7"
        assert TOKENIZER.decode(token_ids[end + 1 : -1]) in (" yes", " no")
        assert completion.finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", range(1, 16))
def test_a_thought_that_is_cut_ends_by_length_at_any_token(max_tokens: int) -> None:
    grammar = grammar_text("choice", [" yes, it is indeed"])
    request = ask(
        *(0, CHAT), grammar=grammar, grammar_after_token_id=END_THINK, temperature=0.0,
        max_tokens=max_tokens,
    )  # fmt: skip
    whole = completed(
        engine(), [replace(request, sampling=replace(request.sampling, max_tokens=99))]
    )
    running = engine(max_window_steps=16, max_launches_in_flight=1)
    token_ids = completed(running, [request])[0].token_ids.tolist()
    assert token_ids == whole[0].token_ids.tolist()[:max_tokens]


def test_a_thinking_budget_ends_the_thought_and_the_grammar_begins() -> None:
    schema = random_schema(5)
    request = ask(
        *(0, CHAT), temperature=0.0, grammar=grammar_of_schema(schema), max_tokens=200,
        grammar_after_token_id=END_THINK, thinking_budget=3, end_think_token_id=END_THINK,
    )  # fmt: skip
    completion = completed(engine(), [request])[0]
    token_ids = completion.token_ids.tolist()
    assert token_ids.index(END_THINK) == 3
    if completion.finish_reason == "stop":
        check_json(TOKENIZER.decode(token_ids[4:-1]), schema)


# --- the whole way


def test_an_engines_process_makes_the_same_of_them_and_again_after_its_death(
    alone: dict[int, tuple[list[int], str]],
) -> None:
    process = EngineProcess(MODEL, EngineConfig(device="cpu"))
    was_killed = False
    try:
        for request in MIXED:
            assert process.add(request) is None
        ended: dict[int, tuple[list[int], str]] = {}
        while process.has_work:
            for output in process.step():
                assert isinstance(output, Completion), output
                ended[output.request_id] = output.token_ids.tolist(), output.finish_reason
            if len(ended) > 5 and not was_killed:
                was_killed = True
                os.kill(process.pid, signal.SIGKILL)
        assert process.num_restarts == 1
        assert ended == alone
        assert process.stats.num_forced_tokens > 0
    finally:
        process.close()


def test_the_command_makes_json_of_chats_that_think_and_of_prompts(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["sum", "word", "other"]}, "sure": {"type": "boolean"}},
        "required": ["kind", "sure"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    rows = read_rows(SAMPLE / "prompts.jsonl")[:48]
    rows.append({"prompt": "Q: 3+4=\nA:", "guided_choice": [" 6", " 7"], "id": "own"})
    rows.append({"prompt": "Q: 3+4=\nA:", "response_format": {"type": "text"}, "id": "text"})
    rows.append({"prompt": "Q: 3+4=\nA:", "guided_regex": "(", "id": "bad"})
    source = write_rows(tmp_path / "in.jsonl", rows)
    flags = ["--json-schema", tmp_path / "schema.json", "--max-tokens", "150"]
    ended = generate(source, *flags, "-o", tmp_path / "out.jsonl", "-q")
    assert ended.code == 3
    written = read_rows(tmp_path / "out.jsonl")
    *json_rows, own, text = written
    assert (own["completion"], text["completion"]) == (" 7", " 7")
    assert sum(row.get("reasoning") is not None for row in json_rows) > 5
    for row in json_rows:
        assert row["finish_reason"] == "stop"
        check_json(row["completion"], schema)
    [failed] = read_rows(tmp_path / "out.jsonl.errors.jsonl")
    assert (failed["id"], failed["error"]["code"]) == ("bad", "bad_grammar")
    assert failed["line"] == len(rows)


def test_a_grammar_is_for_the_tokens_of_the_tokenizer_that_is_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in MODEL.iterdir():
        if not path.name.startswith("tokenizer"):
            (model / path.name).symlink_to(path)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Q: 3+4=\nA:"}])
    ended = call(
        *("generate", source, "--model", model, "--tokenizer", MODEL, "-q", "--choice", " 6, 7"),
    )
    assert (ended.code, [row["completion"] for row in ended.rows]) == (0, [" 7"]), ended.stderr


def test_a_flags_grammar_of_unknown_tokens_ends_the_command(tmp_path: Path) -> None:
    """Only the model's tokenizer knows which there are."""
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    (tmp_path / "g.lark").write_text("start: <|nobody_knows_it|>")
    ended = generate(source, "--grammar", tmp_path / "g.lark")
    assert ended.code == 2
    assert "nobody_knows_it" in ended.stderr
    rows = [{"prompt": "x", "guided_grammar": "start: <|nobody_knows_it|>"}, {"prompt": "x"}]
    ended = generate(write_rows(source, rows), "--max-tokens", "2")
    assert ended.code == 3
    assert "bad_grammar" in ended.stderr


def test_ranks_and_replicas_write_the_bytes_of_one_engine(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q: 3+4=\nA:", "guided_json": random_schema(i % 5), "temperature": 1.0}
        for i in range(16)
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    outputs = []
    for flags in ((), ("--dp", "2"), ("--tp", "2")):
        outputs.append(tmp_path / f"{'-'.join(flags)}.jsonl")
        arguments = ["generate", source, "--model", MODEL, "--max-tokens", "60", "-q"]
        assert run(*arguments, "-o", outputs[-1], *flags).code == 0
    assert len({output.read_bytes() for output in outputs}) == 1
    assert {row["finish_reason"] for row in read_rows(outputs[0])} == {"stop", "length"}
