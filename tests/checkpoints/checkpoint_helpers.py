"""Small CLIP models for the checkpoint tests."""

import torch

from vlmfast import models

SIZES = dict(embed_dim=24, vocab_size=99, context_length=12, text_width=32, text_heads=4, text_layers=2)


def tiny_model(tower: str = "vit", **overrides):
    """Small CLIP whose every tensor, the zero-initialised ones too, carries noise."""
    vision = dict(image_size=32, vision_width=48, vision_heads=4, vision_layers=2, vision_patch_size=8)
    if tower == "resnet":
        vision = dict(image_size=64, vision_width=4, vision_heads=2, vision_layers=(1, 2, 1, 1), vision_patch_size=None)
    model = models.create("clip-tiny", **{**SIZES, **vision, **overrides}).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point() and not key.startswith("logit"):
                value.add_(torch.randn_like(value), alpha=0.1)
                if key.endswith("running_var"):
                    value.abs_()
    return model


def inputs(model, batch: int = 3):
    size, length = model.config.image_size, model.config.context_length
    text = torch.randint(model.config.vocab_size - 1, (batch, length))
    text[:, length // 2] = model.config.vocab_size - 1
    return torch.randn(batch, 3, size, size), text


def assert_same_model(a, b):
    """Equal configs, equal keys, bit-equal tensors of equal dtype."""
    assert a.config == b.config
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key
