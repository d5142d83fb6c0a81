"""RunningPrompt: a row's prompt in the engine, from its requests to its line."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nanovllm_cli.core.request import Completion, Logprobs, NewTokens

from .output_columns import OutputColumns
from .results import result_line
from .row_plan import RowPlan
from .samples import FinishReason, Sample
from .scored_tokens import joined, scored, scored_prompt
from .stop_strings import StopStrings
from .tokenizer import PromptTokenizer
from .tool_calls import split_calls


@dataclass(slots=True)
class _Watched:
    """What an unfinished sample has reported; only of rows with stop strings."""

    strings: StopStrings
    logprobs: list[Logprobs] = field(default_factory=list)


class RunningPrompt:
    """Takes what the engine says of one prompt's samples, until all of them are there."""

    __slots__ = ("_plan", "_prompt_logprobs", "_samples", "_tokenizer", "_watched")

    def __init__(self, plan: RowPlan, tokenizer: PromptTokenizer) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._samples: list[Sample | None] = [None] * len(plan.requests)
        self._watched = [self._new_watched() for _ in plan.requests] if plan.stop else None
        self._prompt_logprobs: Logprobs | None = None

    def has(self, sample: int) -> bool:
        """Whether a sample is finished."""
        return self._samples[sample] is not None

    @property
    def is_done(self) -> bool:
        return None not in self._samples

    def take(self, sample: int, output: NewTokens | Completion) -> Sample | None:
        """The sample where it is finished now, be it by a stop string in new tokens."""
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if isinstance(output, NewTokens):
            finished = self._take_new(sample, output)
        else:
            finished = self._complete(sample, output)
        self._samples[sample] = finished
        return finished

    def line(self, *, format: str, model: str, columns: OutputColumns) -> bytes:
        """The output row as one line of JSON, as if the row had no other prompt."""
        plan = self._plan
        samples = [sample for sample in self._samples if sample is not None]
        if plan.num_shown < len(samples):
            samples.sort(key=lambda sample: -sample.mean_logprob)  # equal ones stay in their order
        prompt_logprobs = None
        if self._prompt_logprobs is not None:
            texts = self._tokenizer.token_texts
            prompt_logprobs = scored_prompt(plan.token_ids, self._prompt_logprobs, texts)
        is_openai = plan.prompt.endpoint is not None or format == "openai"
        return result_line(
            plan.prompt,
            samples[: plan.num_shown],
            len(plan.token_ids),
            shape="openai" if is_openai else "columns",
            model=model,
            num_completion_tokens=sum(sample.num_tokens for sample in samples),
            prompt_logprobs=prompt_logprobs,
            columns=columns,
        )

    def _new_watched(self) -> _Watched:
        return _Watched(StopStrings(self._plan.stop, self._tokenizer.decode))

    def _take_new(self, sample: int, new: NewTokens) -> Sample | None:
        assert self._watched is not None, "only a watched request reports its tokens"
        if new.starts_anew:
            self._watched[sample] = self._new_watched()
        watched = self._watched[sample]
        if new.logprobs is not None:
            watched.logprobs.append(new.logprobs)
        if not watched.strings.add(new.token_ids.tolist()):
            return None
        logprobs = joined(watched.logprobs) if watched.logprobs else None
        return self._finish_at_stop(watched.strings, logprobs)

    def _complete(self, sample: int, completion: Completion) -> Sample:
        token_ids = completion.token_ids.tolist()
        num_stop_tokens = 1 if completion.finish_reason == "stop" else 0
        text_ids = token_ids[: len(token_ids) - num_stop_tokens]
        if self._watched is not None:
            strings = self._watched[sample].strings
            if strings.add(text_ids[len(strings.token_ids) :]):
                return self._finish_at_stop(strings, completion.logprobs)
        return self._finish(
            token_ids, text_ids, completion.finish_reason, completion.logprobs, None
        )

    def _finish_at_stop(self, strings: StopStrings, logprobs: Logprobs | None) -> Sample:
        token_ids = strings.matched_token_ids
        return self._finish(token_ids, token_ids, "stop", logprobs, strings.cut)

    def _finish(
        self,
        token_ids: list[int],
        text_ids: list[int],
        finish_reason: FinishReason,
        logprobs: Logprobs | None,
        cut: Callable[[str], str] | None,
    ) -> Sample:
        """text_ids: those of `token_ids` that are text; `logprobs` may go on beyond them all."""
        plan, settings = self._plan, self._plan.prompt.settings
        text, reasoning = self._text_of(text_ids, cut)
        calls = None
        if settings.tools is not None:
            text, calls = split_calls(text, is_one_only=settings.is_one_call_only)
            if calls and finish_reason == "stop":
                finish_reason = "tool_calls"
        mean, tokens = 0.0, None
        if logprobs is not None:
            mean = float(np.mean(logprobs.values[: len(token_ids)], dtype=np.float64))
            if plan.shows_logprobs:
                tokens = scored(token_ids, logprobs, self._tokenizer.token_texts)
        return Sample(
            text=text,
            reasoning=reasoning,
            finish_reason=finish_reason,
            num_tokens=len(token_ids),
            tool_calls=calls,
            mean_logprob=mean,
            logprobs=tokens,
        )

    def _text_of(
        self, token_ids: list[int], cut: Callable[[str], str] | None
    ) -> tuple[str, str | None]:
        """The text and the reasoning; a completion of OpenAI's is one text, as it stands."""
        plan, tokenizer = self._plan, self._tokenizer
        if plan.prompt.endpoint != "completions":
            return tokenizer.decode_completion(plan.token_ids, token_ids, cut)
        text = tokenizer.decode(token_ids)
        if cut is not None:
            text = cut(text)
        return tokenizer.decode(plan.token_ids) + text if plan.prompt.settings.echo else text, None
