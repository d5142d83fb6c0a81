"""Make sample_data/: a tiny trained Qwen3 model, and the prompt files that go with it.

    python sample_data/make_sample_data.py                  # everything: minutes on a GPU
    python sample_data/make_sample_data.py --prompts-only   # tokenizer, config and prompt files
    python sample_data/make_sample_data.py --resume         # train the weights that are there on
    python sample_data/make_sample_data.py --check          # accuracy of the shipped model

All text is made here (tasks.py); nothing is downloaded. The questions of the shipped prompt files
are drawn first, with a seed of their own, and are kept out of the training text whatever their
wording. Only the fixed facts (capitals, opposites, ...) are the same in both.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tasks import (
    RULES,
    SYSTEM_PROMPTS,
    TASKS,
    Item,
    Message,
    Row,
    chat_row,
    draw,
    raw_row,
    training_row,
    words,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
TEMPLATE = (HERE / "qwen3_chat_template.jinja").read_text(encoding="utf-8").removesuffix("\n")
SHIPPED_SEED, DEV_SEED, TRAINING_SEED, TOKENIZER_SEED = 11, 12, 13, 14

# Qwen's pre-tokenizer: contractions, words with their space, single digits, punctuation, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3's 26 added tokens in Qwen3's order; of these the second group is not `special`.
SPECIAL = words(
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
)
NOT_SPECIAL = words(
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
)
MAX_NEW_TOKENS = 112  # the longest completion has fewer
BPE_SIZE = 1000  # the added tokens come after it
VOCAB_SIZE = 1088  # the embedding is padded to a multiple of 64, as Qwen's is padded
Part = tuple[np.ndarray, np.ndarray]  # rows of one padded length: token ids, where loss counts
BUCKETS = (48, 64, 96, 128, 192, 512, 576, 640, 704)  # lengths to which training rows are padded


# --- tokenizer and configuration


def make_tokenizer(folder: Path) -> Any:
    """Train the byte-level BPE, write its two files as Qwen3's are, and load them again."""
    rng = random.Random(TOKENIZER_SEED)
    texts = [RULES, *SYSTEM_PROMPTS] * 20
    for _ in range(20_000):
        item = draw(rng)
        if item.task != "copy_unicode":
            texts += [f"Q: {item.raw}\nA: {item.answer}\n\n", f"user\n{item.chat}\nassistant\n"]
            texts += [f"\n{item.thought}\n\n\n", item.answer]
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    split = pre.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre.Sequence(
        [split, pre.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)]
    )
    tokenizer.post_processor = ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    trainer = BpeTrainer(
        vocab_size=BPE_SIZE, initial_alphabet=sorted(pre.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != BPE_SIZE:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {BPE_SIZE}")
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
        + [AddedToken(text, special=False, normalized=False) for text in NOT_SPECIAL]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(BPE_SIZE + place): {"content": text, **flags, "special": text in SPECIAL}
        for place, text in enumerate(SPECIAL + NOT_SPECIAL)
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:-1],
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)
    return AutoTokenizer.from_pretrained(folder)


def make_model(tokenizer: Any) -> Qwen3ForCausalLM:
    """Two million random parameters: 4 layers of width 192, 4 query heads on 2 key-value heads."""
    text_end, turn_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=text_end,
        eos_token_id=turn_end,
    )
    torch.manual_seed(TRAINING_SEED)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=text_end,
        eos_token_id=[turn_end, text_end],
        pad_token_id=text_end,
        do_sample=False,
    )
    return model


def save_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights, these in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


# --- rows


def prompt_text(row: Row, tokenizer: Any) -> str:
    """What the model reads: the raw prompt, or the messages through the chat template."""
    if row.prompt is not None:
        return row.prompt
    return tokenizer.apply_chat_template(
        list(row.messages or ()),
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=row.thinking,
    )


def verify_completions(tokenizer: Any) -> None:
    """Raise ValueError if prompt + completion is not what the chat template makes of an answer."""
    rng = random.Random(0)
    for thinking in (False, True):
        row = chat_row(rng, draw(rng), thinking, SYSTEM_PROMPTS[0], turns=1)
        answer: Message = {"role": "assistant", "content": row.item.answer}
        answer["reasoning_content"] = row.item.thought if thinking else ""
        whole = tokenizer.apply_chat_template([*(row.messages or ()), answer], tokenize=False)
        if whole != prompt_text(row, tokenizer) + row.completion + "\n":
            raise ValueError(f"the chat template writes {whole!r}")


def drawn_items(rng: random.Random, count: int) -> list[Item]:
    """`count` distinct items, the tasks in turn."""
    items: dict[str, Item] = {}
    tasks = tuple(TASKS)
    while len(items) < count:
        item = draw(rng, tasks[len(items) % len(tasks)])
        items.setdefault(item.key, item)
    shuffled = list(items.values())
    rng.shuffle(shuffled)
    return shuffled


def general_rows(rng: random.Random, count: int) -> list[Row]:
    """Raw prompts (3 of 8), and chats (5 of 8), both with and without turns before."""
    rows = []
    for place, item in enumerate(drawn_items(rng, count)):
        if place % 8 < 3:
            rows.append(raw_row(rng, item, shots=rng.choice((0, 0, 0, 1, 2))))
        else:
            system = rng.choice((None, None, *SYSTEM_PROMPTS))
            rows.append(chat_row(rng, item, place % 2 == 0, system, rng.choice((0, 0, 0, 1, 2))))
    return rows


# --- the shipped files: each maker draws its rows and writes them


def make_prompts(rng: random.Random, path: Path, tokenizer: Any) -> list[Row]:
    """prompts.jsonl: raw prompts, chats, and prompts that are token ids already."""
    rows, lines = general_rows(rng, 256), []
    for number, row in enumerate(rows):
        line: dict[str, Any] = {"id": f"p{number:04d}"}
        if number % 8 in (0, 7):
            text = prompt_text(row, tokenizer)
            line["prompt_token_ids"] = tokenizer.encode(text, add_special_tokens=False)
        elif row.prompt is not None:
            line["prompt"] = row.prompt
        else:
            line["messages"] = list(row.messages or ())
            if not row.thinking or number % 3 == 0:  # thinking is the template's default
                line["chat_template_kwargs"] = {"enable_thinking": row.thinking}
        lines.append({**line, "answer": row.item.answer, "task": row.item.task})
    write_lines(path, lines)
    return rows


def make_parquet(rng: random.Random, path: Path, tokenizer: Any) -> list[Row]:
    """prompts.parquet: a row has a prompt or messages, and the other is null."""
    items = drawn_items(rng, 64)
    rows = [
        chat_row(rng, item, True) if number % 2 else raw_row(rng, item)
        for number, item in enumerate(items)
    ]
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    first = datetime.date(2026, 11, 1)
    columns = {
        "id": pa.array([f"t{number:04d}" for number in range(len(rows))]),
        "prompt": pa.array([row.prompt for row in rows], pa.string()),
        "messages": pa.array(
            [None if row.messages is None else list(row.messages) for row in rows],
            pa.list_(message),
        ),
        "answer": pa.array([row.item.answer for row in rows]),
        "task": pa.array([row.item.task for row in rows]),
        "created": pa.array([first + datetime.timedelta(number % 22) for number in range(64)]),
    }
    pq.write_table(pa.table(columns), path)
    return rows


def make_openai(rng: random.Random, path: Path, tokenizer: Any) -> list[Row]:
    """openai_batch.jsonl, and the expected answers in a file beside it."""
    rows, lines, answers = [], [], {}
    for number, item in enumerate(drawn_items(rng, 32)):
        name = f"request-{number:03d}"
        body: dict[str, Any] = {"model": "Qwen3-sample"}
        if number % 8 == 5:
            row = raw_row(rng, item)
            body |= {"prompt": row.prompt, "max_tokens": 64}
        else:
            row = chat_row(rng, item, True, rng.choice((None, *SYSTEM_PROMPTS)))
            body |= {"messages": list(row.messages or ()), "max_tokens": 192}
        url = "/v1/chat/completions" if row.prompt is None else "/v1/completions"
        lines.append({"custom_id": name, "method": "POST", "url": url, "body": body})
        rows.append(row)
        answers[name] = item.answer
    write_lines(path, lines)
    write_json(path.with_name("openai_batch_answers.json"), answers)
    return rows


def make_shared_prefix(rng: random.Random, path: Path, tokenizer: Any) -> list[Row]:
    """shared_prefix.jsonl: all rows begin with the same long system prompt."""
    rows, lines = [], []
    for number, item in enumerate(drawn_items(rng, 64)):
        row = chat_row(rng, item, number % 2 == 0, RULES)
        line: dict[str, Any] = {"id": f"s{number:04d}", "messages": list(row.messages or ())}
        if not row.thinking:
            line["chat_template_kwargs"] = {"enable_thinking": False}
        lines.append({**line, "answer": item.answer, "task": item.task})
        rows.append(row)
    write_lines(path, lines)
    return rows


MAKERS: dict[str, Callable[[random.Random, Path, Any], list[Row]]] = {
    "prompts.jsonl": make_prompts,
    "prompts.parquet": make_parquet,
    "openai_batch.jsonl": make_openai,
    "shared_prefix.jsonl": make_shared_prefix,
}


def make_prompt_files(folder: Path, tokenizer: Any) -> dict[str, list[Row]]:
    """Write all prompt files; return the rows of those that have answers."""
    rng = random.Random(SHIPPED_SEED)
    rows = {name: maker(rng, folder / name, tokenizer) for name, maker in MAKERS.items()}
    make_bad_rows(folder)
    return rows


def shipped_rows(folder: Path) -> dict[str, list[Row]]:
    """The rows of the files in `folder`; ValueError where a file is not what this script makes."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with tempfile.TemporaryDirectory() as name:
        rows = make_prompt_files(Path(name), tokenizer)
        for made in Path(name).glob("*.json*"):  # a Parquet file names its writer's version
            if made.read_bytes() != (folder / made.name).read_bytes():
                raise ValueError(f"{made.name} is not what this script makes")
    return rows


def make_bad_rows(folder: Path) -> None:
    """bad_rows.jsonl: every kind of row that cannot be run, between rows that can."""
    good = '{"id": "%s", "prompt": "Q: %s=\\nA:", "answer": "%s"}'
    lines: list[tuple[str | bytes, str]] = [
        (good % ("ok-1", "3+4", "7"), "ok"),
        ('{"id": "broken", "prompt": "Q: 3+4=\\nA:"', "not JSON: the object is not closed"),
        ('{"id": "nan", "prompt": "Q: 3+4=\\nA:", "temperature": NaN}', "not JSON: NaN"),
        ('{"id": "surrogate", "prompt": "Q: \\ud800\\nA:"}', "not JSON: lone surrogate"),
        (b'{"id": "utf8", "prompt": "Q: caf\xe9\\nA:"}', "not UTF-8"),
        (
            '{"id": "ok-2", "messages": [{"role": "user", "content": "What is 3+4?"}], '
            '"answer": "7"}',
            "ok",
        ),
        ('{"id": "empty", "prompt": ""}', "empty prompt"),
        ('{"id": "none", "answer": "7"}', "no prompt, messages or prompt_token_ids"),
        ('{"id": "number", "prompt": 34}', "prompt is not a string"),
        ('{"id": "text", "messages": "What is 3+4?"}', "messages is not a list"),
        ('{"id": "role", "messages": [{"content": "What is 3+4?"}]}', "a message has no role"),
        ('{"id": "no-messages", "messages": []}', "messages is empty"),
        (
            '{"id": "ok-3", "prompt": "Q: 3+4=\\nA:", "temperature": 0, "max_tokens": 8, '
            '"answer": "7"}',
            "ok",
        ),
        (
            '{"id": "typo", "prompt": "Q: 3+4=\\nA:", "temprature": 0.5}',
            "unknown setting temprature, if settings are read from the row",
        ),
        ('{"id": "cold", "prompt": "Q: 3+4=\\nA:", "temperature": -1}', "temperature below 0"),
        ('{"id": "top-p", "prompt": "Q: 3+4=\\nA:", "top_p": 2}', "top_p above 1"),
        ('{"id": "short", "prompt": "Q: 3+4=\\nA:", "max_tokens": 0}', "max_tokens below 1"),
        ('{"id": "ids", "prompt_token_ids": [48, 999999]}', "token id outside the vocabulary"),
        ('{"id": "minus", "prompt_token_ids": [-1]}', "token id outside the vocabulary"),
        ('["list", "Q: 3+4=\\nA:"]', "not an object"),
        (
            '{"id": "long", "prompt": "Q: sort' + " 7" * 2500 + '\\nA:"}',
            "prompt longer than max_position_embeddings",
        ),
        (good % ("ok-1", "5+4", "9"), "duplicate id"),
        ("", "blank line"),
        (
            '{"id": "two", "prompt": "Q: 3+4=\\nA:", '
            '"messages": [{"role": "user", "content": "What is 3+4?"}]}',
            "both prompt and messages",
        ),
        (good % ("ok-4", "5+4", "9"), "ok"),
    ]
    path = folder / "bad_rows.jsonl"
    encoded = (line if isinstance(line, bytes) else line.encode() for line, _ in lines)
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    expected = {str(number): reason for number, (_, reason) in enumerate(lines, 1)}
    write_json(path.with_name("bad_rows.expected.json"), expected)


def write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in values]
    path.write_text("".join(lines), encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- training


def encode_rows(job: tuple[int, int, Path, frozenset[str]]) -> dict[int, Part]:
    """Training rows by padded length; the work of one process."""
    seed, count, folder, without = job
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [training_row(rng, without) for _ in range(count)]
    backend, pad = tokenizer.backend_tokenizer, tokenizer.pad_token_id
    prompts = backend.encode_batch([prompt_text(row, tokenizer) for row in rows])
    ends = backend.encode_batch([row.completion for row in rows])
    buckets: dict[int, tuple[list[list[int]], list[list[bool]]]] = {}
    for prompt, end in zip(prompts, ends, strict=True):
        ids, start = prompt.ids + end.ids, len(prompt.ids)
        length = next(length for length in BUCKETS if len(ids) <= length)
        padded, counted = buckets.setdefault(length, ([], []))
        padded.append(ids + [pad] * (length - len(ids)))
        counted.append([start <= place < len(ids) for place in range(1, length)])
    return {
        length: (np.array(padded, np.int16), np.array(counted))
        for length, (padded, counted) in buckets.items()
    }


def training_set(folder: Path, count: int, without: frozenset[str], seed: int) -> list[Part]:
    """`count` training rows, made by all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    size = min(count, 5000)
    jobs = [(seed + begin, size, folder, without) for begin in range(0, count, size)]
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(jobs))) as pool:
        done = pool.map(encode_rows, jobs, chunksize=1)
    result = []
    for length in BUCKETS:
        parts = [part[length] for part in done if length in part]
        if parts:
            result.append(
                (np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
            )
    return result


def train(
    model: Qwen3ForCausalLM,
    parts: Sequence[Part],
    steps: int,
    batch_tokens: int,
    peak_rate: float,
    seconds: float,
    report: Callable[[], str],
) -> None:
    """AdamW with a cosine schedule over `steps`, which runs faster where `seconds` would pass.

    The loss counts completions only. A batch has rows of about one length, from a bucket drawn so
    that every row of the training set is equally likely.
    """
    device = model.device
    data = [tuple(torch.from_numpy(array).to(device) for array in part) for part in parts]
    weights = torch.tensor([float(ids.numel()) for ids, _ in data])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    generator = torch.Generator(device).manual_seed(TRAINING_SEED)
    buckets = torch.Generator().manual_seed(TRAINING_SEED)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    began, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        ids, counts = data[int(torch.multinomial(weights, 1, generator=buckets))]
        size = max(batch_tokens // ids.shape[1], 1)
        chosen = torch.randint(len(ids), (size,), generator=generator, device=device)
        batch, target = ids[chosen].long(), counts[chosen]
        with cast:
            hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state[target]
            logits = model.lm_head(hidden)
        loss = torch.nn.functional.cross_entropy(logits.float(), batch[:, 1:][target])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = (
            peak_rate
            * min(1.0, (step + 1) / 200)
            * (0.01 + 0.99 * math.cos(math.pi / 2 * done) ** 2)
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 1000 == 0:
            passed = time.monotonic() - began
            line = f"step {step}, {passed:.0f} s, loss {loss.item():.4f}, rate {rate:.5f}"
            print(f"{line}, {report()}", flush=True)
        done = max(step / steps, (time.monotonic() - began) / seconds)
    print(f"trained {step} steps in {time.monotonic() - began:.0f} s on {device}", flush=True)


# --- accuracy


def answers(model: Qwen3ForCausalLM, tokenizer: Any, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The greedy completion of each row by transformers, and its answer: the text after thought."""
    texts = [prompt_text(row, tokenizer) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: len(texts[number]))
    result = [("", "")] * len(rows)
    for begin in range(0, len(rows), 256):
        part = order[begin : begin + 256]
        inputs = tokenizer(
            [texts[number] for number in part],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        for number, text in zip(
            part, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            result[number] = (text, text.split("</think>")[-1].strip())
    return result


def accuracy(model: Qwen3ForCausalLM, tokenizer: Any, rows: Sequence[Row]) -> Counter[str]:
    """How many rows of each task are answered with the exact text."""
    right: Counter[str] = Counter()
    for row, (_, answer) in zip(rows, answers(model, tokenizer, rows), strict=True):
        right[row.item.task] += answer == row.item.answer
    return right


def check(folder: Path, rows: dict[str, list[Row]]) -> float:
    """Print the shipped model's accuracy by file and by task; return that of all rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, part in rows.items():
        found = accuracy(model, tokenizer, part)
        right += found
        total += Counter(row.item.task for row in part)
        print(f"{name:22} {found.total():4d} of {len(part):4d}")
    for task in TASKS:
        print(f"{task:22} {right[task]:4d} of {total[task]:4d}")
    print(f"{'all':22} {right.total():4d} of {total.total():4d}")
    return right.total() / total.total()


def main() -> None:
    """Parse the command line and make what it asks for."""
    parser = argparse.ArgumentParser(description="Make sample_data/.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (this one)")
    parser.add_argument("--prompts-only", action="store_true", help="no training, keep the weights")
    parser.add_argument("--check", action="store_true", help="only measure the model in --out")
    parser.add_argument("--device", help="cuda or cpu (what there is)")
    parser.add_argument("--examples", type=int, default=400_000, help="size of the training set")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--resume", action="store_true", help="begin with the weights in --out")
    parser.add_argument("--seed", type=int, default=TRAINING_SEED, help="seed of the training set")
    parser.add_argument("--seconds", type=float, default=1800.0, help="most time for the training")
    arguments = parser.parse_args()
    folder = arguments.out / "model"
    if arguments.check:
        raise SystemExit(check(folder, shipped_rows(arguments.out)) < 0.95)
    folder.mkdir(parents=True, exist_ok=True)

    tokenizer = make_tokenizer(folder)
    verify_completions(tokenizer)
    rows = make_prompt_files(arguments.out, tokenizer)
    model = make_model(tokenizer)
    if arguments.prompts_only:
        if not (folder / "model.safetensors").exists():
            save_model(model, folder)  # random weights, to be trained
        return
    if arguments.resume:
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).train()

    dev = general_rows(random.Random(DEV_SEED), 256)
    held = frozenset(row.item.key for part in (*rows.values(), dev) for row in part)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    began = time.monotonic()
    data = training_set(folder, arguments.examples, held, arguments.seed)
    print(f"made {sum(len(ids) for ids, _ in data)} rows in {time.monotonic() - began:.0f} s")

    def report() -> str:
        found = accuracy(model, tokenizer, dev)
        return f"dev {found.total()} of {len(dev)}"

    train(
        model.to(device),
        data,
        arguments.steps,
        arguments.batch_tokens,
        arguments.rate,
        arguments.seconds,
        report,
    )
    save_model(model.cpu(), folder)
    check(folder, rows)


if __name__ == "__main__":
    main()
