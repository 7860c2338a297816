"""Real servers in a process of their own."""

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from react_fast.trainer.rollout.http import JsonClient


@torch.no_grad()
def only_text(model: Any, tokenizer: Any) -> None:
    """Tokens that are no text by themselves get logit 0, so that what a random policy writes mostly gives the
    same tokens again."""
    for i in range(len(tokenizer)):
        text = tokenizer.decode([i])
        if not (text.isascii() and text.isprintable()) or i in tokenizer.all_special_ids:
            model.get_output_embeddings().weight[i] = 0


@contextmanager
def served(module: str, words: Sequence[str], log: Path) -> Iterator[JsonClient]:
    """A client of `python -m module words --host ... --port ...`, which is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", module, *words, "--host", "127.0.0.1", "--port", port]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        # Some ten seconds to start, and those of a slow first answer.
        yield JsonClient(f"http://127.0.0.1:{port}/v1", timeout=60, retries=9, backoff=0.25)
    finally:
        process.terminate()
        process.wait(20)
