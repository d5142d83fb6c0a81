"""Our Qwen3 against transformers' on the same device: teacher-forced, prefilled and decoded.

The weights are random and made on the device; both models hold the same ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanovllm_cli.core.batch import Admission, BlockTableUpdate, DecodeBatch, PrefillBatch
from nanovllm_cli.core.config import EngineConfig, ModelConfig
from nanovllm_cli.core.engine import Engine, build_model
from nanovllm_cli.core.loader import load_random_weights, targets_of
from nanovllm_cli.core.qwen3 import Qwen3

from .gpu_tests import QWEN3_0_6B, HiddenStates, answers, ask, model_config

PROMPTS_AT_ONCE = 16  # bounds the logits in memory


@dataclass(frozen=True, kw_only=True)
class Case:
    """The largest differences of two log-probabilities: of the prompts' own tokens, and of any.

    bf16 rounds logits of 2 to 4 in steps of 1/64: the largest of five billion differences is no
    measure of a mistake as the largest of the prompts' own tokens is.
    """

    device: Any
    dtype: Any
    sizes: ModelConfig
    num_prompts: int
    length: int
    limit: float
    limit_of_any: float
    std: float = 0.02


CASES = [
    pytest.param(
        Case(
            device="cpu",
            dtype="float32",
            sizes=model_config(tie_word_embeddings=True),
            num_prompts=6,
            length=40,
            limit=1e-4,
            limit_of_any=1e-4,
            std=0.1,
        ),
        id="tiny-cpu",
    ),
    *(
        pytest.param(
            Case(
                device="cuda",
                dtype=dtype,
                sizes=model_config(**QWEN3_0_6B),
                num_prompts=256,
                length=128,
                limit=limit,
                limit_of_any=limit_of_any,
            ),
            id=f"0.6B-{dtype}",
            marks=pytest.mark.gpu,
        )
        for dtype, limit, limit_of_any in (("bfloat16", 5e-2, 0.15), ("float32", 1e-3, 1e-3))
    ),
]


class Models:
    """Our model, transformers' with the same weights, and the prompts' tokens."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = EngineConfig(
            device=case.device,
            dtype=case.dtype,
            block_size=16 if case.device == "cpu" else 64,
            max_model_len=case.length + 16,
            max_num_seqs=case.num_prompts,
            max_num_batched_tokens=8192,
            max_window_steps=1,
            enable_prefix_caching=False,
            num_threads=1,
        )
        self.ours = build_model(case.sizes, self.config)
        load_random_weights(self.ours)
        for parameter in self.ours.parameters():
            if parameter.dim() > 1:  # no norm
                parameter.mul_(case.std / 0.02)
        self.theirs = twin(self.ours, case)
        generator = torch.Generator().manual_seed(3)
        shape = (case.num_prompts, case.length)
        self.prompts = torch.randint(0, case.sizes.vocab_size, shape, generator=generator)

    def compare(self, hidden: Tensor, columns: slice) -> None:
        """hidden: ours at `columns` of every prompt, [num_prompts, num_columns, hidden_size]."""
        own, largest, total, count = [], 0.0, 0.0, 0
        for first in range(0, len(hidden), PROMPTS_AT_ONCE):
            part = slice(first, first + PROMPTS_AT_ONCE)
            prompts = self.prompts[part].to(self.case.device)
            theirs = self.theirs(prompts).logits[:, columns].float().log_softmax(dim=-1)
            ours = self.ours.logits(hidden[part].flatten(0, 1)).float().log_softmax(dim=-1)
            assert theirs.std() > 0.3, "logits this flat would hide a mistake"
            difference = (ours.view_as(theirs) - theirs).abs_()
            assert not difference.isnan().any()
            next_tokens = prompts[:, columns][:, 1:, None]
            own.append(difference[:, :-1].gather(2, next_tokens).flatten())
            largest = max(largest, difference.max().item())
            total += difference.sum(dtype=torch.float64).item()
            count += difference.numel()
        largest_own = torch.cat(own).max().item()
        print(
            f"\nlog-probabilities differ by {total / count:.2e} on average and {largest:.2e} at "
            f"most; those of the prompts' tokens by {largest_own:.2e} at most"
        )
        assert largest_own <= self.case.limit
        assert largest <= self.case.limit_of_any


def twin(ours: Qwen3, case: Case) -> Qwen3ForCausalLM:
    """transformers' model with our weights."""
    sizes = case.sizes
    config = Qwen3Config(
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        vocab_size=sizes.vocab_size,
        rms_norm_eps=sizes.rms_norm_eps,
        max_position_embeddings=sizes.max_position_embeddings,
        tie_word_embeddings=sizes.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope.theta},
        attn_implementation="sdpa",
    )
    # By the default dtype: .to(dtype) would round the rotary frequencies as well.
    torch.set_default_dtype(getattr(torch, case.dtype))
    try:
        with torch.device(case.device):
            model = Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    weights = {name: target.tensor for name, target in targets_of(ours).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, "the tied one"
    return model


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest) -> Models:
    return Models(request.param)


@torch.inference_mode()
def test_prefilled_tokens_have_the_log_probabilities_of_transformers(models: Models) -> None:
    engine = Engine(models.ours, models.config)
    packed: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: Tensor) -> None:
        packed.append(output.clone())

    with models.ours.register_forward_hook(keep):
        requests = [
            ask(i, prompt, max_tokens=1) for i, prompt in enumerate(models.prompts.tolist())
        ]
        answers(engine, requests)
    hidden = torch.cat(packed)
    models.compare(hidden.view(*models.prompts.shape, -1), slice(None))


@torch.inference_mode()
def test_decoded_tokens_have_the_log_probabilities_of_transformers(models: Models) -> None:
    num_prompts, length = models.prompts.shape
    last = HiddenStates(models.ours)
    engine = Engine(models.ours, models.config)
    runner: Any = engine._runner
    captured = dict(last.by_rows)
    runner.launch(one_token_each(models)).result()
    last.by_rows.update(captured)  # the prefill has as many rows as a step, and is none
    states = []
    for position in range(1, length):
        forced = models.prompts[:, position].to(runner._table.last_token)
        runner._table.last_token[:num_prompts] = forced
        nothing = np.zeros(0, dtype=np.int32)
        batch = DecodeBatch(
            block_table_update=BlockTableUpdate(slots=nothing, indices=nothing, block_ids=nothing),
            slots=np.arange(num_prompts, dtype=np.int32),
            num_steps=1,
        )
        result = runner.launch(batch).result()
        assert result.num_tokens.tolist() == [1] * num_prompts
        states.append(last.by_rows[num_prompts].clone())
    models.compare(torch.stack(states, dim=1), slice(1, None))


def one_token_each(models: Models) -> PrefillBatch:
    """A prefill of every prompt's first token, each sequence with all its blocks."""
    num_prompts, length = models.prompts.shape
    per_sequence = -(-length // models.config.block_size)
    slots = np.arange(num_prompts, dtype=np.int32)
    admissions = tuple(
        Admission(
            slot=slot,
            seed=slot,
            temperature=0.0,
            top_k=models.case.sizes.vocab_size,
            top_p=1.0,
            min_p=0.0,
            min_length=0,
            max_length=length + 9,
            stop_token_ids=(),
        )
        for slot in range(num_prompts)
    )
    return PrefillBatch(
        admissions=admissions,
        block_table_update=BlockTableUpdate(
            slots=np.repeat(slots, per_sequence),
            indices=np.tile(np.arange(per_sequence, dtype=np.int32), num_prompts),
            block_ids=np.arange(1, 1 + num_prompts * per_sequence, dtype=np.int32),
        ),
        slots=slots,
        token_ids=models.prompts[:, 0].numpy().astype(np.int32),
        start_positions=np.zeros(num_prompts, dtype=np.int32),
        query_lens=np.ones(num_prompts, dtype=np.int32),
        is_last_chunk=np.ones(num_prompts, dtype=np.bool_),
    )
