"""RowPlan: what the engine is asked for a row's prompt, the row's settings over the job's."""

import struct
from dataclasses import dataclass
from typing import Any

import xxhash

from nanovllm_cli.core.errors import UserError
from nanovllm_cli.core.request import Request
from nanovllm_cli.core.sampling_params import SamplingParams

from .feeder import TokenizedPrompt
from .options import GenerateOptions
from .prompts import Prompt
from .refusal import Refused
from .tokenizer import PromptTokenizer

_SAMPLES_PER_ROW = 1 << 10  # a request's id is row index * this + sample
_GREEDY_BELOW = 1e-5  # of temperatures, as the engine has it


@dataclass(kw_only=True, slots=True)  # not frozen, which takes thrice the time, for every row
class RowPlan:
    """The requests of a row's prompt, and what is made of their answers."""

    prompt: Prompt
    token_ids: list[int]  # of the prompt, as the engine gets them
    requests: list[Request]  # one a sample
    num_shown: int  # of the samples; the likeliest ones, where they are not all
    stop: tuple[str, ...]
    shows_logprobs: bool


class RowPlanner:
    """Plans rows; `sampling` is what a row does not say itself.

    Raises UserError for what no row can have.
    """

    def __init__(
        self, options: GenerateOptions, sampling: dict[str, Any], tokenizer: PromptTokenizer
    ) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._sampling = sampling
        if options.bad_words:
            self._sampling = {**sampling, "bad_words": tokenizer.bad_words(options.bad_words)}
            try:
                SamplingParams(bad_words=self._sampling["bad_words"])
            except ValueError as error:
                raise UserError(f"--bad-word: {error}") from None

    def plans(self, fed: TokenizedPrompt) -> list[RowPlan]:
        """What each of a row's prompts asks for.

        Raises Refused for settings that do not go together.
        """
        return [self._plan(each) for each in (fed, *fed.others)]

    def _plan(self, fed: TokenizedPrompt) -> RowPlan:
        prompt, token_ids = fed.prompt, fed.token_ids
        options, settings = self._options, prompt.settings
        if options.output_columns and prompt.endpoint is not None:
            message = "--output-columns cannot choose from an OpenAI batch line"
            raise Refused("bad_openai_line", message)
        fields = {**self._sampling, **settings.sampling}
        if fed.first_scored is not None:
            fields["prompt_logprobs_start"] = fed.first_scored
        length = settings.truncate_prompt_tokens or options.truncate_prompt_tokens
        if length is not None:
            token_ids = token_ids[-length:]
        if settings.bad_words is not None:
            fields["bad_words"] = self._tokenizer.bad_words(settings.bad_words)
        if settings.thinking_budget is not None or options.thinking_budget is not None:
            fields |= self._thinking_budget(prompt, token_ids)
        if fields.get("grammar") is not None and prompt.messages is not None:
            fields["grammar_after_token_id"] = self._tokenizer.end_think_of(token_ids)
        shows_logprobs = fields.get("logprobs") is not None
        if settings.echo and shows_logprobs:
            fields.setdefault("prompt_logprobs", fields["logprobs"])
        num_shown = settings.n or options.n
        num_samples = settings.best_of or options.best_of or num_shown
        if num_samples != num_shown and not shows_logprobs:
            fields["logprobs"] = 0
        stop = settings.stop or options.stop
        row_seed = fields.pop("seed", None)
        first = prompt.position * num_samples
        if first + num_samples > _SAMPLES_PER_ROW:
            message = f"the row asks for more than {_SAMPLES_PER_ROW} completions"
            raise Refused("bad_parameters", message)
        requests = []
        for sample in range(first, first + num_samples):
            try:
                seed = sample_seed(options.seed, prompt.index, row_seed, sample)
                sampling = SamplingParams(**fields, seed=seed)
            except ValueError as error:  # the row and the flags are good alone, but not together
                raise Refused("bad_parameters", str(error)) from None
            requests.append(
                Request(
                    request_id=prompt.index * _SAMPLES_PER_ROW + sample,
                    prompt_token_ids=token_ids,
                    sampling=sampling,
                    reports_tokens=bool(stop),
                )
            )
            fields.pop("prompt_logprobs", None)  # are the same for all samples
        if num_samples < num_shown:
            message = f"best_of is {num_samples}; it must be at least n, {num_shown}"
            raise Refused("bad_parameters", message)
        if num_samples > num_shown and sampling.temperature < _GREEDY_BELOW:
            message = f"best_of is {num_samples} at temperature 0, where all samples are the same"
            raise Refused("bad_parameters", message)
        return RowPlan(
            prompt=prompt,
            token_ids=token_ids,
            requests=requests,
            num_shown=num_shown,
            stop=stop,
            shows_logprobs=shows_logprobs,
        )

    def _thinking_budget(self, prompt: Prompt, token_ids: list[int]) -> dict[str, Any]:
        """The fields of a budget; one that is the job's is for the rows that think."""
        end_think = self._tokenizer.end_think_of(token_ids) if prompt.messages is not None else None
        budget = prompt.settings.thinking_budget
        if end_think is None:
            if budget is None:
                return {}
            message = f"thinking_budget is {budget}, but this chat does not think"
            raise Refused("bad_parameters", message)
        if budget is None:
            budget = self._options.thinking_budget
        return {"thinking_budget": budget, "end_think_token_id": end_think}


def row_and_sample(request_id: int) -> tuple[int, int]:
    """The row's index and which of its samples."""
    return divmod(request_id, _SAMPLES_PER_ROW)


def sample_seed(job_seed: int, row_index: int, row_seed: int | None, sample: int) -> int:
    """The seed of one sample: of the row's own seed where it has one, else of its number."""
    if row_seed is not None:
        key = struct.pack("<QQ", row_seed, sample)
    else:
        key = struct.pack("<QQQ", job_seed, row_index, sample)
    return xxhash.xxh3_64_intdigest(key)
