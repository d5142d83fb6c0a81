"""The flags of `generate` for what a token is drawn from, and for what is written of it."""

import json
from typing import Annotated

from nanovllm_cli.core.errors import UserError

from .refusal import shown
from .row_settings import logit_bias_of
from .setting_values import is_logit_bias
from .settings import shared_option

SAMPLING = "Sampling (a row's own fields come first)"

RepetitionPenalty = Annotated[
    float | None,
    shared_option(
        "--repetition-penalty", panel=SAMPLING,
        help="Above 1: repeat less of the prompt and the text. Default: the model's.",
    ),
]  # fmt: skip
PresencePenalty = Annotated[
    float | None,
    shared_option(
        "--presence-penalty", panel=SAMPLING,
        help="Above 0: tokens that the text already has become less likely.",
    ),
]  # fmt: skip
FrequencyPenalty = Annotated[
    float | None,
    shared_option(
        "--frequency-penalty", panel=SAMPLING,
        help="Above 0: the same, for each time that a token is there.",
    ),
]  # fmt: skip
LogitBias = Annotated[
    str | None,
    shared_option(
        "--logit-bias", panel=SAMPLING, metavar="JSON",
        help='Added to tokens\' logits: {"1234": -100}.',
    ),
]  # fmt: skip
BestOf = Annotated[
    int | None,
    shared_option(
        "--best-of", panel=SAMPLING,
        help="Draw this many and keep the n with the highest mean log-probability.",
    ),
]  # fmt: skip
Logprobs = Annotated[
    int | None,
    shared_option(
        "--logprobs", panel=SAMPLING, metavar="K",
        help="Write each token's log-probability and those of the K likeliest; K may be 0.",
    ),
]  # fmt: skip
PromptLogprobs = Annotated[
    int | None,
    shared_option("--prompt-logprobs", panel=SAMPLING, metavar="K", help="The same of prompts."),
]
JsonSchema = Annotated[
    str | None,
    shared_option(
        "--json-schema",
        panel=SAMPLING,
        metavar="FILE",
        help="Completions are JSON that fits this schema.",
    ),
]
Regex = Annotated[
    str | None,
    shared_option(
        "--regex", panel=SAMPLING, metavar="TEXT",
        help="Completions match this regular expression, from their beginning to their end.",
    ),
]  # fmt: skip
Choice = Annotated[
    str | None,
    shared_option(
        "--choice", panel=SAMPLING, metavar="A,B,...", help="Completions are one of these."
    ),
]
Grammar = Annotated[
    str | None,
    shared_option(
        "--grammar", panel=SAMPLING, metavar="FILE",
        help="Completions follow this grammar, in Lark's notation or GBNF.",
    ),
]  # fmt: skip


def parse_logit_bias(text: str) -> tuple[tuple[int, float], ...]:
    """The value of --logit-bias; raises UserError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not is_logit_bias(value):
        raise UserError(f'--logit-bias is {shown(text)}; it must be like {{"1234": -100}}')
    return logit_bias_of(value)
