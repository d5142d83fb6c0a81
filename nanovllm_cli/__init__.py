"""nanovllm: batch text generation from the command line, file to file."""

__version__ = "0.1.0"
