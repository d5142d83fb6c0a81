"""The engine: token ids in, token ids out. It knows no file format, no text and no terminal."""
