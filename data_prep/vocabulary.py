"""A small WordPiece vocabulary from a data set's narrations: `python -m data_prep.vocabulary --clips CLIPS --out DIR`.

For runs from scratch. To start from DistilBERT's weights, use its own tokenizer's folder instead.
"""

import argparse
import collections
import itertools
import pathlib

import tokenizers
import transformers

from mc3_jax import terminal
from mc3_jax.data import records

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def learn_pieces(words: collections.Counter[str], size: int) -> list[str]:
    """Returns WordPiece tokens: every character, then merges of the most frequent neighbours that occur twice or more.

    The same as the trainer of `tokenizers`, except for ties. The trainer breaks them by the order of a hash map, so that the
    same texts give different ids in each process. Here ties are broken alphabetically.

    Args:
      words: Number of occurrences of each word.
      size: Largest number of tokens.

    Raises:
      ValueError: There are more characters than `size` tokens.
    """
    parts = {word: [word[0], *(f"##{c}" for c in word[1:])] for word in words}
    pieces = sorted({c for word in words for c in word} | {piece for split in parts.values() for piece in split})
    if len(pieces) > size:
        raise ValueError(f"{size} tokens are too few: the narrations' characters alone need {len(pieces)}, raise --size")
    pairs: collections.Counter[tuple[str, str]] = collections.Counter()
    where = collections.defaultdict(set)
    for word, split in parts.items():
        for pair in itertools.pairwise(split):
            pairs[pair] += words[word]
            where[pair].add(word)
    known = set(pieces)
    while len(pieces) < size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merged = best[0] + best[1].removeprefix("##")
        if merged not in known:
            known.add(merged)
            pieces.append(merged)
        for word in where.pop(best):
            for pair in itertools.pairwise(parts[word]):
                pairs[pair] -= words[word]
            parts[word] = _merge(parts[word], best, merged)
            for pair in itertools.pairwise(parts[word]):
                pairs[pair] += words[word]
                where[pair].add(word)
        del pairs[best]
    return pieces


def _merge(split: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    """Returns a word's pieces with every occurrence of the pair merged, from left to right."""
    out: list[str] = []
    for piece in split:
        if out and (out[-1], piece) == pair:
            out[-1] = merged
        else:
            out.append(piece)
    return out


def train_vocabulary(texts: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """Returns an uncased BERT WordPiece tokenizer of at most `size` tokens, which depends only on the texts.

    Raises:
      ValueError: The texts have more different characters than `size` has room for.
    """
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words: collections.Counter[str] = collections.Counter()
    for text, count in collections.Counter(texts).items():
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)):
            words[word] += count
    pieces = [*_SPECIAL, *learn_pieces(words, size - len(_SPECIAL))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.add_special_tokens(list(_SPECIAL))
    ends = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    backend.decoder = tokenizers.decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def read_texts(folder: pathlib.Path) -> list[str]:
    """Returns the narrations of the training split.

    Raises:
      ValueError: The folder holds no data set, there are no training clips, or a shard is damaged.
    """
    from array_record.python.array_record_module import ArrayRecordReader  # `train_vocabulary` alone works without it

    info = records.ClipsInfo.load(folder)
    texts = []
    for path in info.shard_paths(folder, "train"):
        try:
            reader = ArrayRecordReader(path)
            texts += [records.decode(record).narration for record in reader.read_all()]
            reader.close()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} can't be read: {error}: run `python -m data_prep.verify {folder}`") from error
    return texts


def main(argv: list[str] | None = None) -> None:
    """Trains and saves a vocabulary; after an error the process ends with one line and status 2, after Ctrl-C with 130."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.vocabulary", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", required=True, type=pathlib.Path, help="folder of a data set with narrations")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder for the tokenizer")
    parser.add_argument("--size", type=int, default=600, help="maximum number of tokens, including special ones")
    args = parser.parse_args(argv)
    with terminal.errors_in_one_line(), terminal.interrupts():
        if args.size < 64:
            raise ValueError(f"--size must be at least 64, got {args.size}")
        texts = read_texts(args.clips)
        args.out.mkdir(parents=True, exist_ok=True)  # transformers would only log that it can't
        tokenizer = train_vocabulary(texts, args.size)
        tokenizer.save_pretrained(args.out)
    print(f"{len(tokenizer)} tokens from {len(texts)} narrations -> {args.out}")


if __name__ == "__main__":
    main()
