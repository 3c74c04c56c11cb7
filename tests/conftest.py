"""What holds for every test."""

import os

# With it, a print() is two writes, and the lines of several processes that share a pipe come out mixed.
os.environ.pop("PYTHONUNBUFFERED", None)
