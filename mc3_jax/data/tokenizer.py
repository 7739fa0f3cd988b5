"""Narrations to token ids, with the tokenizer of a folder: `distilbert-base-uncased`, or one trained on narrations."""

import hashlib
import os
import pathlib

import numpy as np
import transformers

from mc3_jax.data.transforms import Tokenize


def load_tokenizer(path: str | os.PathLike, num_tokens: int, vocab_size: int) -> Tokenize:
    """Returns `tokenize(text) -> (ids, mask)`, int32 [num_tokens] each, cut at the end or padded; safe in threads.

    Args:
      path: Folder with `tokenizer.json` or `vocab.txt`; nothing is downloaded, and no code in it is run.
      num_tokens: Length, [CLS] and [SEP] included.
      vocab_size: Rows of the embedding the ids will index.

    Raises:
      ValueError: There is no such folder, it holds no tokenizer or one that needs its own code, or one with more tokens than
        `vocab_size`.
    """
    if not path:
        raise ValueError("config.data.tokenizer is empty: name the folder of a tokenizer")
    if not pathlib.Path(path).is_dir():
        raise ValueError(
            f"no tokenizer folder {path}: copy distilbert-base-uncased there or run `python -m data_prep.vocabulary`"
        )
    try:
        # Unless told, transformers asks on the terminal whether to run the Python code that a folder brings along.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, use_fast=True, trust_remote_code=False
        )
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds no fast tokenizer: {type(error).__name__}: {reason}") from error
    size = backend.get_vocab_size(with_added_tokens=True)
    if size > vocab_size:
        raise ValueError(f"{path} has {size} tokens but config.model.text.vocab_size is {vocab_size}: raise it")
    # Truncation is a setting of the shared object: set once, here, so that threads only ever read it.
    backend.enable_truncation(num_tokens)
    backend.enable_padding(length=num_tokens, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)

    def tokenize(text: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = backend.encode(text)
        return np.array(encoded.ids, np.int32), np.array(encoded.attention_mask, np.int32)

    return tokenize


def blank(num_tokens: int) -> Tokenize:
    """Returns a `tokenize(text) -> (ids, mask)` for who does not look at text: zeros, without a tokenizer."""
    nothing = np.zeros(num_tokens, np.int32)
    return lambda text: (nothing, nothing)


def tokenizer_digest(path: str) -> str:
    """Returns the SHA-256 of a tokenizer's files, wherever they lie."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        file = pathlib.Path(path) / name
        content = file.read_bytes() if file.is_file() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
