"""GPT-2's byte-pair encoding as GLIDE uses it."""

import gzip
import json
import random

import pytest
import torch

from vlmfast.data.bpe import byte_alphabet
from vlmfast.data.gpt2_tokenizer import END, GPT2Tokenizer, has_gpt2_vocabulary

CAPTIONS = ["a red circle on a blue square", "a blue circle", "the red square isn't a circle", "two naïve cafés, 42 km",
            "red, red and red!"] * 3
TEXTS = ["", " ", "a red circle", "A Red  CIRCLE's\n\ttest!!", "we'll DON'T they're", "日本語 ①² ½ x3",
         "👩‍🚀 naïve café",
         "<|endoftext|> x", "a\u00a0b\u200bc \u2028 d", "İstanbul ß ẞ ſ", "  trailing   "]


@pytest.fixture(scope="module")
def tokenizer():
    return GPT2Tokenizer.train(CAPTIONS, 320)


def naive_ids(tokenizer, word: str) -> list[int]:
    """The best-ranked pair is merged everywhere, again and again."""
    parts = [byte_alphabet()[byte] for byte in word.encode("utf-8")]
    ranks = {merge: rank for rank, merge in enumerate(tokenizer.merges)}
    while known := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
        best, joined = min(known, key=ranks.get), []
        for part in parts:
            if joined and (joined[-1], part) == best:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return [tokenizer.vocabulary[part] for part in parts]


def test_words_are_merged_by_rank(tokenizer):
    words = ["red", " circle", "'s", " square", "!!", " 42", "naïve", "日本語", " the"]
    for word in words:
        assert tokenizer.encode(word) == naive_ids(tokenizer, word), word
    assert tokenizer.encode("a red circle") == [i for word in ("a", " red", " circle")
                                                for i in naive_ids(tokenizer, word)]


def test_a_space_belongs_to_the_word_behind_it():
    tokens = {token: i for i, token in enumerate([*byte_alphabet().values(), "Ġa", "aa", "Ġ4", "Ġ!", "4a", END])}
    tokenizer = GPT2Tokenizer(tokens, [("Ġ", "a"), ("a", "a"), ("Ġ", "4"), ("Ġ", "!"), ("4", "a")])
    assert tokenizer.encode("a a") == [tokens["a"], tokens["Ġa"]]
    assert tokenizer.encode("aa  a") == [tokens["aa"], tokens["Ġ"], tokens["Ġa"]]
    assert tokenizer.encode("a 4 !") == [tokens["a"], tokens["Ġ4"], tokens["Ġ!"]]
    assert tokenizer.encode("4a") == [tokens["4"], tokens["a"]]  # digits and letters are words of their own
    assert tokenizer.encode("A") == tokenizer.encode("a") and tokenizer.end_token == 261
    assert tokenizer.encode(END) == [tokens[c] for c in END]  # spelled out it is text like any other


@pytest.mark.oracle
def test_ids_are_those_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    rng = random.Random(0)
    alphabet = [*map(chr, range(32, 127)), *"äßéΩ日本①½👩\u200d\u00a0\n\t", *" " * 20]
    texts = [*TEXTS, *("".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(500))]
    texts.remove("<|endoftext|> x")  # transformers reads specials in texts, the public code of GLIDE does not
    for text in texts:
        assert tokenizer.encode(text) == theirs.encode(text.lower()), repr(text)
        assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(theirs.encode(text.lower()),
                                                                          clean_up_tokenization_spaces=False)


def test_texts_come_back_in_lower_case(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text.lower()
    tokens, _ = tokenizer.tokens_and_mask(["a red circle", "blue"], 16)
    assert tokenizer.decode(tokens) == ["a red circle", "blue"]
    with pytest.raises(ValueError, match="id 9999 is outside"):
        tokenizer.decode([9999])


def test_padding_is_the_end_token_and_the_mask_false_there(tokenizer):
    ids = tokenizer.encode("a red circle")
    tokens, mask = tokenizer.tokens_and_mask(["a red circle", ""], 12)
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool and tokens.shape == mask.shape == (2, 12)
    assert tokens[0].tolist() == ids + [tokenizer.end_token] * (12 - len(ids))
    assert mask[0].tolist() == [i < len(ids) for i in range(12)]
    assert (tokens[1] == tokenizer.end_token).all() and not mask[1].any()
    one, _ = tokenizer.tokens_and_mask("a red circle", 12)
    assert torch.equal(one, tokens[:1])


def test_long_texts_raise_unless_they_may_be_cut(tokenizer):
    ids = tokenizer.encode("a red circle on a blue square")
    assert len(ids) > 3
    with pytest.raises(ValueError, match=rf"text 1 \('a red circle on.*has {len(ids)} tokens, context is 3"):
        tokenizer.tokens_and_mask(["a", "a red circle on a blue square"], 3)
    tokens, mask = tokenizer.tokens_and_mask("a red circle on a blue square", 3, truncate=True)
    assert tokens[0].tolist() == ids[:3] and mask.all()
    exact, mask = tokenizer.tokens_and_mask("a red circle on a blue square", len(ids))
    assert exact[0].tolist() == ids and mask.all()


def test_training_does_not_depend_on_order(tokenizer):
    shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
    assert GPT2Tokenizer.train(shuffled, 320) == tokenizer
    assert 257 < tokenizer.vocab_size <= 320 and tokenizer.vocabulary[END] == tokenizer.vocab_size - 1
    assert len(tokenizer.encode(" circle")) == 1
    assert GPT2Tokenizer.train([], 400).vocab_size == 257
    assert GPT2Tokenizer.train(CAPTIONS, 257).merges == []


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"),
                                   ("encoder.json.gz", "vocab.bpe.gz")])
def test_every_layout_of_vocabulary_files_is_read(tokenizer, tmp_path, names):
    tokenizer.save(tmp_path / "own")
    (tmp_path / "public").mkdir()
    for own, public in zip(("vocab.json", "merges.txt"), names, strict=True):
        data = (tmp_path / "own" / own).read_bytes()
        (tmp_path / "public" / public).write_bytes(gzip.compress(data) if public.endswith(".gz") else data)
    assert has_gpt2_vocabulary(tmp_path / "public") and not has_gpt2_vocabulary(tmp_path)
    first, second = (tmp_path / "public" / name for name in names)
    for found in (GPT2Tokenizer.from_file(tmp_path / "public"), GPT2Tokenizer.from_file(first),
                  GPT2Tokenizer.from_file(first, second)):
        assert found == tokenizer


def save_with(folder, tokenizer, vocabulary=None, merges=None):
    tokenizer.save(folder)
    if vocabulary is not None:
        (folder / "vocab.json").write_text(vocabulary)
    if merges is not None:
        (folder / "merges.txt").write_text(merges)
    return folder


@pytest.mark.parametrize("vocabulary, merges, message", [
    ("{", None, "is not JSON"),
    ("[" * 100_000, None, "is not JSON"),
    ("[1]", None, "holds a JSON list, must be an object"),
    ("{}", None, "must map tokens to integer ids"),
    ('{"a": "b"}', None, "must map tokens to integer ids"),
    ('{"a": 0, "b": 0}', None, "ids must be 0 ... 1, each once"),
    ('{"<|endoftext|>": 0, "a": 1}', None, "has id 0, must be the greatest, 1"),
    ('{"a": 0, "<|endoftext|>": 1}', None, "lacks the bytes"),
    (None, "a b c\n", "line 1: a merge must be two tokens"),
    (None, "#version: 0.2\nq z\n", "merge q z needs 'qz', which has no id"),
])
def test_damaged_vocabularies_are_refused(tokenizer, tmp_path, vocabulary, merges, message):
    with pytest.raises(ValueError, match=message):
        GPT2Tokenizer.from_file(save_with(tmp_path, tokenizer, vocabulary, merges))


def test_unreadable_files_are_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="has none of vocab.json, encoder.json"):
        GPT2Tokenizer.from_file(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no file .*merges.txt"):
        GPT2Tokenizer.from_file(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read .*merges.txt"):
        GPT2Tokenizer.from_file(tmp_path)
    (tmp_path / "encoder.json.gz").write_bytes(gzip.compress(b"{}" * 100)[:-9])
    with pytest.raises(ValueError, match="cannot read .*encoder.json.gz"):
        GPT2Tokenizer.from_file(tmp_path / "encoder.json.gz")
    strange = {**tokenizer.vocabulary, "日": tokenizer.end_token, END: tokenizer.vocab_size}
    with pytest.raises(ValueError, match="token '日' is no string of byte characters"):
        GPT2Tokenizer.from_file(save_with(tmp_path, tokenizer, json.dumps(strange)))


def test_wrong_arguments_are_named(tokenizer):
    with pytest.raises(TypeError, match="a text is a int"):
        tokenizer.encode(3)
    with pytest.raises(ValueError, match="context is 0, must be a positive integer"):
        tokenizer.tokens_and_mask("a", 0)
    with pytest.raises(ValueError, match="vocab_size is 256, must be an integer of at least 257"):
        GPT2Tokenizer.train(CAPTIONS, 256)
    with pytest.raises(TypeError, match="captions is one string"):
        GPT2Tokenizer.train("a red circle", 300)
    with pytest.raises(TypeError, match="a text is a int"):
        GPT2Tokenizer.train(["a", 3], 300)
