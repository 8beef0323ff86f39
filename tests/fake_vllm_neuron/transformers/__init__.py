"""A tokenizer that takes characters for tokens, and a configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace


class AutoConfig:
    @staticmethod
    def from_pretrained(folder: str, *, local_files_only: bool) -> SimpleNamespace:
        assert local_files_only
        assert Path(folder, "config.json").exists()
        return SimpleNamespace(vocab_size=12)


class AutoTokenizer:
    @staticmethod
    def from_pretrained(folder: str, *, local_files_only: bool) -> AutoTokenizer:
        assert local_files_only
        assert Path(folder).is_dir()
        return AutoTokenizer()

    def __call__(self, text: str) -> list[int]:
        return [ord(each) % 12 for each in text]
