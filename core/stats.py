"""EngineStats: what the engine has done since its start."""

from dataclasses import dataclass, fields, replace


@dataclass(slots=True)
class EngineStats:
    """Counts and seconds. A prompt counts once, however often it is prefilled."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompts, found in the prefix cache
    num_completion_tokens: int = 0
    num_forced_tokens: int = 0  # of those, where a grammar left no choice and no step was needed
    num_prefill_launches: int = 0
    num_decode_steps: int = 0
    num_decode_slots: int = 0  # summed over the steps: the mean batch times the steps
    num_preemptions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def copy(self) -> "EngineStats":
        """As it is now."""
        return replace(self)

    def since(self, earlier: "EngineStats") -> "EngineStats":
        """What has come since `earlier`."""
        return EngineStats(
            **{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        )
