"""CLIPTokenizer against the published one, transformers' one, and a slow one written here."""

import gzip
import html
import importlib.util
import json
import pickle
import random
from pathlib import Path

import ftfy
import pytest
import regex
import torch

from vlmfast.data import CLIPTokenizer, clean_text, load_emoji
from vlmfast.data.bpe import EOT, OPENAI_MERGES, SOT, byte_alphabet

PIECES = [
    *map(chr, range(1, 0x250)),
    *"aaabbb      ''''sstdml&;<>|#0123456789",
    *"éüßİıſK日本語العربية한국🤣👩🏽\u200d\ufe0f\u2028\x1c\x85\xa0\u3000ﬁＡ\ud800",
    *["&amp;", "&lt;", "&amp;lt;", "'ll", "'S", "'RE", "&#28;", "&#x1f;", "â€™", "&nbsp;", "Ã©", "\r\n", "\x1b[31m"],
]


def random_texts(count: int, seed: int = 0, pieces=PIECES) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(pieces, k=chance.randint(0, 24))) for _ in range(count)]


def slow_ids(text: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> list[int]:
    """Byte-pair encoding as the paper states it: apply the best-ranked pair until none is left."""
    rank = {pair: n for n, pair in enumerate(merges)}
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    words = regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", text, regex.IGNORECASE)
    ids = []
    for word in words:
        symbols = [byte_alphabet()[b] for b in word.encode()]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            pairs = [(rank.get(pair, 1 << 30), n) for n, pair in enumerate(zip(symbols, symbols[1:], strict=False))]
            best, _ = min(pairs)
            if best == 1 << 30:
                break
            out, n = [], 0
            while n < len(symbols):
                if n + 1 < len(symbols) and rank.get((symbols[n], symbols[n + 1])) == best:
                    out.append(symbols[n] + symbols[n + 1])
                    n += 2
                else:
                    out.append(symbols[n])
                    n += 1
            symbols = out
        ids += [vocabulary[symbol] for symbol in symbols]
    return ids


@pytest.fixture(scope="module")
def small() -> CLIPTokenizer:
    captions = load_emoji().captions + load_emoji("de").captions[:800] + load_emoji("ja").captions[:300]
    return CLIPTokenizer.train(captions, 1500, context_length=20)


@pytest.fixture(scope="module")
def published_file() -> Path:
    spec = importlib.util.find_spec("open_clip")
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz" if spec else None
    if path is None or not path.is_file():
        pytest.skip("open_clip, which ships the published vocabulary, is not installed")
    return path


@pytest.fixture(scope="module")
def published(published_file) -> CLIPTokenizer:
    return CLIPTokenizer.from_file(published_file)


@pytest.fixture(scope="module")
def open_clip_tokenizer(published_file):
    # by path: importing the package needs torchvision
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", published_file.with_name("tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(published_file))


def test_published_vocabulary_has_its_known_size_and_ids(published):
    assert published.vocab_size == 49408
    assert (published.sot, published.eot) == (49406, 49407)
    assert len(published.merges) == OPENAI_MERGES
    tokens = published("a photo of a cat")
    assert tokens.shape == (1, 77) and tokens.dtype == torch.int64
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert published.encode("hello world!") == [3306, 1002, 256]
    assert published.encode("A  Photo&amp;amp;") == published.encode("a photo &")


@pytest.mark.oracle
def test_ids_equal_open_clip(published, open_clip_tokenizer):
    texts = random_texts(3000) + load_emoji("fr").captions[:300] + load_emoji("ar").captions[:300] + ["x" * 3000]
    for text in texts:
        assert published.encode(text) == open_clip_tokenizer.encode(text), repr(text)


@pytest.mark.oracle
def test_truncation_equals_open_clip(published, open_clip_tokenizer):
    texts = ["", "cat", "a cat " * 40, "dog " * 75, "dog " * 76]
    assert torch.equal(published(texts), open_clip_tokenizer(texts))
    assert torch.equal(published(texts, context_length=9), open_clip_tokenizer(texts, context_length=9))


def test_ids_equal_slow_byte_pair_encoding(small):
    texts = random_texts(1500, seed=1) + load_emoji("it").captions[:200] + load_emoji().captions[:200]
    for text in texts:
        assert small.encode(text) == slow_ids(text, small.vocabulary, small.merges), repr(text)


@pytest.mark.oracle
def test_saved_folder_reads_the_same_in_transformers(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == small.vocab_size
    assert theirs.model_max_length == 20
    assert (theirs.bos_token_id, theirs.eos_token_id) == (small.sot, small.eot)
    texts = [
        "a red apple",
        "MAN in   Motorized wheelchair!!",
        "it's 42 o'clock",
        "日本語 テキスト",
        "Größe, naïve café",
        "👩🏽 woman",
    ]
    texts += load_emoji("ru").captions[:100] + load_emoji("fa").captions[:100]
    for text in texts:
        # their tokenizer skips ftfy and entities, so both get cleaned text
        assert theirs(clean_text(text))["input_ids"] == [small.sot, *small.encode(text), small.eot], text


@pytest.mark.oracle
def test_folder_written_by_transformers_reads_the_same(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    small.save(tmp_path / "ours")
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = CLIPTokenizer.from_file(tmp_path / "theirs")
    assert again == small


def test_save_and_from_file_round_trip(small, tmp_path):
    small.save(tmp_path)
    assert CLIPTokenizer.from_file(tmp_path) == small
    assert CLIPTokenizer.from_file(tmp_path / "vocab.json", tmp_path / "merges.txt") == small
    assert CLIPTokenizer.from_file(tmp_path, context_length=33).context_length == 33
    assert pickle.loads(pickle.dumps(small)) == small
    assert pickle.loads(pickle.dumps(small)).encode("red apple") == small.encode("red apple")


def test_fast_path_of_cleaning_equals_full_cleaning():
    ascii_pieces = [chr(i) for i in range(32, 127)] + ["  ", "&amp", "&amp;", "&lt;b&gt;", "\t", "\n", "\x07"]
    for text in random_texts(3000, seed=2, pieces=ascii_pieces):
        full = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        assert clean_text(text) == regex.sub(r"\s+", " ", full).strip().lower(), repr(text)


def test_cleaning_mends_entities_mojibake_space_and_case():
    assert clean_text("  A&amp;amp;B \n\t caf\u00c3\u00a9 \u3000X ") == "a&b café x"


def test_special_tokens_in_text_are_themselves_as_words(published):
    assert published.encode("a <|endoftext|> b")[1] == published.eot
    assert published.encode("<|StartOfText|>") == [published.sot]
    # inside a run of symbols the pattern does not see them
    assert published.eot not in published.encode("!<|endoftext|>")


def test_training_follows_the_conventions(small):
    vocabulary = small.vocabulary
    assert small.vocab_size == 1500 == len(vocabulary)
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256
    assert (vocabulary[SOT], vocabulary[EOT]) == (1498, 1499) == (small.sot, small.eot)
    assert sorted(vocabulary.values()) == list(range(1500))
    first = next(iter(small.merges))
    assert vocabulary[first[0] + first[1]] == 512
    assert small.encode("skin tone") == [vocabulary["skin</w>"], vocabulary["tone</w>"]]


def test_training_is_deterministic_and_independent_of_order():
    captions = load_emoji().captions[:600]
    again = random.Random(0).sample(captions, len(captions))
    assert CLIPTokenizer.train(captions, 900) == CLIPTokenizer.train(again, 900)


def test_training_picks_the_most_frequent_pair_first():
    merges = CLIPTokenizer.train(["abab ab cab", "xy xy"], 1000).merges
    # ab</w> 4 (abab, ab, cab and the second half of abab counts once), then ties in lexicographic order
    assert merges[0] == ("a", "b</w>")
    assert ("x", "y</w>") in merges
    assert all("q" not in a + b for a, b in merges)


def test_small_corpus_gives_a_smaller_vocabulary():
    tokenizer = CLIPTokenizer.train(["a cat", "a cat"], 5000)
    assert tokenizer.vocab_size < 530
    assert tokenizer.encode("cat") == [tokenizer.vocabulary["cat</w>"]]
    assert CLIPTokenizer.train([], 514).vocab_size == 514


def test_decode_inverts_cleaned_text(small):
    for text in load_emoji("ko").captions[:50] + ["red apple", "naïve café"]:
        words = regex.findall(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", clean_text(text))
        assert small.decode(small.encode(text)) == " ".join(words)
    tokens = small(["red apple", "dog"])
    assert small.decode(tokens) == ["red apple", "dog"]
    assert small.decode(tokens[1]) == "dog"
    assert small.decode([]) == ""
    with pytest.raises(ValueError, match="id 9999 is outside"):
        small.decode([9999])


def test_truncation_keeps_eot_last_and_can_raise(small):
    long = "red " * 50
    tokens = small(["dog", long])
    assert tokens.shape == (2, 20)
    assert tokens[1, 0] == small.sot and tokens[1, -1] == small.eot
    assert tokens.argmax(1).tolist() == [small("dog")[0].tolist().index(small.eot), 19]
    with pytest.raises(ValueError, match=r"text 1 \('red red.*has 52 tokens, context_length is 20"):
        small(["dog", long], truncate=False)
    assert small(["red " * 18], truncate=False)[0, -1] == small.eot
    assert small([]).shape == (0, 20)
    assert small([""])[0].tolist() == [small.sot, small.eot] + [0] * 18


def test_rejects_wrong_arguments(small):
    with pytest.raises(TypeError, match="text 1 is int"):
        small(["a", 3])
    with pytest.raises(ValueError, match="context_length is 1,"):
        small("a", context_length=1)
    with pytest.raises(ValueError, match="vocab_size is 100"):
        CLIPTokenizer.train(["a"], 100)
    with pytest.raises(TypeError, match="captions is one string"):
        CLIPTokenizer.train("a cat", 600)
    with pytest.raises(TypeError, match="text 1 is NoneType"):
        CLIPTokenizer.train(["a", None], 600)


def test_damaged_vocabulary_files_give_clear_errors(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.txt.gz"):
        CLIPTokenizer.from_file(tmp_path / "nothing.txt.gz")
    with pytest.raises(FileNotFoundError, match="neither vocab.json nor tokenizer.json"):
        CLIPTokenizer.from_file(tmp_path)

    archive = gzip.compress(b"#version\n" + b"a b\n" * 5000)
    (tmp_path / "cut.txt.gz").write_bytes(archive[:-10])
    (tmp_path / "noise.txt.gz").write_bytes(b"\x00\x01noise")
    (tmp_path / "three.txt").write_text("#version\na b\na b c\n")
    (tmp_path / "unknown.txt").write_text("#version\nab c\n")
    for name, message in [
        ("cut.txt.gz", "cannot read"),
        ("noise.txt.gz", "cannot read"),
        ("three.txt", "line 3: a merge must be two tokens"),
        ("unknown.txt", "needs 'ab', which has no id"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            CLIPTokenizer.from_file(tmp_path / name)
        assert name in str(error.value)

    small.save(tmp_path)
    for content, message in [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must map tokens"),
        (json.dumps(small.vocabulary | {"a": "7"}), "must map tokens"),
        (json.dumps(small.vocabulary | {"a": 5_000_000}), "each once"),
        (json.dumps({k: v for k, v in small.vocabulary.items() if k != EOT}), "lacks the token '<.endoftext"),
        (json.dumps(small.vocabulary | {SOT: small.eot, EOT: small.sot}), "must be the greatest"),
        (json.dumps(small.vocabulary | {"日本": small.eot, EOT: small.eot + 1}), "no string of byte characters"),
    ]:
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            CLIPTokenizer.from_file(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(ValueError, match="holds no BPE model"):
        CLIPTokenizer.from_file(tmp_path)
