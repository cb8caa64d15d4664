"""Zero-shot classification with a model whose features can be computed by hand."""

import pytest
import torch
import torch.nn.functional as F

from vlmfast.tasks import TEMPLATES, ZeroShotClassifier

WORDS = ("cat", "dog", "red")


class Counting(torch.nn.Module):
    """Text features count words; an image is its own feature."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.calls: list[int] = []
        self.dropout = torch.nn.Dropout(0.5)

    def tokenizer(self, texts):
        return torch.tensor([[1 + text.count(word) for word in WORDS] for text in texts])

    def encode_text(self, tokens):
        self.calls.append(len(tokens))
        return self.dropout(tokens.float())

    def encode_image(self, image):
        return image.flatten(1)


def test_class_embedding_is_the_normalised_mean_of_normalised_prompts():
    model = Counting()
    classifier = ZeroShotClassifier(model, ["cat", "dog"], templates=["{}", "a red {}, a {}"])
    cat = F.normalize(torch.tensor([2.0, 1, 1]), dim=0) + F.normalize(torch.tensor([3.0, 1, 2]), dim=0)
    torch.testing.assert_close(classifier.class_embeddings[0], F.normalize(cat, dim=0))
    torch.testing.assert_close(classifier.class_embeddings.norm(dim=1), torch.ones(2))
    assert model.training, "the model goes back to its mode"


def test_logits_are_scaled_cosines():
    classifier = ZeroShotClassifier(Counting(), ["cat", "dog"], templates=["{}"])
    image = torch.tensor([[2.0, 1.0, 1.0]]) * 5
    cosine = F.cosine_similarity(image, torch.tensor([[2.0, 1, 1], [1.0, 2, 1]]))
    torch.testing.assert_close(classifier(image)[0], cosine * torch.tensor(2.0).exp())


def test_predicts_and_measures():
    classifier = ZeroShotClassifier(Counting(), ["cat", "dog"], templates=TEMPLATES, batch_size=7)
    image = torch.tensor([[5.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 5.0, 1.0]])
    best = classifier.predict(image, k=5)
    assert [row[0][0] for row in best] == ["cat", "dog", "dog"]
    assert sum(p for _, p in best[0]) == pytest.approx(1.0)
    accuracy = classifier.accuracy([(image[:2], torch.tensor([0, 1])), (image[2:], torch.tensor([0]))], ks=(1, 2))
    assert accuracy == {1: pytest.approx(2 / 3), 2: 1.0}
    assert max(classifier.model.calls) == 7


def test_braces_in_class_names_are_text():
    ZeroShotClassifier(Counting(), ["a {weird} name", "{}"])


@pytest.mark.parametrize("classes, options, text", [
    ([], {}, "classes is"), ("cat", {}, "must be a list"), (["cat", "cat"], {}, "cat more than once"),
    (["cat"], {"templates": ["no place"]}, "contain {}"), (["cat"], {"templates": []}, "contain {}"),
])
def test_rejects_bad_classes_and_templates(classes, options, text):
    with pytest.raises(ValueError, match=text):
        ZeroShotClassifier(Counting(), classes, **options)


def test_needs_a_tokenizer_and_images():
    model = Counting()
    classifier = ZeroShotClassifier(model, ["cat"])
    with pytest.raises(ValueError, match="no image"):
        classifier.accuracy([])
    with pytest.raises(ValueError, match="k is 0"):
        classifier.predict(torch.ones(1, 3), k=0)
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        ZeroShotClassifier(model, ["cat"])


def test_templates_have_one_place_each():
    assert all(template.count("{}") == 1 for template in TEMPLATES) and len(set(TEMPLATES)) == len(TEMPLATES)
