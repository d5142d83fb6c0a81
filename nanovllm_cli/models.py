"""Which checkpoint a name means and where it lies: a directory, Hugging Face's cache, the hub."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from nanovllm_cli.core.errors import ModelError, UserError

from .exit_code import CommandError, ExitCode
from .files import in_utf8

SHORT_NAMES = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
# Weights are safetensors only, so nothing else is ever fetched.
_FILES = ["*.safetensors", "*.json", "*.jinja"]


def resolve_model(
    name: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    shows_progress: bool = False,
) -> Path:
    """The directory of a checkpoint: `name` is a directory, `org/name[@revision]` or a short name.

    shows_progress: of a download, with bars, where stderr is a terminal. Raises CommandError
    NOT_FOUND with what was tried.
    """
    directory = Path(os.path.expanduser(name))  # of pathlib, no passwd entry is an error
    if directory.is_dir():
        return in_utf8(directory)
    repository, _, inline_revision = name.partition("@")
    revision = inline_revision or revision
    if repository in SHORT_NAMES:
        repository = f"Qwen/{repository}"
    if repository.count("/") != 1 or repository.startswith(("/", ".", "~")):
        raise CommandError(
            f"no model {name!r}: there is no such directory, and it is no name of a model",
            f"Give a directory, org/name, or one of {', '.join(SHORT_NAMES)}.",
            exit_code=ExitCode.NOT_FOUND,
        )
    # Late: the hub client takes longer to import than all the checks before it.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    offline = offline or constants.HF_HUB_OFFLINE
    if not (shows_progress and sys.stderr.isatty()):
        disable_progress_bars()
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=_FILES, local_files_only=offline
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        tried = f"the directory {directory}, the cache {os.fspath(constants.HF_HUB_CACHE)}"
        if not offline:
            tried += f", the hub ({type(error).__name__})"
        raise CommandError(
            f"no model {name!r}; tried {tried}",
            "Download it first where there is a network, or give its directory with --model.",
            exit_code=ExitCode.NOT_FOUND,
        ) from None
    except ValueError as error:
        raise UserError(f"{name!r} is no name of a model: {error}") from None


def default_sampling(path: Path) -> dict[str, Any]:
    """What the checkpoint's generation_config.json says of sampling; greedy if it does not draw.

    Raises ModelError.
    """
    file = path / "generation_config.json"
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from None
    fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = {name: content[name] for name in fields if content.get(name) is not None}
    if content.get("do_sample") is False:
        sampling["temperature"] = 0.0
    if not sampling.get("top_k", 1):
        del sampling["top_k"]  # 0 is transformers' way to keep every token
    return sampling
