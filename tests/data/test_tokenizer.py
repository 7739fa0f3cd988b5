"""Tokenizers are read from a folder that a stranger may have filled."""

import io
import json

import numpy as np
import pytest
import tokenizers

from mc3_jax.data.tokenizer import load_tokenizer


def make_folder(folder, **settings):
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "cut": 2, "onion": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings |= {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_text_becomes_ids_and_a_mask_padded_or_cut_to_one_length(tmp_path):
    make_folder(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    ids, mask = load_tokenizer(tmp_path, 3, 4)("cut onion")
    np.testing.assert_array_equal(ids, [2, 3, 0])
    np.testing.assert_array_equal(mask, [1, 1, 0])
    ids, _ = load_tokenizer(tmp_path, 1, 4)("cut onion")
    np.testing.assert_array_equal(ids, [2])


def test_the_code_a_tokenizers_folder_brings_along_is_never_run(tmp_path, monkeypatch):
    make_folder(tmp_path, tokenizer_class="Theirs", auto_map={"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]})
    (tmp_path / "theirs.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast as Theirs\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))  # transformers would ask, and take this for consent
    with pytest.raises(ValueError, match="holds no fast tokenizer: ValueError"):
        load_tokenizer(tmp_path, 8, 100)
    assert not (tmp_path / "ran").exists()
