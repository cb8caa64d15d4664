"""The paired bootstrap."""

import numpy as np
import pytest

from vlmfast.tasks import BleuCounts, bleu, paired_bootstrap


def mean_of(values):
    return lambda drawn: float(values[drawn].mean())


def test_standard_error_of_a_mean_is_the_formula():
    generator = np.random.default_rng(3)
    a, b = generator.normal(1.0, 1.0, 400), generator.normal(0.5, 1.0, 400)
    found = paired_bootstrap(mean_of(a), mean_of(b), 400, samples=2000)
    difference = a - b
    assert found.value == pytest.approx(difference.mean())
    assert found.standard_error == pytest.approx(difference.std(ddof=1) / 20, rel=0.06)
    assert found.errors_above == pytest.approx(found.value / found.standard_error) and found.share_above > 0.99
    # the same examples: what both share cancels
    shared = generator.normal(0, 30, 400)
    paired = paired_bootstrap(mean_of(a + shared), mean_of(b + shared), 400, samples=2000)
    assert paired.standard_error == pytest.approx(found.standard_error, rel=1e-6)


def test_clusters_that_agree_count_once():
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 30).repeat(10)
    plain = paired_bootstrap(mean_of(values), mean_of(values * 0), 300)
    whole = paired_bootstrap(mean_of(values), mean_of(values * 0), 300, clusters=np.arange(30).repeat(10))
    assert whole.standard_error / plain.standard_error == pytest.approx(10**0.5, rel=0.15)


def test_bleu_of_counts_is_sacrebleus():
    pytest.importorskip("sacrebleu")
    candidates = ["the cat sat on the mat", "a dog", "birds fly over the big green hill", "Yes."]
    references = ["the cat is on the mat", "a big dog", "birds fly over a big green hill", "yes."]
    for options in ({}, {"lowercase": True}):
        counts = BleuCounts(candidates, references, **options)
        for drawn in ([0, 1, 2, 3], [2, 2, 0], [0]):
            wanted = bleu([candidates[i] for i in drawn], [references[i] for i in drawn], **options)
            assert counts(np.array(drawn)) == pytest.approx(wanted.value, abs=1e-9)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="there are 1 examples or clusters"):
        paired_bootstrap(mean_of(np.ones(1)), mean_of(np.ones(1)), 1)
    with pytest.raises(ValueError, match="clusters has 2 entries, there are 3 examples"):
        paired_bootstrap(mean_of(np.ones(3)), mean_of(np.ones(3)), 3, clusters=[0, 1])
