"""PromptOptions: what the command says of all rows. Imports little, for a quick `--help`."""

from dataclasses import dataclass
from functools import cached_property

from .exit_code import CommandError
from .prompt_content import Messages
from .template import TemplatePart, parse_template


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How rows become prompts; a row's own fields win.

    Raises CommandError for a template or a text that cannot be used.
    """

    chat: bool = False  # a prompt is a user message
    template: str | None = None  # "Translate: {text}": columns are its fields
    system: str | None = None  # for messages that have no system message; makes prompts messages
    prefix: str | Messages | None = None  # before every text, or every chat; the latter as `system`
    chat_template: str | None = None  # Jinja's text, instead of the model's own
    enable_thinking: bool | None = None  # None: what the chat template does by itself
    prompt_column: str = "prompt"
    messages_column: str = "messages"
    id_column: str | None = None  # None: `id`, else `custom_id`, if there is one
    pair_columns: tuple[str, str] | None = None  # context, continuation; rows are then scored

    def __post_init__(self) -> None:
        for flag, text in (("template", self.template), ("system", self.system)):
            try:
                (text or "").encode()
            except UnicodeEncodeError:
                raise CommandError(f"--{flag} is no valid Unicode text") from None
        _ = self.template_parts
        if isinstance(self.prefix, str) and self.makes_chats:
            flag = "--chat" if self.chat else "--system"
            raise CommandError(
                f"--prefix-file is text, and {flag} makes chats of prompts",
                "Give the prefix as messages, in a file that ends in .json.",
            )
        if self.pair_columns is not None and len(set(self.pair_columns)) == 1:
            raise CommandError(
                f"--context-column and --continuation-column are both {self.pair_columns[0]!r}",
                "Name the columns of two texts.",
            )

    @property
    def is_score(self) -> bool:
        """Whether rows are scored as they stand, and not completed."""
        return self.pair_columns is not None

    @property
    def makes_chats(self) -> bool:
        """Whether a prompt is a user message, and not completed as it stands."""
        return self.chat or self.system is not None or isinstance(self.prefix, list)

    @cached_property
    def template_parts(self) -> list[TemplatePart]:
        """The template, as pieces of text and the column behind each."""
        return parse_template(self.template or "")

    @cached_property
    def named_columns(self) -> dict[str, str]:
        """The columns that flags name, and by which flag; data, whatever they are called."""
        flags = {
            "--prompt-column": self.prompt_column,
            "--messages-column": self.messages_column,
            "--id-column": self.id_column,
        }
        if self.pair_columns is not None:
            flags["--context-column"], flags["--continuation-column"] = self.pair_columns
        named = {name: flag for flag, name in flags.items() if name is not None}
        fields = (part.name for part in self.template_parts if part.name is not None)
        return named | dict.fromkeys(fields, "--template")

    @cached_property
    def optional_columns(self) -> set[str]:
        """The columns that no row needs to have: the template says what stands for them."""
        return {part.name for part in self.template_parts if part.name and part.default is not None}
