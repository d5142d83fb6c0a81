"""GpuRunner: one GPU's weights, KV cache, slot table and captured decode steps: Batch -> token ids.

Launches are enqueued on one stream and read later. A prefill runs eagerly; a decode window replays
the captured step of its bucket once a step, with nothing from the host in between. Where a row asks
for more than a draw, each step replays a graph of the model alone, captured when it is first
needed, and what token_choice.py does follows eagerly; nothing waits there either. A step that takes
several tokens of some rows is such a graph as well (gpu_forced.py).
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanovllm_cli.core.attention_backend import load_attention_backend
from nanovllm_cli.core.batch import (
    Admission,
    Batch,
    DecodeBatch,
    ForcedTokens,
    ForwardBatch,
    Int32,
    PrefillBatch,
    RowNeeds,
    SampleBatch,
)
from nanovllm_cli.core.cuda_graphs import CudaGraphs, graph_batch_sizes
from nanovllm_cli.core.gpu_attention import DecodeAttention
from nanovllm_cli.core.gpu_errors import gpu_errors
from nanovllm_cli.core.gpu_forced import ForcedSteps
from nanovllm_cli.core.gpu_launch import GpuLaunch
from nanovllm_cli.core.gpu_prefill import GpuPrefill
from nanovllm_cli.core.kernel_warm_up import layer_kernels, run_side_by_side
from nanovllm_cli.core.kv_cache import KVCache, allocate_kv_caches, copy_blocks
from nanovllm_cli.core.kv_sizes import blocks_per_sequence, num_kv_blocks
from nanovllm_cli.core.memory_profile import free_bytes
from nanovllm_cli.core.qwen3 import Qwen3
from nanovllm_cli.core.resolved_config import ResolvedConfig
from nanovllm_cli.core.slot_table import SlotTable
from nanovllm_cli.core.staging import Staging
from nanovllm_cli.core.token_choice import DeviceNeeds, TokenChoice, prompt_logprobs
from nanovllm_cli.kernels.decode_attention import DecodePlan, plan_decode_attention
from nanovllm_cli.kernels.decode_step import OUT_ROWS_BEFORE_TOKENS, advance, prepare
from nanovllm_cli.kernels.fused_sampling import sample

LARGEST_FORCED_GRAPH = 2048  # tokens; from there on the GPU takes longer than the launches


class GpuRunner:
    """Runs launches one after the other, in the order they come."""

    @gpu_errors(is_start=True)
    def __init__(self, model: Qwen3, config: ResolvedConfig) -> None:
        assert config.attention_backend is not None, "resolved for a CPU"
        sizes = model.part
        max_num_seqs = config.max_num_seqs
        self._device = device = model.embed_tokens.weight.device
        self._model = model
        self._block_size = config.block_size
        self._attention_backend = load_attention_backend(config.attention_backend)
        self._staging = Staging(device, num_arenas=config.max_launches_in_flight + 2)
        self._table = SlotTable(max_num_seqs, blocks_per_sequence(config), device, self._staging)
        self._choice = TokenChoice(self._table, model.config.vocab_size, model.parallel)
        self._forced_steps = ForcedSteps(self._table, max_num_seqs, config.block_size, model)
        self._is_choice_compiled = False
        self._plan = DecodePlan.allocate(
            max_num_seqs=max_num_seqs,
            num_heads=sizes.num_attention_heads,
            num_kv_heads=sizes.num_key_value_heads,
            head_dim=sizes.head_dim,
            block_size=config.block_size,
            device=device,
        )

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._slots = zeros(max_num_seqs).fill_(self._table.idle_slot)
        self._token_ids = zeros(max_num_seqs)
        self._positions = zeros(max_num_seqs)
        self._slot_mapping = zeros(max_num_seqs, dtype=torch.int64)
        self._context_lens = zeros(max_num_seqs + 1)  # by slot
        self._step = zeros(1)
        self._out = zeros(OUT_ROWS_BEFORE_TOKENS + config.max_window_steps, max_num_seqs)
        self._batch_sizes = graph_batch_sizes(max_num_seqs)
        self._graphs: CudaGraphs | None = None
        self._half_step: Tensor | None = None  # a ForwardBatch's logits
        self._kv_caches: list[KVCache] = []
        with torch.inference_mode():
            self._kv_caches = allocate_kv_caches(2, sizes, config)
            self._compile_kernels()
            kv_cache_bytes = config.kv_cache_bytes
            if kv_cache_bytes is None:
                kv_cache_bytes = free_bytes(self._launch, self._table, model, config)
            self._kv_caches = []  # gives its memory back before the real one takes it
            kv_cache_bytes = model.parallel.minimum(kv_cache_bytes)
            self.num_blocks = num_kv_blocks(kv_cache_bytes, sizes, config)
            self._kv_caches = allocate_kv_caches(self.num_blocks, sizes, config)
            if not config.enforce_eager:
                self._graphs = CudaGraphs(self._batch_sizes, self._decode_step, device)

    @gpu_errors()
    @torch.inference_mode()
    def launch(self, batch: Batch) -> GpuLaunch | None:
        """Enqueue one launch; raises GpuFailed."""
        return self._launch(batch)

    def _launch(self, batch: Batch) -> GpuLaunch | None:
        if not isinstance(batch, SampleBatch):  # it goes on with its ForwardBatch's
            self._staging.next_launch()
            self._table.extend_block_tables(batch.block_table_update)
            self._step.zero_()
        if isinstance(batch, ForwardBatch):
            size = self._take_slots(batch.slots)
            if batch.forced is None:
                self._half_step = self._forward(size)
            else:
                self._half_step = self._forced_forward(size, batch.slots, batch.forced)
            return None
        self._out[:OUT_ROWS_BEFORE_TOKENS].zero_()
        num_steps, needs, asked = 1, self._needs(batch.needs), None
        num_rows = len(batch.slots)
        if isinstance(batch, DecodeBatch):
            num_steps = batch.num_steps
            packed = self._decode(batch, needs)
        elif isinstance(batch, SampleBatch):
            assert self._half_step is not None, "no ForwardBatch before"
            logits, self._half_step = self._half_step, None
            packed = [self._sample(logits, self._slots[: len(logits)], needs)]
        else:
            num_rows = len(batch.row_slots)
            hidden, packed = self._prefill(batch, needs)
            if batch.prompt_targets is not None:
                asked = prompt_logprobs(
                    hidden, batch.prompt_targets, self._table, self._model.logits
                )
        logprobs = [step for step in packed if step is not None]
        return GpuLaunch.begin(
            self._staging,
            self._out[: OUT_ROWS_BEFORE_TOKENS + num_steps, :num_rows],
            batch.needs,
            torch.stack(logprobs) if logprobs else None,
            asked,
        )

    def _admit(self, admissions: tuple[Admission, ...]) -> None:
        self._table.admit(admissions)
        self._choice.admit(admissions)

    def _needs(self, needs: RowNeeds | None) -> DeviceNeeds | None:
        if needs is None:
            return None
        if not self._is_choice_compiled:  # one after the other they take as long as a hang
            dtype = self._model.embed_tokens.weight.dtype
            run_side_by_side(self._choice.kernels(dtype, self._draw), self._device)
            self._is_choice_compiled = True
        return DeviceNeeds.of(needs, self._table)

    def _take_slots(self, batch_slots: Int32) -> int:
        """Put the slots of a decode step where it finds them; the batch size that it takes.

        Eager steps are filled up as captured ones are: a product's last bits depend on its size.
        """
        size = next(size for size in self._batch_sizes if size >= len(batch_slots))
        slots = np.full(size, self._table.idle_slot, dtype=np.int32)
        slots[: len(batch_slots)] = batch_slots
        self._slots[:size] = self._table.to_device(slots)
        return size

    def _decode(self, batch: DecodeBatch, needs: DeviceNeeds | None) -> list[Tensor | None]:
        """Every step's packed log-probabilities."""
        size = self._take_slots(batch.slots)
        packed: list[Tensor | None] = []
        for _ in range(batch.num_steps):
            if needs is not None:
                packed.append(self._sample(self._forward(size), self._slots[:size], needs))
            elif self._graphs is not None:
                self._graphs.replay(size)
            else:
                self._decode_step(size)
        return packed

    def _decode_step(self, size: int) -> None:
        """One step of the first `size` entries of the slot list; this is what is captured."""
        self._sample(self._model.logits(self._hidden(size)), self._slots[:size])

    def _hidden(self, size: int) -> Tensor:
        attention = self._prepare(size)
        return self._model(self._token_ids[:size], self._kv_caches, attention)

    def _forward(self, size: int) -> Tensor:
        """The logits of a step of the first `size` entries of the slot list."""
        hidden_of = partial(self._hidden, size)
        if self._graphs is None:
            return self._model.logits(hidden_of())
        return self._model.logits(self._graphs.output_of(("step", size), hidden_of))

    def _forced_forward(self, size: int, slots: Int32, forced: ForcedTokens) -> Tensor:
        """The logits of these slots, which are the first of `size` entries of the slot list."""
        num_tokens = self._forced_steps.put(slots, forced)
        hidden_of = partial(self._forced_steps.hidden, num_tokens, self._model, self._kv_caches)
        if self._graphs is None or num_tokens > LARGEST_FORCED_GRAPH:
            hidden = hidden_of()
        else:
            hidden = self._graphs.output_of(("forced", num_tokens), hidden_of)
        self._step.fill_(1)  # what `prepare` does in a decode step
        return self._model.logits(hidden[:size])

    def _prepare(self, size: int) -> DecodeAttention:
        slots, table = self._slots[:size], self._table
        positions, slot_mapping = self._positions[:size], self._slot_mapping[:size]
        prepare(
            slots,
            table,
            token_ids=self._token_ids[:size],
            positions=positions,
            slot_mapping=slot_mapping,
            context_lens=self._context_lens,
            step=self._step,
            block_size=self._block_size,
        )
        plan_decode_attention(self._plan, self._context_lens, slots, table.block_table)
        return DecodeAttention(
            positions=positions,
            slot_mapping=slot_mapping,
            block_tables=table.block_table,
            plan=self._plan,
        )

    def _prefill(
        self, batch: PrefillBatch, needs: DeviceNeeds | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The hidden states of all its tokens, and its packed log-probabilities."""
        self._admit(batch.admissions)
        prefill = GpuPrefill.of(batch, self._table, self._block_size, self._attention_backend)
        hidden = self._model(prefill.token_ids, self._kv_caches, prefill.attention)
        if prefill.block_copies:
            copy_blocks(self._kv_caches, *(blocks.long() for blocks in prefill.block_copies))
        self._table.length[prefill.row_slots.long()] = prefill.row_lengths
        self._step.fill_(1)  # what `prepare` does in a decode step
        # Every row samples; one whose chunk is not the last does so on the idle slot.
        logits = self._model.logits(hidden[prefill.last_tokens.long()])
        return hidden, [self._sample(logits, prefill.sampling_slots, needs)]

    def _sample(
        self, logits: Tensor, slots: Tensor, needs: DeviceNeeds | None = None
    ) -> Tensor | None:
        """Draw the next tokens and move the slots on; the packed log-probabilities asked for."""
        if needs is None:
            sampled, is_nan = self._draw(logits, slots)
            packed = None
        else:
            sampled, is_nan, packed = self._choice.choose(logits, slots, needs, self._draw)
        out, step = self._out, self._step
        advance(slots, sampled, is_nan.view(torch.int8), self._table, out=out, step=step)
        return packed

    def _draw(self, logits: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table
        return sample(
            logits,
            slots,
            length=table.length,
            min_length=table.min_length,
            stop_token_ids=table.stop_token_ids,
            seed=table.seed,
            temperature=table.temperature,
            top_k=table.top_k,
            top_p=table.top_p,
            min_p=table.min_p,
        )

    def _compile_kernels(self) -> None:
        """Run every kernel once, on the idle slot."""
        dtype = self._model.embed_tokens.weight.dtype
        vocab_size = self._model.config.vocab_size
        logits = torch.zeros(1, vocab_size, dtype=dtype, device=self._device)
        run_side_by_side(
            [
                lambda: self._sample(logits, self._slots[:1]),
                lambda: self._prepare(1),
                lambda: self._prepare(len(self._slots)),
                *layer_kernels(
                    self._model,
                    self._kv_caches[0],
                    self._table.block_table,
                    self._plan,
                    self._attention_backend,
                ),
            ],
            self._device,
        )
        torch.cuda.synchronize(self._device)
