"""Rows per second of `nanovllm generate` against transformers' generate on the sample rows, a CPU.

    python tests/performance/compare_transformers.py --pairs 3

Each run is a process of its own, the two in turn; both generate greedily, at most --max-tokens a
row, and count the seconds of generation alone. transformers runs batches of 16, left-padded, in
file order, with its own default threads.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MODEL, PROMPTS = ROOT / "sample_data" / "model", ROOT / "sample_data" / "prompts.jsonl"
BATCH = 16


def run_transformers(max_tokens: int) -> dict[str, float]:
    """Generate the sample rows with transformers in this process."""
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = Qwen3ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    prompts = [prompt_token_ids(tokenizer, json.loads(line)) for line in PROMPTS.open()]
    pad = tokenizer.pad_token_id
    num_right, start = 0, time.perf_counter()
    answers = [json.loads(line)["answer"] for line in PROMPTS.open()]
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad
        )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for text, answer in zip(texts, answers[first:], strict=False):
            num_right += text.split("</think>")[-1].strip() == answer
    seconds = time.perf_counter() - start
    return {"rows_per_second": len(prompts) / seconds, "right": num_right / len(prompts)}


def prompt_token_ids(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """The row's tokens as transformers makes them."""
    if "prompt_token_ids" in row:
        return row["prompt_token_ids"]
    if "prompt" in row:
        return tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    return tokenizer.apply_chat_template(
        row["messages"],
        add_generation_prompt=True,
        return_dict=False,
        **row.get("chat_template_kwargs", {}),
    )


def run_nanovllm(max_tokens: int) -> dict[str, float]:
    """Generate the sample rows with the command."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "out.jsonl"
        command = [sys.executable, "-m", "nanovllm_cli", "generate", str(PROMPTS), "--quiet"]
        command += ["-m", str(MODEL), "-o", str(output), "--max-tokens", str(max_tokens)]
        subprocess.run(command, check=True)
        stats = json.loads(Path(f"{output}.stats.json").read_bytes())
        rows = [json.loads(line) for line in output.open()]
    num_right = sum(row["completion"].strip() == row["answer"] for row in rows)
    return {
        "rows_per_second": stats["throughput"]["rows_per_second"],
        "right": num_right / len(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--transformers-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transformers_only:
        print(json.dumps(run_transformers(arguments.max_tokens)))
        return
    ratios = []
    for _ in range(arguments.pairs):
        command = [sys.executable, __file__, "--transformers-only"]
        command += ["--max-tokens", str(arguments.max_tokens)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        theirs = json.loads(output)
        ours = run_nanovllm(arguments.max_tokens)
        ratios.append(ours["rows_per_second"] / theirs["rows_per_second"])
        print(f"transformers {theirs}, nanovllm {ours}, ratio {ratios[-1]:.2f}", flush=True)
    print(f"ratio of rows/s: min {min(ratios):.2f}, median {sorted(ratios)[len(ratios) // 2]:.2f}")


if __name__ == "__main__":
    main()
