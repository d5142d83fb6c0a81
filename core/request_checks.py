"""RequestChecks: a Request becomes a Sequence, or the Failure that says why it can never run."""

from collections.abc import Sequence as Seq

import numpy as np

from nanovllm_cli.core.grammar import GrammarError, Grammars
from nanovllm_cli.core.request import Failure, FailureCode, Request, TokenIds
from nanovllm_cli.core.row_needs import tokens_named_by
from nanovllm_cli.core.sampling_params import MAX_STOP_TOKEN_IDS
from nanovllm_cli.core.sequence import Sequence


class RequestChecks:
    """What one model can be asked."""

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        grammars: Grammars,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._grammars = grammars

    def sequence_of(self, request: Request) -> Sequence | Failure:
        """The request as a sequence that will fit, alone if need be."""
        sampling = request.sampling
        length = len(request.prompt_token_ids)

        def failure(code: FailureCode, message: str) -> Failure:
            return Failure(request_id=request.request_id, code=code, message=message)

        eos = () if sampling.ignore_eos else self._eos_token_ids
        matcher = None
        if sampling.grammar is not None:
            try:
                matcher = self._grammars.matcher(sampling.grammar)
            except GrammarError as error:
                return failure("bad_grammar", str(error))
            eos = self._grammars.eos_token_ids  # they end it where it is whole, and only there
        stop_token_ids = tuple(dict.fromkeys((*eos, *sampling.stop_token_ids)))
        if length == 0:
            return failure("bad_token_ids", "the prompt has no tokens")
        if length >= self._max_model_len:
            return failure(
                "prompt_too_long",
                f"the prompt has {length} tokens; at most {self._max_model_len - 1} leave room "
                "for one more",
            )
        limit = f"is outside the vocabulary of {self._vocab_size}"
        if (wrong := self._unknown_token(request.prompt_token_ids)) is not None:
            return failure("bad_token_ids", f"token id {wrong} {limit}")
        if (wrong := self._unknown_token(stop_token_ids)) is not None:
            return failure("bad_parameters", f"stop token id {wrong} {limit}")
        max_length = self._max_model_len
        if sampling.max_tokens is not None:
            max_length = min(max_length, length + sampling.max_tokens)
        sequence = Sequence(request, max_length, stop_token_ids, matcher)
        if (num_stops := len(sequence.stop_token_ids)) > MAX_STOP_TOKEN_IDS:
            return failure(
                "bad_parameters",
                f"{num_stops} stop token ids, eos and the end of a thought included; at most "
                f"{MAX_STOP_TOKEN_IDS}",
            )
        if (wrong := self._unknown_token(tokens_named_by(sampling))) is not None:
            return failure("bad_parameters", f"token id {wrong} of a setting {limit}")
        most = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)
        if most > self._vocab_size:
            return failure(
                "bad_parameters", f"{most} likeliest tokens of a vocabulary of {self._vocab_size}"
            )
        return sequence

    def _unknown_token(self, token_ids: Seq[int] | TokenIds) -> int | None:
        if not len(token_ids):
            return None
        ids = np.asarray(token_ids)
        for extreme in (ids.min(), ids.max()):
            if not 0 <= extreme < self._vocab_size:
                return int(extreme)
        return None
