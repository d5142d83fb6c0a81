"""Which checkpoint a name means and where it lies: a directory, Hugging Face's cache, the hub."""

import difflib
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from nanovllm_cli.core.config import ModelConfig
from nanovllm_cli.core.errors import ModelError, UserError
from nanovllm_cli.core.model_files import Fields, read_json, unreadable
from nanovllm_cli.core.sampling_params import SamplingParams

from .exit_code import CommandError, ExitCode
from .files import as_text

SHORT_NAMES = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
# Weights are safetensors only, so nothing else is ever fetched.
_SMALL_FILES = ["*.json", "*.jinja"]
_FILES = ["*.safetensors", *_SMALL_FILES]
_SAFETENSORS_ONLY = "and nanovllm reads safetensors only"
_NOT_GGUF = (
    "Give the model that it was made from: a directory with config.json, tokenizer.json and "
    "*.safetensors, or a name on the hub, such as Qwen/Qwen3-0.6B."
)
_LARGEST_SAMPLING_VALUE = 1e9  # SamplingParams has the limits of each


def resolve_model(
    name: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    shows_progress: bool = False,
) -> Path:
    """The directory of a checkpoint: `name` is a directory, `org/name[@revision]` or a short name.

    Of a model on the hub config.json and the like are fetched first, and its weights only where
    nanovllm can run it. shows_progress: of a download, with bars, where stderr is a terminal.
    Raises CommandError NOT_FOUND with what was tried, and ModelError.
    """
    directory = _local_directory(name)
    if directory is not None:
        _refuse_other_kinds(directory)
        return directory
    hub = _Hub(name, revision, offline=offline, shows_progress=shows_progress)
    if hub.offline:
        return hub.snapshot(_FILES)
    small = hub.snapshot(_SMALL_FILES)
    _refuse_other_kinds(small)
    if not os.path.lexists(small / "config.json"):
        raise ModelError(f"{shown_name(name)} has no config.json on the hub", _NOT_GGUF)
    ModelConfig.from_directory(small)
    default_sampling(small)
    return hub.snapshot(_FILES, commit=small.name)  # what was checked is what is fetched


def resolve_tokenizer(name: str, *, offline: bool = False) -> Path:
    """The directory of a tokenizer, named as models are; no weights are fetched for it."""
    directory = _local_directory(name)
    if directory is not None:
        return directory
    return _Hub(name, None, offline=offline, shows_progress=False).snapshot(_SMALL_FILES)


def tokenizer_path(name: str | None, model: Path, *, offline: bool) -> Path:
    """Return the directory of the tokenizer `name`; None: of the model in the directory `model`."""
    return model if name is None else resolve_tokenizer(name, offline=offline)


def default_sampling(path: Path) -> dict[str, Any]:
    """What the checkpoint's generation_config.json says of sampling; greedy if it does not draw.

    Raises ModelError.
    """
    file = path / "generation_config.json"
    if not os.path.lexists(file):
        return {}
    content = Fields(str(file), read_json(file))
    sampling: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if content.has(name):
            value = content.values[name]
            if type(value) not in (int, float) or not abs(value) <= _LARGEST_SAMPLING_VALUE:
                raise content.refused(name, "a number")
            sampling[name] = value  # 1 stays 1: the fingerprint has it as a text
    # 0 is transformers' way to keep every token, -1 vLLM's.
    if content.has("top_k") and content.integer("top_k", -1, 1 << 31) > 0:
        sampling["top_k"] = content.values["top_k"]
    if content.has("do_sample") and not content.flag("do_sample"):
        sampling["temperature"] = 0.0
    try:
        SamplingParams(**sampling)
    except ValueError as error:
        raise ModelError(f"{file}: {error}", "Mend the file, or remove that line.") from None
    return sampling


def _local_directory(name: str) -> Path | None:
    """The directory that `name` is; None where it can only be a name on the hub."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~ without HOME, or of an unknown user
        raise _not_found(
            f"no model {shown_name(name)}: the home directory that ~ means is not known",
            "Write the directory out.",
        ) from None
    try:
        if path.is_dir():
            os.listdir(path)  # the first of many looks: what cannot be read is said now
            return path
        is_there = path.exists()
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError:  # a NUL
        is_there = False
    if path.suffix == ".gguf":
        raise _not_found(f"{shown_name(name)} is a GGUF file, {_SAFETENSORS_ONLY}", _NOT_GGUF)
    if is_there:
        raise _not_found(
            f"{shown_name(name)} is a file, and a model is a directory",
            f"Give its directory: --model {shlex.quote(shown_path(path.parent))}",
        )
    return None


def _refuse_other_kinds(path: Path) -> None:
    """Raise ModelError for a directory of adapters or of GGUF files.

    Of an adapter beside whole weights it is unclear which is meant: transformers would apply it,
    and a night's answers without it would be another model's.
    """
    has_config = os.path.lexists(path / "config.json")
    if os.path.lexists(path / "adapter_config.json"):
        if has_config:
            raise ModelError(
                f"{shown_path(path)} has an adapter_config.json beside its weights, and nanovllm "
                "does not apply adapters (LoRA)",
                "If the weights are merged already, move adapter_config.json away. Else merge them "
                "first, with peft's merge_and_unload().",
            )
        raise ModelError(
            f"{shown_path(path)} is an adapter (LoRA), and nanovllm does not apply adapters",
            'Merge it first: python -c "from peft import AutoPeftModelForCausalLM as M; '
            f"M.from_pretrained('{shown_path(path)}').merge_and_unload()"
            ".save_pretrained('merged')\", and copy the tokenizer's files to it.",
        )
    if not has_config and any(path.glob("*.gguf")):
        raise ModelError(f"{shown_path(path)} holds GGUF files, {_SAFETENSORS_ONLY}", _NOT_GGUF)


class _Hub:
    """One repository of Hugging Face's hub, and of its cache here."""

    def __init__(
        self, name: str, revision: str | None, *, offline: bool, shows_progress: bool
    ) -> None:
        self._name = name
        repository, _, inline_revision = name.partition("@")
        self.revision = inline_revision or revision
        if repository in SHORT_NAMES:
            repository = f"Qwen/{repository}"
        self._repository = repository
        is_name = repository.count("/") == 1 and not repository.startswith(("/", ".", "~"))
        is_name &= repository.isascii() and f"{repository}{self.revision or ''}".isprintable()
        if not is_name:
            raise _not_found(
                f"no model {shown_name(name)}: there is no such directory, and it is not the name "
                "of a model",
                self._hint(f"Give a directory, org/name, or one of {', '.join(SHORT_NAMES)}."),
            )
        # Late: the hub client takes longer to import than all the checks before it.
        from huggingface_hub import constants
        from huggingface_hub.utils.tqdm import disable_progress_bars

        self.offline = offline or constants.HF_HUB_OFFLINE
        try:
            self._cache = os.fspath(Path(constants.HF_HUB_CACHE).expanduser())
        except RuntimeError:
            raise _not_found(
                f"no model {shown_name(name)}: there is no such directory, and no home directory, "
                "where the cache of the hub would be",
                "HF_HOME names another place for the cache; or give the model's directory.",
            ) from None
        if not (shows_progress and sys.stderr.isatty()):
            disable_progress_bars()

    def snapshot(self, patterns: list[str], *, commit: str | None = None) -> Path:
        """The directory with the files of these patterns, fetched where they are not here yet."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        page = f"https://huggingface.co/{self._repository}"
        message = f"no model {shown_name(self._name)}"
        try:
            return Path(
                snapshot_download(
                    self._repository,
                    revision=commit or self.revision,
                    allow_patterns=patterns,
                    local_files_only=self.offline,
                )
            )
        except GatedRepoError:
            raise _not_found(
                f"{message}: its owner gives it only to those who accept a licence",
                f"Accept it at {page}, and set HF_TOKEN to a token from "
                "https://huggingface.co/settings/tokens.",
            ) from None
        except RevisionNotFoundError:
            raise _not_found(
                f"{message}: the hub has the model, and no revision {self.revision!r} of it",
                f"{page}/tree/main shows its branches and tags.",
            ) from None
        except RepositoryNotFoundError:
            raise _not_found(
                f"{message}: the hub has no such model, or does not show it to you",
                self._hint(
                    "Check the spelling. For a private model set HF_TOKEN to a token of an account "
                    "that may read it."
                ),
            ) from None
        except (LocalEntryNotFoundError, ConnectionError) as error:
            raise self._not_here(_reason(error)) from None
        except OSError as error:
            if error.errno is not None:  # the disk's, and not the network's
                raise CommandError(
                    f"cannot download {self._repository} to {self._cache}: {error}",
                    "HF_HOME names another place for the cache.",
                    exit_code=ExitCode.IO_ERROR,
                ) from None
            raise self._not_here(_reason(error)) from None
        except ValueError as error:
            raise UserError(f"{self._name!r} is not the name of a model: {error}") from None
        except Exception as error:
            if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
                raise
            raise self._not_here(_reason(error)) from None

    def _not_here(self, reason: str) -> CommandError:
        tried = f"the directory {as_text(self._name)}, the cache {self._cache}"
        if not self.offline:
            tried += f", the hub ({reason})"
        command = f"hf download {self._repository}"
        if self.revision:
            command += f" --revision {self.revision}"
        return _not_found(
            f"no model {shown_name(self._name)}; tried {tried}",
            self._hint(
                f"Where there is a network, run: {command}. Or give its directory with --model."
            ),
        )

    def _hint(self, hint: str) -> str:
        """The name that was probably meant, if one is near; else `hint`."""
        name = self._repository.rpartition("/")[2]
        if name not in SHORT_NAMES and self._repository in (name, f"Qwen/{name}"):
            near = difflib.get_close_matches(name, SHORT_NAMES, n=1, cutoff=0.75)
            if near:
                return f"Did you mean Qwen/{near[0]}?"
        return hint


def shown_name(name: str) -> str:
    """A model's name in quotes; characters and bytes that do not print are escaped."""
    return repr(name)


def shown_path(path: Path) -> str:
    """A path as text, whatever its bytes are."""
    return as_text(os.fspath(path))


def _reason(error: BaseException) -> str:
    """What went wrong between here and the hub, without an exception's name."""
    cause = error.__cause__ or error.__context__ or error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    return f"it answers {status}" if status is not None else "it cannot be reached"


def _not_found(message: str, hint: str) -> CommandError:
    return CommandError(message, hint, exit_code=ExitCode.NOT_FOUND)
