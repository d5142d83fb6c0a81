"""The files that --template-file and --prefix-file name -> their content, checked."""

from pathlib import Path

import orjson

from .exit_code import CommandError, ExitCode
from .files import read_flag_file
from .prompt_content import Messages, from_messages
from .refusal import Refused


def read_template(path: Path) -> str:
    """The template's text, without the newline at its end that editors write."""
    text = _read("--template-file", path)
    return text.removesuffix("\n").removesuffix("\r")


def read_chat_template(path: Path) -> str:
    """Return the text of a Jinja template for chats, as it stands."""
    return _read("--chat-template", path)


def read_prefix(path: Path) -> str | Messages:
    """Of a file whose name ends in .json its messages, of any other its text as it stands."""
    text = _read("--prefix-file", path)
    if path.suffix.lower() != ".json":
        return text
    try:
        messages = from_messages(orjson.loads(text), str(path), system=None).messages or []
    except orjson.JSONDecodeError as error:
        raise CommandError(f"--prefix-file {path} is not JSON: {error}") from None
    except Refused as refused:
        raise CommandError(
            f"--prefix-file: {refused.message}",
            'A .json file is a list like [{"role": "user", "content": "Hi"}, ...].',
        ) from None
    if any(message["role"] == "system" for message in messages):
        raise CommandError(
            f"--prefix-file {path} holds a system message, which must be a chat's first",
            "Give it with --system.",
        )
    return messages


def _read(flag: str, path: Path) -> str:
    """Text that is not empty; raises CommandError."""
    try:
        text = read_flag_file(path).decode()
    except FileNotFoundError:
        raise CommandError(
            f"{flag}: there is no file {path}", exit_code=ExitCode.NOT_FOUND
        ) from None
    except OSError as error:
        raise CommandError(f"{flag}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{flag} {path} is not UTF-8 at byte {error.start}") from None
    if not text:
        raise CommandError(f"{flag} {path} is empty")
    return text
