"""Turns narrations into token ids, with the tokenizer of a folder: `distilbert-base-uncased` or one trained on narrations."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import numpy as np
import tokenizers
import transformers

from mc3_jax.data.transforms import Tokenize

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_ENOUGH = ("tokenizer.json", "vocab.txt")  # either one is enough for a tokenizer
_DIGESTED = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")  # hashed in this order


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Function text → (ids, mask), both int32 [num_tokens], padded or cut at the end; it is thread-safe.

    Attributes:
      backend: Tokenizer that cuts and pads.
      unknown_id: Id of the token for unknown words, None if there is none.
    """

    backend: tokenizers.Tokenizer
    unknown_id: int | None

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.backend.encode(text)
        return np.array(encoded.ids, np.int32), np.array(encoded.attention_mask, np.int32)

    def find_loss(self, text: str) -> str:
        """Returns what of a text is lost: that it is cut, or that none of its words is known; "" if neither."""
        encoded = self.backend.encode(text)
        if encoded.overflowing:
            return f"is cut after {len(encoded.ids)} tokens"
        told = [id_ for id_, special in zip(encoded.ids, encoded.special_tokens_mask, strict=True) if not special]
        return "" if any(id_ != self.unknown_id for id_ in told) else "has no word that the tokenizer knows"


def load_tokenizer(path: str | os.PathLike, num_tokens: int, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer in a folder.

    Args:
      path: Folder with `tokenizer.json` or `vocab.txt`; nothing is downloaded, and no code in it is run.
      num_tokens: Number of tokens, including [CLS] and [SEP].
      vocab_size: Number of rows of the embedding that the ids will index.

    Raises:
      ValueError: `path` is empty or no folder, or the folder holds no tokenizer, or one that needs its own code, has more
        tokens than `vocab_size` or has no padding token.
    """
    if not path:
        raise ValueError("config.data.tokenizer is empty: set it to the folder of a tokenizer")
    if not pathlib.Path(path).is_dir():
        raise ValueError(
            f"no tokenizer folder {path}: copy distilbert-base-uncased there or run `python -m data_prep.vocabulary`"
        )
    _check_files(pathlib.Path(path))
    tokenizer = _open(path)
    backend = tokenizer.backend_tokenizer
    size = backend.get_vocab_size(with_added_tokens=True)
    if size > vocab_size:
        raise ValueError(f"{path} has {size} tokens but config.model.text.vocab_size is {vocab_size}: raise it")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer in {path} has no token to pad with: copy tokenizer_config.json, and the config.json of the model "
            "it came with, there too"
        )
    # Truncation and padding are settings of the object that threads share. They are set only here, so threads just read them.
    backend.enable_truncation(num_tokens)
    backend.enable_padding(length=num_tokens, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return Tokenizer(backend, tokenizer.unk_token_id)


def _open(path: str | os.PathLike) -> transformers.PreTrainedTokenizerFast:
    """Returns the fast tokenizer in a folder; nothing is downloaded, and no code in it is run.

    Raises:
      ValueError: The folder holds no fast tokenizer, or one that needs its own code.
    """
    try:
        # Without `trust_remote_code=False`, transformers asks on the terminal whether to run Python code found in the folder.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, use_fast=True, trust_remote_code=False
        )
        _ = tokenizer.backend_tokenizer
    except (OSError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds no fast tokenizer: {type(error).__name__}: {reason}") from error
    return tokenizer


def holds_tokenizer(folder: str | os.PathLike) -> bool:
    """Returns whether a folder has `tokenizer.json` or `vocab.txt`."""
    return any((pathlib.Path(folder) / name).is_file() for name in _ENOUGH)


def _check_files(folder: pathlib.Path) -> None:
    """Raises a ValueError if a folder has neither `tokenizer.json` nor `vocab.txt`, by which tokenizers are compared.

    This refuses byte-pair tokenizers that consist of `vocab.json` and `merges.txt` alone.
    """
    if not holds_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokenizer: name a folder with {' or '.join(_ENOUGH)}; transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes the first"
        )


def copy_tokenizer(source: str | os.PathLike, folder: str | os.PathLike, *, beside_model: bool = False) -> None:
    """Copies a tokenizer's files to a folder, replacing those of another tokenizer there.

    The class of some tokenizers, such as DistilBERT's, is named only in the `config.json` of the model that they came with.
    Then this file is copied as well. If `beside_model`, the tokenizer is instead saved anew, with its class in
    `tokenizer_config.json`.

    Args:
      source: Folder of the tokenizer.
      folder: Folder to copy to; it must exist.
      beside_model: Whether `folder` has, or will have, the `config.json` of another model.

    Raises:
      ValueError: `source` holds no tokenizer.
    """
    source, folder = pathlib.Path(source), pathlib.Path(folder)
    _check_files(source)
    if source.resolve() == folder.resolve():
        return
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (source / "config.json").is_file() or _names_its_kind(source):
        return
    if beside_model:
        _open(source).save_pretrained(folder)
    else:
        shutil.copyfile(source / "config.json", folder / "config.json")


def _names_its_kind(folder: pathlib.Path) -> bool:
    try:
        return "tokenizer_class" in json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def blank(num_tokens: int) -> Tokenize:
    """Returns a `tokenize(text) -> (ids, mask)` that needs no tokenizer and gives zeros, for callers that ignore the text."""
    nothing = np.zeros(num_tokens, np.int32)
    return lambda text: (nothing, nothing)


def tokenizer_digest(path: str | os.PathLike) -> str:
    """Returns the SHA-256, hexadecimal, of a tokenizer's files; it does not depend on the path of their folder."""
    digest = hashlib.sha256()
    for name in _DIGESTED:
        file = pathlib.Path(path) / name
        content = file.read_bytes() if file.is_file() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
