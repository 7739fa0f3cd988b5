"""Tokenizers are read safely from folders that strangers may have made."""

import io
import json

import numpy as np
import pytest
import tokenizers
import transformers

from mc3_jax.data.tokenizer import FILES, copy_tokenizer, load_tokenizer, tokenizer_digest


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


def test_what_a_text_loses_is_told(tmp_path):
    make_folder(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    tokenize = load_tokenizer(tmp_path, 3, 4)
    assert tokenize.find_loss("cut onion") == tokenize.find_loss("cut the onion") == ""
    assert tokenize.find_loss("cut onion cut onion") == "is cut after 3 tokens"
    assert tokenize.find_loss("peel it") == tokenize.find_loss("") == "has no word that the tokenizer knows"


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


@pytest.mark.parametrize("beside_model", [False, True])
@pytest.mark.parametrize("has_both", [False, True])
def test_a_copy_of_distilberts_tokenizer_gives_its_ids_without_the_model_it_came_with(tmp_path, beside_model, has_both):
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    (source / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cut", "onion", "##s"]))
    (source / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    (source / "config.json").write_text('{"model_type": "distilbert"}')
    if has_both:
        transformers.AutoTokenizer.from_pretrained(source).backend_tokenizer.save(str(source / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"pad_token": "onion"}')  # of another tokenizer
    if beside_model:
        (folder / "config.json").write_text('{"format": "mc3_jax"}')
    copy_tokenizer(source, folder, beside_model=beside_model)
    (ids, mask), (other_ids, other_mask) = (load_tokenizer(place, 8, 8)("Cuts ONIONS") for place in (source, folder))
    np.testing.assert_array_equal(other_ids, ids)
    assert other_mask.tolist() == mask.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert "onion" not in "".join(path.read_text() for path in folder.glob(FILES[2]))
    assert beside_model or tokenizer_digest(folder) == tokenizer_digest(source)
    assert not beside_model or (folder / "config.json").read_text() == '{"format": "mc3_jax"}'


def test_what_can_not_be_copied_or_can_not_pad_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer: name a folder with tokenizer.json or vocab.txt"):
        copy_tokenizer(tmp_path, tmp_path / "x")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")  # all tokenizers of such files would have one digest
    (tmp_path / "vocab.json").write_text('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "c": 5}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    with pytest.raises(ValueError, match="holds no tokenizer: name a folder with tokenizer.json or vocab.txt; trans"):
        load_tokenizer(tmp_path, 8, 100)
    make_folder(tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no token to pad with: copy tokenizer_config.json"):
        load_tokenizer(tmp_path, 8, 100)
