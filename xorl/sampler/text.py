"""Turns token ids into text where the model has a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from xorl.errors import InvalidRequest


class Text:
    """A tokenizer, or its absence: without one, texts are empty and requests that need one are refused."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of_model(cls, path: str) -> "Text":
        folder = Path(path)
        if folder.is_dir() and not any(folder.glob("tokenizer*")):
            return cls(None)
        return cls(AutoTokenizer.from_pretrained(path))

    def __bool__(self) -> bool:
        return self._tokenizer is not None

    @property
    def eos_token_ids(self) -> set[int]:
        return set() if self._tokenizer is None else _ids(self._tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise InvalidRequest("text: this model has no tokenizer; send input_ids")
        return self._tokenizer.encode(text)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if self._tokenizer is None:
            return ""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text


def _ids(value: object) -> set[int]:
    """One id, several or none, as Hugging Face's configurations have it."""
    if isinstance(value, int):
        return {value}
    return {item for item in value if isinstance(item, int)} if isinstance(value, list) else set()


def eos_token_ids(*values: object) -> frozenset[int]:
    return frozenset[int]().union(*(_ids(value) for value in values))
