"""Make tokenizer.json of older tokenizer files: `python -m nanovllm_cli.convert_tokenizer FROM TO`.

In a process of its own, with nothing on stdin: transformers is the only one that knows all of the
old formats, and it asks there whether to run a checkpoint's code. The answer here is no.
"""

import sys

from transformers import AutoTokenizer


def main() -> None:
    """Write tokenizer.json into the directory TO, which is made."""
    source, target = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(
        source, local_files_only=True, trust_remote_code=False
    )
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    main()
