"""Narrations to token ids, with the tokenizer of a folder: `distilbert-base-uncased`, or one trained on narrations."""

import hashlib
import json
import os
import pathlib
import shutil

import numpy as np
import transformers

from mc3_jax.data.transforms import Tokenize

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_ENOUGH = ("tokenizer.json", "vocab.txt")  # one of them makes a tokenizer
_DIGESTED = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")  # in this order


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
    # Truncation is a setting of the shared object: set once, here, so that threads only ever read it.
    backend.enable_truncation(num_tokens)
    backend.enable_padding(length=num_tokens, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)

    def tokenize(text: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = backend.encode(text)
        return np.array(encoded.ids, np.int32), np.array(encoded.attention_mask, np.int32)

    return tokenize


def _open(path: str | os.PathLike) -> transformers.PreTrainedTokenizerFast:
    """Returns the fast tokenizer in a folder; nothing is downloaded, and no code in it is run.

    Raises:
      ValueError: It holds none, or one that needs its own code.
    """
    try:
        # Unless told, transformers asks on the terminal whether to run the Python code that a folder brings along.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, use_fast=True, trust_remote_code=False
        )
        _ = tokenizer.backend_tokenizer
    except (OSError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds no fast tokenizer: {type(error).__name__}: {reason}") from error
    return tokenizer


def holds_tokenizer(folder: str | os.PathLike) -> bool:
    """Returns whether a folder has a tokenizer's files."""
    return any((pathlib.Path(folder) / name).is_file() for name in _ENOUGH)


def _check_files(folder: pathlib.Path) -> None:
    """Raises a ValueError where a folder has none of the files by which tokenizers are told apart.

    Those of byte-pair encoding may consist of `vocab.json` and `merges.txt` alone.
    """
    if not holds_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokenizer: name a folder with {' or '.join(_ENOUGH)}; transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes the first"
        )


def copy_tokenizer(source: str | os.PathLike, folder: str | os.PathLike, *, beside_model: bool = False) -> None:
    """Copies a tokenizer's files, in place of those of another.

    What kind it is may stand in the `config.json` of the model it came with alone, as DistilBERT's does. That is copied as
    well; beside the `config.json` of another model, the tokenizer is written anew, with its kind in `tokenizer_config.json`.

    Args:
      source: Folder of the tokenizer.
      folder: That is there.
      beside_model: Whether the folder has a `config.json` of its own, or is going to.

    Raises:
      ValueError: The source holds no tokenizer.
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
    """Returns a `tokenize(text) -> (ids, mask)` for who does not look at text: zeros, without a tokenizer."""
    nothing = np.zeros(num_tokens, np.int32)
    return lambda text: (nothing, nothing)


def tokenizer_digest(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a tokenizer's files, wherever they lie."""
    digest = hashlib.sha256()
    for name in _DIGESTED:
        file = pathlib.Path(path) / name
        content = file.read_bytes() if file.is_file() else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
