"""Where the blocks of one kernel on several GPUs wait for each other.

A block has a flag for each other rank, in memory that all of them reach. They are set and taken
back by compare-and-swap, and so are zero again at the end: a captured graph may be replayed. The
way is PyTorch's:
https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/distributed/c10d/symm_mem/CUDASymmetricMemory-inl.h
"""

from nanovllm_cli.kernels.triton_import import tl, triton

# All must run at once, or one may wait for a block of another rank that waits for its processor.
_MAX_BLOCKS = 128
_SIGNAL_BYTES = 4


def max_blocks(num_ranks: int, signal_bytes: int) -> int:
    """Blocks that may meet, with so much memory for their flags."""
    return min(_MAX_BLOCKS, signal_bytes // (_SIGNAL_BYTES * num_ranks))


@triton.jit
def signal_of(signal_ptrs, rank, block, sender, NUM_RANKS: tl.constexpr):
    """Where `sender` tells the given block of the given rank that it has come."""
    signals = tl.load(signal_ptrs + rank).to(tl.pointer_type(tl.int32))
    return signals + block * NUM_RANKS + sender


@triton.jit
def meet(signal_ptrs, block, RANK: tl.constexpr, NUM_RANKS: tl.constexpr):
    """Wait for this block of every rank; what each has stored before, each sees after."""
    tl.debug_barrier()
    for other in tl.static_range(NUM_RANKS):
        if other != RANK:
            theirs = signal_of(signal_ptrs, other, block, RANK, NUM_RANKS)
            is_set = tl.atomic_cas(theirs, 0, 1, sem="release", scope="sys")
            while is_set != 0:  # they have yet to take the last one back
                is_set = tl.atomic_cas(theirs, 0, 1, sem="release", scope="sys")
    for other in tl.static_range(NUM_RANKS):
        if other != RANK:
            ours = signal_of(signal_ptrs, RANK, block, other, NUM_RANKS)
            is_set = tl.atomic_cas(ours, 1, 0, sem="acquire", scope="sys")
            while is_set != 1:
                is_set = tl.atomic_cas(ours, 1, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
