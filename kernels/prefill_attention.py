def prefill_attention(*a): raise NotImplementedError
