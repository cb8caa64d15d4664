"""A small CLIP trained from nothing on a few thousand pictures, shared by the retrieval and affect runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfast.data import CLIPTokenizer, ImagePreprocess
from vlmfast.models.clip import CLIP, CLIPConfig
from vlmfast.training import TensorLoader, TrainConfig, Trainer

SIZE = 32


def train_clip(images: Tensor, texts: Sequence[str], epochs: int, seed: int, progress: bool) -> CLIP:
    """CLIP of half a million parameters on images [N, 3, 32, 32] uint8 and their texts, in evaluation mode."""
    tokenizer = CLIPTokenizer.train(texts, vocab_size=2000, context_length=32)
    mean = (images.float().mean((0, 2, 3)) / 255).tolist()
    std = (images.float().std((0, 2, 3)) / 255).tolist()
    torch.manual_seed(seed)
    model = CLIP(CLIPConfig(
        embed_dim=128, image_size=SIZE, vision_layers=(1, 1, 1, 1), vision_width=12, vision_patch_size=None,
        vision_heads=6, context_length=32, vocab_size=tokenizer.vocab_size, text_width=96, text_heads=3, text_layers=2,
        image_mean=tuple(mean), image_std=tuple(std),
    ))  # fmt: skip
    model.tokenizer = tokenizer
    model.preprocess = ImagePreprocess(SIZE, tuple(mean), tuple(std), resize_mode="longest", fill_color=255)
    loader = TensorLoader(images, tokenizer(texts), min(256, len(images)), mean, std, shift=2, seed=seed)
    config = TrainConfig(epochs=epochs, lr=2e-3, weight_decay=0.1, label_smoothing=0.1, seed=seed)
    Trainer(model, loader, config, device="cpu", progress=progress).run()
    return model.eval()
