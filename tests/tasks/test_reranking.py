"""A dual encoder's shortlist in the order of a cross-encoder."""

import pytest
import torch
from tasks.every_model import PHOTOS, build, options
from tasks.pair_helpers import PICTURES, TEXTS, close
from tasks.test_every_pair import clip

from vlmfast.tasks import CrossEncoderRetriever, Reranker, Retriever, recall_of_scores, rerank_scores, with_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(PHOTOS):
        image.save(path / f"img{i}.png")
    return path


@pytest.mark.parametrize("kind", ["UNITER", "PixelBERT"])
def test_the_shortlist_is_put_in_the_cross_encoders_order(folder, kind):
    model = with_head(build(kind), "retrieval")
    cross, dual = CrossEncoderRetriever(model, **options(kind, model)), Retriever(clip()).add(folder)
    regions = {one.image_id: one for one in PICTURES} if kind == "UNITER" else None
    short = [match.path for match in dual.search(TEXTS[0], 3)]
    given = [regions[path.stem] if regions else path for path in short]
    scores = cross.score(TEXTS[0], given)[0]
    found = Reranker(dual, cross, regions, shortlist=3).search(TEXTS[0], top=2)
    order = scores.argsort(descending=True).tolist()[:2]
    assert [one.path for one in found] == [short[i] for i in order] and [one.rank for one in found] == order
    close([one.score for one in found], scores[order])
    close([one.probability for one in found], scores[order].sigmoid())
    if kind == "UNITER":
        by_function = Reranker(dual, cross, lambda path: regions[path.stem], shortlist=3).search(TEXTS[0], top=2)
        assert by_function == found
        with pytest.raises(ValueError, match="pictures is None, must be the regions for a UNITER"):
            Reranker(dual, cross)
        with pytest.raises(KeyError, match="pictures has no 'img"):
            Reranker(dual, cross, {}).search(TEXTS[0])
    with pytest.raises(ValueError, match="shortlist is 0"):
        Reranker(dual, cross, regions, shortlist=0)


def test_reranked_scores_change_the_order_of_the_shortlist_only():
    torch.manual_seed(0)
    scores, better = torch.randn(6, 9), torch.randn(6, 9) * 100
    found = rerank_scores(scores, lambda row, columns: better[row, columns], shortlist=4)
    for row in range(6):
        best = scores[row].topk(4).indices
        order = found[row].argsort(descending=True)
        assert order[:4].tolist() == best[better[row, best].argsort(descending=True)].tolist()
        assert order[4:].tolist() == scores[row].argsort(descending=True)[4:].tolist()
    truth = torch.arange(6)
    perfect = rerank_scores(scores, lambda row, columns: (torch.tensor(columns) == row).float(), shortlist=9)
    ids = {"text_ids": truth, "image_ids": torch.arange(9)}
    assert recall_of_scores(perfect, (1,), **ids).text_to_image[1] == 1.0
    assert recall_of_scores(scores, (1,), **ids).text_to_image[1] < 1.0
    with pytest.raises(ValueError, match=r"scores is \[9\] and shortlist 4, must be \[T, I\] and at least 1"):
        rerank_scores(scores[0].reshape(9), None, 4)
    with pytest.raises(ValueError, match=r"cross gives \[1\], must be \[4\]"):
        rerank_scores(scores, lambda row, columns: [1.0], 4)
