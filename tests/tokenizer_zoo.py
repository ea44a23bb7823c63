"""Small tokenizers of each family, trained in memory, and texts made to find wrong cuts."""

import random
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What random texts are made of: words, every kind of white space, and all that is hard to cut around.
WORDS = [
    "a",
    "the",
    "don't",
    "I'LL",
    "def",
    "x1",
    "1234567",
    "3.14",
    "Zürich",
    "слово",
    "中文",
    "한국어",
    "ไทย",
    "ᄒ\u1161",
]
WHITES = [*" \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000", "\r\n", "  ", "\n\n", " \n "]
SIGNS = [
    *"'.,_-/()\x00\x1c\u200b\u200d\ufeff\u0301\u094d\u2581\u3002\uff0c\u2026",
    "'s",
    "'re",
    "\U0001f600",
    "a\ufe0f",
]
LETTERS = [
    *"\u0130\u00e9\u00aa\u00bd\u2160\u2460\u2474\u3220\u0958\u0915\u093c\u037a\u1e9e\u017f\ufb01\u0d4e\U00016d67"
]
ADDED = ["<s>", "</s>", "<mask>", "  ", "\n\t", "[SEP]"]
ATOMS = WORDS * 3 + [" "] * 20 + WHITES * 2 + SIGNS + LETTERS + ADDED


def random_text(generator: random.Random, atoms: int) -> str:
    return "".join(generator.choices(ATOMS, k=atoms))


@cache
def corpus() -> tuple[str, ...]:
    """Python source and random texts, so that merges over every allowed border come to be."""
    generator = random.Random(0)
    source = Path(random.__file__).read_text(encoding="utf-8")
    return source[:40_000], *(random_text(generator, 400) for _ in range(60))


def _sequence(kind: object, parts: list) -> object:
    return parts[0] if len(parts) == 1 else kind.Sequence(parts)  # type: ignore[attr-defined]


def byte_level(
    normalizer: object = None, pattern: str | None = None, first: object = None, **options: bool
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    parts = [] if first is None else [first]
    if pattern is not None:
        parts.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": pattern is None, **options}))
    tokenizer.pre_tokenizer = _sequence(pre_tokenizers, parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=1500, show_progress=False, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("<mask>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken("  ", normalized=True), AddedToken("\n\t", normalized=False)])
    return tokenizer


def word_piece(lowercase: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[SEP]"]
    tokenizer.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=1500, show_progress=False, special_tokens=specials)
    )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    return tokenizer


def unigram(scheme: str, normalizer: object = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<unk>", "<s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(corpus()[:20], trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def sentencepiece_bpe(prepend: bool) -> Tokenizer:
    """Llama 2's: merges over the whole text, spaces replaced; trained split at spaces, as SentencePiece does."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, special_tokens=specials)
    trained.train_from_iterator(corpus()[1:], trainer)
    tokenizer = Tokenizer(trained.model)
    tokenizer.add_special_tokens(specials[:3])
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


ZOO = {
    "gpt2": byte_level,
    "gpt2-nfc": lambda: byte_level(normalizers.NFC()),
    "roberta": lambda: byte_level(add_prefix_space=True),
    "llama3": lambda: byte_level(pattern=LLAMA3_WORDS),
    "llama3-nfc": lambda: byte_level(normalizers.NFC(), LLAMA3_WORDS),
    "llama3-nfd": lambda: byte_level(normalizers.NFD(), LLAMA3_WORDS),
    "llama3-nfkc-lower": lambda: byte_level(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), LLAMA3_WORDS
    ),
    "cl100k": lambda: byte_level(pattern=CL100K_WORDS),
    "o200k": lambda: byte_level(pattern=O200K_WORDS),
    "digits": lambda: byte_level(first=pre_tokenizers.Digits(individual_digits=True)),
    "bert-uncased": word_piece,
    "bert-cased": lambda: word_piece(lowercase=False),
    "unigram-first": lambda: unigram("first"),
    "unigram-always": lambda: unigram("always", normalizers.NFKC()),
    "llama2": lambda: sentencepiece_bpe(prepend=True),
    "llama2-metaspace": lambda: sentencepiece_bpe(prepend=False),
}


@cache
def definition(name: str) -> str:
    """The tokenizer.json of one of ZOO."""
    return ZOO[name]().to_str()
