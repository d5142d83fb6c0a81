"""RunningRow: a row in the engine, from its requests to its line."""

from collections.abc import Sequence

from nanovllm_cli.core.request import Completion, NewTokens, Request

from .openai_result import joined_lines
from .output_columns import OutputColumns
from .prompts import Prompt
from .row_plan import RowPlan
from .running_prompt import RunningPrompt
from .samples import Sample
from .tokenizer import PromptTokenizer


class RunningRow:
    """The prompts of a row, almost always one; their samples are counted through."""

    __slots__ = ("_num_samples", "_prompts", "plans")

    def __init__(self, plans: Sequence[RowPlan], tokenizer: PromptTokenizer) -> None:
        self.plans = plans
        self._prompts = [RunningPrompt(plan, tokenizer) for plan in plans]
        self._num_samples = len(plans[0].requests)  # of each prompt

    @property
    def prompt(self) -> Prompt:
        """The first, which has all that is the row's."""
        return self.plans[0].prompt

    @property
    def requests(self) -> list[Request]:
        return [request for plan in self.plans for request in plan.requests]

    def has(self, sample: int) -> bool:
        """Whether a sample is finished."""
        position, sample = divmod(sample, self._num_samples)
        return self._prompts[position].has(sample)

    @property
    def is_done(self) -> bool:
        return all(prompt.is_done for prompt in self._prompts)

    def take(self, sample: int, output: NewTokens | Completion) -> Sample | None:
        """The sample where it is finished now, be it by a stop string in new tokens."""
        position, sample = divmod(sample, self._num_samples)
        return self._prompts[position].take(sample, output)

    def line(self, *, format: str, model: str, columns: OutputColumns) -> bytes:
        """The output row, as one line of JSON."""
        lines = [
            prompt.line(format=format, model=model, columns=columns) for prompt in self._prompts
        ]
        return lines[0] if len(lines) == 1 else joined_lines(lines)
