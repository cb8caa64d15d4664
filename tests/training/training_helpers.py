"""A tiny model and tiny data for the tests of the training loop."""

import torch

from vlmfast.models.clip import CLIP, CLIPConfig
from vlmfast.training import TensorLoader

PAIRS, VOCABULARY, CONTEXT = 24, 40, 8


def tiny_model(seed: int = 0, *, resnet: bool = False, dropout: float = 0.0, **overrides) -> CLIP:
    torch.manual_seed(seed)
    tower = dict(vision_layers=(1, 1, 1, 1), vision_width=4, vision_patch_size=None) if resnet else dict(
        vision_layers=1, vision_width=16, vision_patch_size=16, vision_heads=2)
    model = CLIP(CLIPConfig(embed_dim=8, image_size=32, vocab_size=VOCABULARY, context_length=CONTEXT, text_width=16,
                            text_heads=2, text_layers=1, **tower, **overrides))
    if dropout:
        model.visual.ln_post = torch.nn.Sequential(model.visual.ln_post, torch.nn.Dropout(dropout))
    return model


def tiny_batch(count: int = PAIRS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, VOCABULARY - 1, (count, CONTEXT), generator=generator)
    tokens[:, -1] = VOCABULARY - 1
    return images, tokens


def tiny_loader(batch_size: int = 8, **options) -> TensorLoader:
    return TensorLoader(*tiny_batch(), batch_size, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), **{"shift": 1, **options})


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"differ: {different}"
