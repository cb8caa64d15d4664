"""Small two-stream models with a vocabulary, region features, and the models' inputs written out by hand."""

import torch
from models.two_stream_helpers import tiny_lxmert, tiny_vilbert

from vlmfast.data import Regions, WordPieceTokenizer

TEXTS = ["is there a red cat?", "how many dogs are there?", "what color is the house", "the cat is left of the dog"]
ANSWERS = [f"answer {i}" for i in range(17)]
GQA_ANSWERS = [f"gqa {i}" for i in range(9)]
TOKENIZER = WordPieceTokenizer.train(TEXTS * 2, 60)


def vilbert(std=0.15, **overrides):
    model = tiny_vilbert(std, **overrides)
    model.tokenizer = TOKENIZER
    return model


def lxmert(std=0.15, **overrides):
    model = tiny_lxmert(std, **overrides)
    model.tokenizer = TOKENIZER
    return model


def both(**overrides):
    """(model, its answers) of either kind."""
    return [(vilbert(**overrides), ANSWERS), (lxmert(**overrides), GQA_ANSWERS)]


def picture(seed: int, count: int = 5, width: float = 320, height: float = 200, dim: int = 20) -> Regions:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 0.5
    size = torch.rand(count, 2, generator=generator) * 0.5
    boxes = torch.cat([corner, corner + size], 1) * torch.tensor([width, height] * 2)
    features, classes = torch.randn(count, dim, generator=generator), torch.randint(5, (count,), generator=generator)
    return Regions(f"img{seed}", features, boxes, width, height, classes=classes,
                   confidences=torch.rand(count, generator=generator))


PICTURES = [picture(0), picture(1, 3), picture(2, 8), picture(3, 4, 100, 300)]


@torch.no_grad()
def by_hand(model, text: str, regions: Regions, pair: str | None = None, task_id: int = 0):
    """The model's output for one example: nothing padded, nothing shared with the package's own input code."""
    ids = [TOKENIZER.cls, *TOKENIZER.encode(text), TOKENIZER.sep]
    types = [0] * len(ids)
    if pair is not None:
        rest = [*TOKENIZER.encode(pair), TOKENIZER.sep]
        ids, types = ids + rest, types + [1] * len(rest)
    features = regions.features
    loc = regions.boxes / torch.tensor([regions.width, regions.height, regions.width, regions.height])
    extra = {}
    if hasattr(model.config, "v_feature_size"):
        area = (loc[:, 2] - loc[:, 0]) * (loc[:, 3] - loc[:, 1])
        loc = torch.cat([torch.tensor([[0, 0, 1, 1, 1.0]]), torch.cat([loc, area[:, None]], 1)])
        features = torch.cat([features.mean(0, keepdim=True), features])
        if model.config.task_specific_tokens:
            extra["task_ids"] = torch.tensor([task_id])
    return model(torch.tensor([ids]), features[None], loc[None], torch.tensor([types]), output_attentions=True, **extra)


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=0, atol=atol)
