"""WordPieceTokenizer against a slow one written here, transformers' BertTokenizer, and damaged files."""

import json
import pickle
import random
import subprocess
import sys

import pytest
import torch

from vlmfast.data import BertTokens, WordPieceTokenizer, load_emoji

PIECES = [*map(chr, range(32, 0x180)), *"aaaeeeooo      ''##..,,??[]", *"日本語한국🤣é\u200d\u2028\ufe0f",
          "[MASK]", "[SEP]", "flag", "face", "woman", "unaffable"]
QUESTIONS = ["Is there a red cat?", "How many dogs are left of the house?", "the house, the cats & the dogs."]


@pytest.fixture(scope="module")
def emoji():
    return load_emoji().captions[::3]


@pytest.fixture(scope="module")
def tokenizer(emoji):
    return WordPieceTokenizer.train([*emoji, *QUESTIONS], 900)


def random_texts(count: int) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices(PIECES, k=chance.randint(0, 30))) for _ in range(count)]


def slow_pieces(word: str, vocabulary: dict[str, int]) -> list[str]:
    """Greedy longest match from the left, as the paper states it."""
    found, start = [], 0
    while start < len(word):
        ends = [end for end in range(len(word), start, -1) if ("##" if start else "") + word[start:end] in vocabulary]
        if not ends:
            return ["[UNK]"]
        found.append(("##" if start else "") + word[start : ends[0]])
        start = ends[0]
    return found


def test_words_become_their_longest_pieces(tokenizer, emoji):
    words = sorted({word for text in emoji for word in text.lower().split() if word.isalpha() and word.isascii()})
    assert len(words) > 500
    several = 0
    for word in [*words, "zyzzyva", "unknown☃word"]:
        pieces = slow_pieces(word, tokenizer.vocabulary)
        assert tokenizer.tokens(tokenizer.encode(word)) == pieces, word
        several += len(pieces) > 1
    assert several > 50


def test_a_batch_is_padded_with_its_segments(tokenizer):
    batch = tokenizer(["a red cat", "dogs"], ["the house", "a, b?"])
    assert isinstance(batch, BertTokens) and batch.input_ids.dtype == batch.token_type_ids.dtype == torch.int64
    rows = []
    for text, pair in (("a red cat", "the house"), ("dogs", "a, b?")):
        a, b = tokenizer.encode(text), tokenizer.encode(pair)
        rows.append(([tokenizer.cls, *a, tokenizer.sep, *b, tokenizer.sep], [0] * (len(a) + 2) + [1] * (len(b) + 1)))
    longest = max(len(ids) for ids, _ in rows)
    for i, (ids, types) in enumerate(rows):
        rest = longest - len(ids)
        assert batch.input_ids[i].tolist() == ids + [tokenizer.pad] * rest
        assert batch.token_type_ids[i].tolist() == types + [0] * rest
        assert batch.attention_mask[i].tolist() == [True] * len(ids) + [False] * rest
        assert batch.lengths[i] == len(ids)
    single = tokenizer("a red cat")
    assert single.input_ids.tolist() == [[tokenizer.cls, *tokenizer.encode("a red cat"), tokenizer.sep]]
    assert not single.token_type_ids.any()


def test_empty_inputs(tokenizer):
    assert tokenizer("").input_ids.tolist() == [[tokenizer.cls, tokenizer.sep]]
    assert tokenizer([]).input_ids.shape == (0, 0) and tokenizer([]).lengths.shape == (0,)


def test_the_longer_segment_is_cut(tokenizer):
    def one_by_one(a, b, room):
        while len(a) + len(b) > room:
            (a if len(a) > len(b) else b).pop()
        return [tokenizer.cls, *a, tokenizer.sep, *b, tokenizer.sep]

    letters = "a b c d e f g h i j"
    for left, right in ((9, 2), (2, 9), (6, 6), (3, 3), (0, 8), (8, 0), (5, 6)):
        text, pair = letters[: 2 * left], letters[: 2 * right]
        for length in range(3, 16):
            ids = tokenizer(text, pair, max_length=length).input_ids[0].tolist()
            assert ids == one_by_one(tokenizer.encode(text), tokenizer.encode(pair), length - 3), (left, right, length)
    assert tokenizer(letters, max_length=5).input_ids[0].tolist() == \
        [tokenizer.cls, *tokenizer.encode("a b c"), tokenizer.sep]
    with pytest.raises(ValueError, match="text 0 has 12 tokens, max_length is 11"):
        tokenizer(letters, max_length=11, truncate=False)
    assert tokenizer(letters, max_length=12, truncate=False).lengths.tolist() == [12]


def test_special_tokens_in_a_text_are_those_tokens(tokenizer):
    ids = tokenizer.encode("a [MASK] cat [SEP] dogs")
    assert ids.count(tokenizer.mask) == 1 and ids.count(tokenizer.sep) == 1
    assert tokenizer.tokens(ids)[1] == "[MASK]"


def test_decode_drops_special_tokens(tokenizer):
    batch = tokenizer(["Is there a RED cat?", "dogs"])
    assert tokenizer.decode(batch.input_ids) == ["is there a red cat?", "dogs"]
    assert tokenizer.decode(batch.input_ids[1]) == "dogs"
    assert tokenizer.tokens(batch.input_ids[1])[-1] == "[PAD]"
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {wrong} is outside 0 ... {tokenizer.vocab_size - 1}"):
            tokenizer.decode([wrong])
        with pytest.raises(ValueError, match="outside"):
            tokenizer.tokens([wrong])


def test_case_and_accents_follow_the_settings():
    texts = ["Café Niño CAFÉ niño"] * 3
    lower = WordPieceTokenizer.train(texts, 60)
    assert "cafe" in lower.vocabulary and lower.encode("CAFÉ") == lower.encode("cafe") == [lower.vocabulary["cafe"]]
    cased = WordPieceTokenizer.train(texts, 80, lowercase=False)
    assert "Café" in cased.vocabulary and cased.encode("Café") != cased.encode("café")
    accents = WordPieceTokenizer(cased.vocabulary, lowercase=True, strip_accents=False)
    assert accents.tokens(accents.encode("NIÑO")) == ["niño"]


def test_training_does_not_depend_on_order_or_process(emoji):
    tokenizer = WordPieceTokenizer.train(emoji, 500)
    assert tokenizer.vocab_size == 500
    assert WordPieceTokenizer.train(iter(emoji[::-1]), 500) == tokenizer
    code = "import sys, json; from vlmfast.data import WordPieceTokenizer as W; " \
           "print(json.dumps(W.train(json.load(sys.stdin), 500).vocabulary))"
    runs = [subprocess.run([sys.executable, "-c", code], input=json.dumps(emoji), capture_output=True, text=True,
                           check=True).stdout for _ in range(2)]
    assert [json.loads(out) for out in runs] == [tokenizer.vocabulary] * 2
    assert tokenizer.tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_training_finds_no_unknown_word_in_its_own_texts(tokenizer, emoji):
    assert all(tokenizer.unk not in tokenizer.encode(text) for text in emoji)
    with pytest.raises(ValueError, match="vocab_size is 20, must be at least"):
        WordPieceTokenizer.train(emoji, 20)
    with pytest.raises(TypeError, match="texts is one string"):
        WordPieceTokenizer.train("a cat", 100)
    with pytest.raises(TypeError, match="text 1 is int"):
        WordPieceTokenizer.train(["a", 3], 100)


def test_files_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    assert WordPieceTokenizer.from_file(tmp_path / "new") == tokenizer
    assert WordPieceTokenizer.from_file(tmp_path / "new" / "vocab.txt") == tokenizer
    cased = WordPieceTokenizer(tokenizer.vocabulary, lowercase=False, strip_accents=True, chinese_characters=False,
                               max_length=40)
    cased.save(tmp_path / "cased")
    assert WordPieceTokenizer.from_file(tmp_path / "cased") == cased != tokenizer
    assert WordPieceTokenizer.from_file(tmp_path / "cased", max_length=9).max_length == 9
    assert pickle.loads(pickle.dumps(cased)) == cased
    (tmp_path / "cased" / "tokenizer_config.json").unlink()
    assert WordPieceTokenizer.from_file(tmp_path / "cased").lowercase is True


@pytest.mark.oracle
@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_reads_what_is_saved_and_the_other_way(tokenizer, tmp_path, lowercase):
    transformers = pytest.importorskip("transformers")
    ours = WordPieceTokenizer(tokenizer.vocabulary, lowercase=lowercase, max_length=77)
    ours.save(tmp_path / "ours")
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs.model_max_length == 77
    texts = [*random_texts(400), *QUESTIONS, "Ünïcode \u00a0 İstanbul"]
    pairs = [text or "a" for text in texts[::-1]]  # theirs takes an empty pair for none
    batch = ours(texts, pairs, max_length=500)
    for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        wanted = theirs(text, pair)
        length = int(batch.lengths[i])
        assert batch.input_ids[i, :length].tolist() == wanted["input_ids"], (text, pair)
        assert batch.token_type_ids[i, :length].tolist() == wanted["token_type_ids"]
    theirs.save_pretrained(tmp_path / "theirs")
    assert WordPieceTokenizer.from_file(tmp_path / "theirs") == ours
    again = WordPieceTokenizer.from_file(tmp_path / "theirs" / "tokenizer.json")
    assert (again.vocabulary, again.lowercase) == (ours.vocabulary, lowercase)


@pytest.mark.parametrize("name, content, text", [
    ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", r"vocab.txt lacks \[MASK\]"),
    ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", "line 7 repeats 'a'"),
    ("vocab.txt", b"\xff\xfe[PAD]", "is not UTF-8"),
    ("vocab.txt", "", r"lacks \[PAD\]"),
    ("tokenizer.json", "{", "is not JSON"),
    ("tokenizer.json", "[1]", "holds a list, must be an object"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}}}', "holds no WordPiece model"),
    ("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": {"[PAD]": 1}}}', "must have ids 0 ... 0"),
    ("tokenizer.json", '{"model": {"vocab": {"[PAD]": "x"}}}', "must map tokens to integer ids"),
    ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "continuing_subword_prefix": "@"}}', "continues words with '@'"),
])
def test_damaged_files_are_refused(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=text):
        WordPieceTokenizer.from_file(tmp_path)


def test_missing_files_and_wrong_arguments(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither vocab.txt nor tokenizer.json"):
        WordPieceTokenizer.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        WordPieceTokenizer.from_file(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match="pairs has 1 entries, texts has 2"):
        tokenizer(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="text 1 is int, must be str"):
        tokenizer(["a", 7])
    with pytest.raises(TypeError, match="pair 0 is NoneType"):
        tokenizer(["a"], [None])
    for length in (1, 2.5, True):
        with pytest.raises(ValueError, match="max_length is"):
            tokenizer("a", max_length=length)
    with pytest.raises(ValueError, match="max_length is 2, must be an integer of at least 3"):
        tokenizer("a", "b", max_length=2)
