"""Flags as users of vLLM, transformers and llama.cpp know them: run, said once, or explained.

`translate` makes our own flags of a command line before it is parsed. What no flag of ours means
ends with a sentence, not with the name of some flag that looks alike.
Reference: https://docs.vllm.ai/en/stable/cli/serve/
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from nanovllm_cli.core.errors import UserError

from .setting_texts import gib_of_bytes

# Another name of one of our flags; "" makes an argument of the value.
_ALIASES: dict[str, str] = {
    "--no-enable-prefix-caching": "--no-prefix-caching",
    "--kv-cache-memory-bytes": "--kv-cache-memory",
    "--torch-dtype": "--dtype",
    "--input-file": "",
    "-i": "",
    "--output-file": "--output",
    "--max-new-tokens": "--max-tokens",
    "--num-return-sequences": "--n",
    "--model-name-or-path": "--model",
    "--n-predict": "--max-tokens",
    "--ctx-size": "--max-model-len",
    "-c": "--max-model-len",
    "--temp": "--temperature",
    "--repeat-penalty": "--repetition-penalty",
    "--num-prompts": "--limit",
}
_CONVERSIONS: dict[str, Callable[[str, str], str]] = {"--kv-cache-memory-bytes": gib_of_bytes}

# Left out with a note: what they ask for is always so here. Those of the second kind have a value.
_SWITCHES: dict[str, str] = {
    "--enable-prefix-caching": "prefixes are always cached",
    "--enable-chunked-prefill": "long prompts are always prefilled in chunks",
    "--async-scheduling": "steps are always scheduled ahead",
    "--disable-log-stats": "nothing but the progress is logged",
    "--disable-log-requests": "requests are never logged",
    "--trust-remote-code": "no code of a model is ever run",
    "--enable-auto-tool-choice": "tool calls are always found in chats with tools",
    "--enable-reasoning": "a thought is always in a column of its own",
}
_VALUES: dict[str, str] = {
    "--reasoning-parser": "a thought is always in a column of its own",
    "--tool-call-parser": "tool calls are always read as Qwen3 writes them",
    "--n-gpu-layers": "a model is on the GPU as a whole",
    "--gpu-layers": "a model is on the GPU as a whole",
    "-ngl": "a model is on the GPU as a whole",
}

_LEAVE_OUT = "Leave it out."
_NO_QUANTIZATION = (
    "weights are computed in bfloat16, float16 or float32, and quantized ones are not supported",
    "Leave it out, and give a checkpoint that is not quantized.",
)
_NO_ADAPTERS = (
    "LoRA adapters are not supported",
    "Merge the adapter into its model first (peft: merge_and_unload), and give the result.",
)
_NO_DRAFTS = ("there is no speculative decoding", _LEAVE_OUT)
_NO_OFFLOAD = ("weights and KV cache are never moved between a GPU and the CPU", _LEAVE_OUT)
_NO_SERVER = ("this command is not a server: it reads files and ends", _LEAVE_OUT)
_TEXT_ONLY = ("only text models are supported", _LEAVE_OUT)
_ONE_MACHINE = (
    "engines are processes of this machine",
    "Leave it out, and set how many with --tp and --dp.",
)
_CAPTURED = (
    "decode steps on a GPU are always captured as CUDA graphs",
    "Leave it out, or switch that off with --enforce-eager.",
)
_LLGUIDANCE = ("structured output is always by llguidance", _LEAVE_OUT)
_VISIBLE = ("GPUs are chosen by the environment", "Set CUDA_VISIBLE_DEVICES, and leave it out.")
_SAFETENSORS = (
    "weights are read from safetensors files only",
    "Leave it out. `nanovllm bench` makes random weights if there is no checkpoint.",
)
_REASONS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("--quantization", "--load-in-8bit", "--load-in-4bit"), _NO_QUANTIZATION),
    "--kv-cache-dtype": ("the KV cache has the number format of --dtype", _LEAVE_OUT),
    **dict.fromkeys(
        ("--enable-lora", "--lora-modules", "--max-loras", "--max-lora-rank", "--lora"),
        _NO_ADAPTERS,
    ),
    **dict.fromkeys(
        ("--speculative-config", "--speculative-model", "--num-speculative-tokens", "--draft-max"),
        _NO_DRAFTS,
    ),
    **dict.fromkeys(("--cpu-offload-gb", "--swap-space", "--device-map"), _NO_OFFLOAD),
    "--enable-expert-parallel": ("only dense models are supported, without experts", _LEAVE_OUT),
    **dict.fromkeys(
        ("--pipeline-parallel-size", "-pp", "--nnodes", "--node-rank", "--master-addr"),
        _ONE_MACHINE,
    ),
    **dict.fromkeys(("--distributed-executor-backend", "--data-parallel-backend"), _ONE_MACHINE),
    **dict.fromkeys(("--compilation-config", "-O", "--max-seq-len-to-capture"), _CAPTURED),
    **dict.fromkeys(("--guided-decoding-backend", "--structured-outputs-config"), _LLGUIDANCE),
    "--load-format": _SAFETENSORS,
    "--download-dir": ("where models are kept is set by the environment", "Set HF_HUB_CACHE."),
    "--hf-token": ("the hub's token is read from the environment", "Set HF_TOKEN."),
    "--tokenizer-revision": (
        "a tokenizer's revision is part of its name",
        "Write --tokenizer org/name@revision.",
    ),
    "--tokenizer-mode": ("there is one kind of tokenizer", _LEAVE_OUT),
    "--hf-overrides": ("a model's config.json is taken as it is", "Change the file itself."),
    "--rope-scaling": ("a model's config.json says how its context is stretched", _LEAVE_OUT),
    "--override-generation-config": (
        "each sampling parameter has a flag of its own",
        "Use --temperature, --top-p, --max-tokens and so on.",
    ),
    **dict.fromkeys(("--host", "--port", "--api-key"), _NO_SERVER),
    **dict.fromkeys(("--limit-mm-per-prompt", "--mmproj", "--image"), _TEXT_ONLY),
    **dict.fromkeys(("--tensor-split", "--main-gpu"), _VISIBLE),
    "--batch-size": ("batches form by themselves", "--max-num-seqs limits them."),
    "--num-beams": ("there is no beam search", "--n and --best-of draw several completions."),
    "--do-sample": ("a temperature above 0 draws tokens", "Use --temperature."),
    "--prompt": (
        "prompts are rows of a file",
        'Write {"prompt": "..."} lines to a file, or to standard input with - as INPUT.',
    ),
    "-f": ("the input is an argument without a flag", "Write its name alone."),
    "-n": ("it means a length to some tools and a number to others", "Use --max-tokens or --n."),
    "--threads": ("every usable core is used", "Limit them from outside: taskset -c 0-3 ..."),
    "-t": ("every usable core is used", "Limit them from outside: taskset -c 0-3 ..."),
}


def translate(arguments: Sequence[str], options: Mapping[str, bool], notes: list[str]) -> list[str]:
    """Return a command line of our own flags; to `notes` come sentences on what was left out.

    options: our flags, and whether each is followed by a value. Raises UserError for a flag that
    nothing here can mean.
    """
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*result, argument, *rest]
        name, equals, value = argument.partition("=")
        name = _known_name(name, options)
        if name in options:
            result.append(f"{name}{equals}{value}")
            if options[name] and not equals:
                result += _next(rest)
            continue
        if name in _SWITCHES or name in _VALUES:
            _note(f"{name} is left out: {(_SWITCHES | _VALUES)[name]}", notes)
            if name in _VALUES and not equals:
                _next(rest)
            continue
        target = _ALIASES.get(name)
        if target is not None and (target in options or target == ""):
            values = [value] if equals else []
            if options.get(target, True) and not equals:
                values = _next(rest)
            convert = _CONVERSIONS.get(name)
            values = [convert(name, text) if convert else text for text in values]
            result += [*([target] if target else []), *values]
            continue
        if name in _REASONS:
            why, hint = _REASONS[name]
            raise UserError(f"{name} is not a flag of nanovllm: {why}", hint)
        long_name = f"-{name}"
        if len(name) > 2 and name[0] == "-" and name[1] != "-" and long_name in options:
            raise UserError(f"{name} has one dash", f"Write {long_name}.")
        result.append(argument)
    return result


def _known_name(name: str, options: Mapping[str, bool]) -> str:
    """The flag with dashes where it was written with underscores, as vLLM allows."""
    if not name.startswith("--") or "_" not in name:
        return name
    dashed = name.replace("_", "-")
    known = (options, _ALIASES, _SWITCHES, _VALUES, _REASONS)
    return dashed if any(dashed in names for names in known) else name


def _next(rest: Iterator[str]) -> list[str]:
    """The next argument; nothing at the end, which the parser is to complain of."""
    return list(islice(rest, 1))


def _note(text: str, notes: list[str]) -> None:
    if text not in notes:
        notes.append(text)
