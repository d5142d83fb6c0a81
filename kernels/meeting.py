"""Where the blocks of one kernel on several GPUs wait for each other.

A block counts its meetings, and tells every other rank of each by adding one to a counter in memory
that all of them reach. Nothing is ever taken back: the counters go on from one launch to the next,
in a captured graph as well, and may run over. To add needs no answer from the other GPU, where a
flag that is set and cleared by compare-and-swap, as PyTorch's symmetric memory has it, needs one:
https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/distributed/c10d/symm_mem/CUDASymmetricMemory-inl.h
"""

from nanovllm_cli.kernels.triton_import import tl, triton

# All must run at once, or one may wait for a block of another rank that waits for its processor.
_MAX_BLOCKS = 128
_SIGNAL_BYTES = 4


def max_blocks(num_ranks: int, signal_bytes: int) -> int:
    """Blocks that may meet, with so much memory for their counters."""
    return min(_MAX_BLOCKS, signal_bytes // (_SIGNAL_BYTES * num_ranks))


@triton.jit
def signal_of(signal_ptrs, rank, block, sender, NUM_RANKS: tl.constexpr):
    """Where `sender` tells the given block of the given rank that it has come.

    A rank's own counts its meetings.
    """
    signals = tl.load(signal_ptrs + rank).to(tl.pointer_type(tl.int32))
    return signals + block * NUM_RANKS + sender


@triton.jit
def num_meetings(signal_ptrs, block, RANK: tl.constexpr, NUM_RANKS: tl.constexpr):
    """How often this block has met the others' so far."""
    return tl.load(signal_of(signal_ptrs, RANK, block, RANK, NUM_RANKS))


@triton.jit
def note_meetings(signal_ptrs, block, count, RANK: tl.constexpr, NUM_RANKS: tl.constexpr):
    """Keep it for the next launch."""
    tl.store(signal_of(signal_ptrs, RANK, block, RANK, NUM_RANKS), count)


@triton.jit
def meet(signal_ptrs, block, count, RANK: tl.constexpr, NUM_RANKS: tl.constexpr):
    """Wait for this block of every rank; what each has stored before, each sees after.

    count: of its meetings, this one included.
    """
    tl.debug_barrier()
    for other in tl.static_range(NUM_RANKS):
        if other != RANK:
            theirs = signal_of(signal_ptrs, other, block, RANK, NUM_RANKS)
            tl.atomic_add(theirs, 1, sem="release", scope="sys")
    for other in tl.static_range(NUM_RANKS):
        if other != RANK:
            ours = signal_of(signal_ptrs, RANK, block, other, NUM_RANKS)
            has_come = tl.atomic_add(ours, 0, sem="acquire", scope="sys")
            while has_come - count < 0:
                has_come = tl.atomic_add(ours, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
