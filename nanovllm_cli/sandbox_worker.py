"""The process that runs what a checkpoint or a row brings along: chat templates, and grammars.

`python -m nanovllm_cli.sandbox_worker SOCKET_FD SECONDS BYTES`, started by sandbox.py. A template
is somebody else's program, and a grammar can take for ever to compile. Here each task has a limit
of processor time (at which the kernel ends this process, whatever it is doing), of memory, and of
what it may return; nothing of the job is in this process but the task at hand.

Templates are rendered as transformers 5 does it, which
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/utils/chat_template_utils.py
shows: jinja2's immutable sandbox, loop controls, `{% generation %}`, and a few functions.
"""

import ctypes
import json
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from enum import IntEnum
from functools import lru_cache
from typing import Any, NoReturn

from nanovllm_cli.core.channel import Channel

MAX_REPLY_BYTES = 64 << 20
_MAX_ERROR_CHARS = 1000  # an error may quote all of a row
_IDLE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class Kind(IntEnum):
    """What a message is; the first two come from the job, the others answer them."""

    RENDER = 0  # JSON: the template, and the variables that it sees
    GRAMMAR = 1  # JSON: the kind, and the text
    TEXT = 2  # what came out
    REFUSED = 3  # why nothing did
    LIMIT = 4  # which limit it ran into
    READY = 5  # the first message: the process has started


class OverLimit(Exception):
    """The reply is larger than it may be."""


def main() -> NoReturn:
    """Answer tasks in their order until the other end of the socket is closed."""
    socket_fd, seconds, num_bytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    channel = Channel(socket.socket(fileno=socket_fd))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, this process goes first
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)  # nothing that runs here writes a file
    _limit(resource.RLIMIT_AS, num_bytes)
    handlers: dict[int, Callable[[dict[str, Any]], str]] = {
        Kind.RENDER: _render,
        Kind.GRAMMAR: _compile_grammar,
    }
    channel.send(Kind.READY, b"")
    while not channel.is_closed:
        channel.wait(_IDLE_SECONDS)
        for kind, payload in channel.receive():
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer, text = _answer(handlers[kind], payload)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            channel.send(answer, text)
            channel.flush()
    sys.exit()


def _limit(name: int, value: int) -> None:
    """Lower a limit; one that is lower already stays."""
    soft, hard = resource.getrlimit(name)
    limits = [limit for limit in (value, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(name, (min(limits), hard))


def _answer(handle: Callable[[dict[str, Any]], str], payload: bytes) -> tuple[Kind, bytes]:
    try:
        text = handle(json.loads(payload)).encode("utf-8", "surrogatepass")
        if len(text) > MAX_REPLY_BYTES:
            raise OverLimit
        return Kind.TEXT, text
    except MemoryError:
        return Kind.LIMIT, b"needs too much memory"
    except OverLimit:
        return Kind.LIMIT, b"makes more than %d MiB of text" % (MAX_REPLY_BYTES >> 20)
    except RecursionError:
        return Kind.REFUSED, b"it is nested too deeply"
    except Exception as error:  # whatever a template raises is its row's error
        reason = (str(error) or type(error).__name__)[:_MAX_ERROR_CHARS]
        return Kind.REFUSED, reason.encode("utf-8", "surrogatepass")


def _render(task: dict[str, Any]) -> str:
    variables = task["variables"]
    messages = [_with_reasoning_names(message) for message in variables.pop("messages")]
    return _template(task["template"]).render(messages=messages, documents=None, **variables)


def _with_reasoning_names(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each name that templates read it by."""
    found = (message[name] for name in _REASONING_FIELDS if message.get(name) is not None)
    reasoning = next(found, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


@lru_cache(maxsize=8)
def _template(text: str) -> Any:
    # Late: a job without chats needs none of it.
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what an assistant said, which only training asks for."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class PlainNamespace(Namespace):
        """No name with an underscore before it: those are Python's own."""

        def __init__(self, /, *args: Any, **values: Any) -> None:
            fields = dict(*args, **values)
            for name in fields:
                PlainNamespace._check(name)
            Namespace.__init__(self, fields)

        def __setitem__(self, name: str, value: Any) -> None:
            PlainNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}")

    class PlainDict:
        """`dict(...)`, without the attributes of the type."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        dict=PlainDict(),
        namespace=PlainNamespace,
    )
    return environment.from_string(text)


def _compile_grammar(task: dict[str, str]) -> str:
    """The text of a grammar as llguidance has it, once it has compiled."""
    # Late: it may be missing.
    from llguidance import LLMatcher, LLParserLimits, grammar_from

    if task["kind"] == "json":
        # As json.dumps lays it out: where any whitespace may come, some models go on with nothing
        # else, and little of the text is forced. A schema's own "x-guidance" says otherwise.
        # `true` allows everything, which an object says with room for the defaults.
        grammar: str = LLMatcher.grammar_from_json_schema(
            "{}" if task["text"].strip() == "true" else task["text"],
            defaults={
                "whitespace_flexible": False,
                "item_separator": ", ",
                "key_separator": ": ",
            },
        )
    else:
        grammar = grammar_from(task["kind"], task["text"])  # type: ignore[arg-type]
    limits = LLParserLimits(verbose_errors=False)
    is_bad, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
    if is_bad:
        raise ValueError(messages[0].removesuffix("<non-verbose/>").strip())
    return grammar


if __name__ == "__main__":
    main()
