"""A small WordPiece vocabulary from a data set's narrations: `python -m data_prep.vocabulary --clips CLIPS --out DIR`.

For runs from scratch. To start from DistilBERT's weights, use its own tokenizer's folder instead.
"""

import argparse
import pathlib
import sys

import tokenizers
import transformers
from array_record.python.array_record_module import ArrayRecordReader

from mc3_jax.data import records


def train_vocabulary(texts: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """Returns an uncased BERT WordPiece tokenizer of at most `size` tokens, a function of the texts alone."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(sorted(texts), trainer)
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
      ValueError: No data set there, or no training clips.
    """
    info = records.ClipsInfo.load(folder)
    texts = []
    for path in info.shard_paths(folder, "train"):
        reader = ArrayRecordReader(path)
        texts += [records.decode(record).narration for record in reader.read_all()]
        reader.close()
    return texts


def main(argv: list[str] | None = None) -> None:
    """Trains and saves a vocabulary, or ends with one line and status 2."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.vocabulary", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", required=True, type=pathlib.Path, help="folder made by data_prep.ego4d")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder for the tokenizer")
    parser.add_argument("--size", type=int, default=600, help="most tokens, special ones included")
    args = parser.parse_args(argv)
    try:
        if args.size < 64:
            raise ValueError(f"--size must be at least 64, got {args.size}")
        texts = read_texts(args.clips)
        tokenizer = train_vocabulary(texts, args.size)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    tokenizer.save_pretrained(args.out)
    print(f"{len(tokenizer)} tokens from {len(texts)} narrations -> {args.out}")


if __name__ == "__main__":
    main()
