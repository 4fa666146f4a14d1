"""Bytes to learn from: the interpreter's own standard library, or any file or folder of text."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

BLOCK = 64 * 1024  # bytes held out in one piece: long against a context, short against a corpus
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


def library_files() -> list[Path]:
    """The running interpreter's standard-library sources without tests, in sorted order.

    The same on every rank and every run of one Python version; another version is another corpus.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))


def joined(files: Iterable[Path]) -> bytes:
    """All files one after the other; binary ones (a zero byte, as git tells them) are left out."""
    texts = (path.read_bytes() for path in files)
    return b"\n".join(text for text in texts if b"\0" not in text)


def load_bytes(path: Path | None = None) -> Tensor:
    """The corpus as (length,) uint8: the file or folder at `path`, or the standard library for None."""
    if path is None:
        files, place = library_files(), "the standard library"
    elif path.is_dir():
        files, place = sorted(file for file in path.rglob("*") if file.is_file()), str(path)
    elif path.is_file():
        files, place = [path], str(path)
    else:
        raise FileNotFoundError(f"--data: expected a text file or a folder, nothing lies at {path}; check the path")
    text = joined(files)
    if not text:
        raise ValueError(f"--data: {place} holds no text; give a file or folder that does")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def split(corpus: Tensor, validation_fraction: float) -> tuple[Tensor, Tensor]:
    """(train, validation): every n-th block is held out whole, n = round(1 / validation_fraction).

    Blocks are taken all through the corpus, so that both parts see the same kinds of text, and no byte is in both.
    """
    if not 0.0 < validation_fraction <= 0.5:
        raise ValueError(f"split: validation_fraction must lie in (0, 0.5], got {validation_fraction}; try 0.05")
    every = round(1 / validation_fraction)
    size = min(BLOCK, len(corpus) // every)
    if not size:
        raise ValueError(f"split: expected at least {every} bytes, got {len(corpus)}; give a longer text")
    blocks = corpus.split(size)
    train = [block for number, block in enumerate(blocks, 1) if number % every]
    return torch.cat(train), torch.cat(blocks[every - 1 :: every])


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Each `context` bytes of the corpus once, in an order drawn from `seed`.

    Item: (tokens, targets), (context,) int64 each; a target is the byte after its token.
    """

    def __init__(self, corpus: Tensor, context: int, seed: int) -> None:
        count = (len(corpus) - 1) // context
        if count < 1:
            raise ValueError(
                f"Windows: expected at least context + 1 = {context + 1} bytes, got {len(corpus)}; "
                "give a longer text or a shorter context"
            )
        self.corpus, self.context = corpus, context
        self.order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = int(self.order[index]) * self.context
        window = self.corpus[start : start + self.context + 1].long()
        return window[:-1], window[1:]
