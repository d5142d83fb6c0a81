"""ChatTemplate: messages -> the text that a model was trained to see, by the checkpoint's template.

The template is a program, and runs in the sandbox (sandbox.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .sandbox import Sandbox, SandboxError, Task, sandbox
from .sandbox_worker import Kind


class ChatTemplate:
    """The templates of a checkpoint by name, and the special tokens that they may write."""

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        runs_in: Sandbox | None = None,
    ) -> None:
        self._templates = templates
        self._special_tokens = special_tokens
        self._sandbox = runs_in or sandbox()

    def text(self, *, has_tools: bool) -> str | None:
        """The template of a chat, as transformers chooses it; None if there is none for it."""
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates.get("default")

    def takes_tools(self) -> bool:
        """Whether a chat may offer tools."""
        return "tools" in (self.text(has_tools=True) or "")

    def takes_reasoning(self, *, has_tools: bool) -> bool:
        """Whether an assistant's thought is a field of its message, as Qwen3's template has it."""
        return "reasoning_content" in (self.text(has_tools=has_tools) or "")

    def task(self, messages: list[dict[str, Any]], **variables: Any) -> Task:
        """What `render` takes: a chat, and the other variables that its template sees.

        Raises ValueError if there is no template.
        """
        text = self.text(has_tools=variables.get("tools") is not None)
        if text is None:
            raise ValueError("the model has none")
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        seen = {"tools": None, **self._special_tokens, **variables, "messages": plain}
        return Task(Kind.RENDER, {"template": text, "variables": seen})

    def render(self, tasks: Sequence[Task]) -> list[str | SandboxError]:
        """Return the text of each chat, or why there is none."""
        return self._sandbox.run(tasks)
