"""Pictures from texts with DALL-E and DALL-E mini: cached decoding, guidance, priming and re-ranking by a CLIP.

Papers: DALL-E (Ramesh et al. 2021, arXiv:2102.12092), sec. 2.6 (re-ranking) and app. D (completing a picture);
classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) as open implementations apply it to logits.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import DALLE, DALLEMini
from ..ops import sample_tokens

PRIME_SHARE = 0.4375  # 14 of 32 rows, as the paper's figures have it


class Generated(NamedTuple):
    """Pictures of one prompt, best first where a CLIP ranked them.

    Attributes:
        images: [N, 3, H, W] float32 in 0 ... 1.
        codes: int64 [N, h, w].
        scores: [N] cosine similarity of picture and prompt, or None.
    """

    images: Tensor
    codes: Tensor
    scores: Tensor | None


def encode_prompts(model: nn.Module, prompts: str | Sequence[str], truncate: bool = False) -> Tensor:
    """Prompts to the token ids that the model's `forward` takes, int64 [B, T].

    Args:
        truncate: cut what is longer than the text context, as for captions in training.

    Raises:
        ValueError: the model has no tokenizer, or a prompt is longer than the text context; the message counts tokens.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if model.tokenizer is None:
        raise ValueError("encode_prompts: the model has no tokenizer; set model.tokenizer")
    config, longest = model.config, model.config.text_seq_len
    start, end = ([config.bos_token_id], [config.eos_token_id]) if isinstance(model, DALLEMini) else ([], [])
    offset, padding = (config.token_offset, 0) if isinstance(model, DALLE) else (0, config.pad_token_id)
    tokens = torch.full((len(prompts), longest), padding, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids = [token + offset for token in model.tokenizer.encode(prompt)]
        room = longest - len(start) - len(end)
        if len(ids) > room and not truncate:
            raise ValueError(f"encode_prompts: the prompt {prompt[:60]!r} has {len(ids) + longest - room} tokens, the "
                             f"text context is {longest}; shorten it")
        row = [*start, *ids[:room], *end]
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens


@torch.no_grad()
def generate_codes(model: nn.Module, text: Tensor, *, images: int = 1, guidance_scale: float = 1.0,
                   temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, prime: Tensor | None = None,
                   seed: int | None = None, on_step: Callable[[int], object] | None = None) -> Tensor:
    """Draws the codes of pictures, one after the other for all pictures at once.

    Args:
        model: a `DALLE` or `DALLEMini`; put it in eval mode first.
        text: [B, T] token ids (see `encode_prompts`).
        images: of each text.
        guidance_scale: s in u + s (c - u), u the scores of the empty prompt; 1 runs the model on the prompt alone.
        temperature, top_k, top_p: see `vlmfast.ops.sample_tokens`.
        prime: [n], [1, n] or [B, n] codes that every picture (of a text) starts with, row by row.
        seed: pictures of the same seed and settings are equal; None draws one from torch's generator.
        on_step: called with the number of pictures after each code.

    Returns:
        int64 [B images, h, w], the pictures of a text side by side.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    if images < 1:
        raise ValueError(f"generate_codes: images is {images}, must be at least 1")
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    count, guided = len(text) * images, guidance_scale != 1
    if prime is None:
        prime = text.new_zeros(len(text), 0)
    prime = (prime[None] if prime.ndim == 1 else prime).to(text.device).expand(len(text), -1)
    if guided:
        null = model.null_text(len(text)).to(text)
        missing = null.shape[1] - text.shape[1]
        if missing < 0:
            raise ValueError(f"generate_codes: text has {text.shape[1]} tokens, the text context is {null.shape[1]}")
        padding = 0 if isinstance(model, DALLE) else model.config.pad_token_id
        text, start = torch.cat([F.pad(text, (0, missing), value=padding), null]), prime.repeat(2, 1)
    else:
        start = prime
    logits, state = model.prefill(text, start, copies=images)
    total = model.config.image_seq_len
    codes = prime.new_empty(count, total)
    codes[:, : prime.shape[1]] = prime.repeat_interleave(images, 0)
    for position in range(prime.shape[1], total):
        drawn = sample_tokens(logits[:count], unconditional=logits[count:] if guided else None,
                              guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p,
                              seed=seed, offset=position * count)
        codes[:, position] = drawn
        if on_step is not None:
            on_step(count)
        if position + 1 < total:
            logits = model.step(drawn.repeat(2) if guided else drawn, state)
    return codes.view(count, *model.image_shape)


def prime_codes(model: nn.Module, image: Tensor, share: float = PRIME_SHARE) -> Tensor:
    """The first `share` of an image's codes, [B, n], to go on from.

    Args:
        image: [B, 3, H, W] in 0 ... 1, of the size that gives the model's grid of codes.

    Raises:
        ValueError: the model has no discrete VAE, the image has another size, or share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"prime_codes: share is {share}, must be in [0, 1)")
    codes = _vae(model).encode(image)
    if tuple(codes.shape[1:]) != model.image_shape:
        factor = model.vae.downsample
        side = " x ".join(str(n * factor) for n in model.image_shape)
        raise ValueError(f"prime_codes: image is {image.shape[-2]} x {image.shape[-1]} pixels, must be {side}")
    return codes.flatten(1)[:, : int(share * model.config.image_seq_len)]


@torch.no_grad()
def generate(model: nn.Module, prompt: str, *, images: int = 1, batch_size: int = 16, rerank: nn.Module | None = None,
             progress: bool = True, seed: int | None = None, **options) -> Generated:
    """Pictures of a prompt.

    Args:
        model: a `DALLE` or `DALLEMini` with `tokenizer` and `vae`, in eval mode.
        images: how many.
        batch_size: drawn at a time.
        rerank: a CLIP with `tokenizer`; sorts the pictures by its similarity to the prompt.
        progress: show a progress bar.
        seed: of the draws.
        options: guidance_scale, temperature, top_k, top_p and prime of `generate_codes`.

    Raises:
        ValueError: the prompt is too long, something is missing, or an argument is out of range.
    """
    from tqdm.auto import tqdm

    vae, device = _vae(model), next(model.parameters()).device
    text = encode_prompts(model, prompt).to(device)
    if images < 1 or batch_size < 1:
        raise ValueError(f"generate: images is {images} and batch_size {batch_size}, must be at least 1")
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    prime = options.get("prime")
    steps = model.config.image_seq_len - (0 if prime is None else prime.shape[-1])
    codes, pictures = [], []
    with tqdm(total=images * steps, unit="code", desc="drawing", disable=not progress) as bar:
        for start in range(0, images, batch_size):
            count = min(batch_size, images - start)
            codes.append(generate_codes(model, text, images=count, seed=seed + start, on_step=bar.update, **options))
            pictures.append(vae.decode(codes[-1]).float().clamp(0, 1))
    found = Generated(torch.cat(pictures), torch.cat(codes), None)
    if rerank is None:
        return found
    scores = similarity(rerank, found.images, prompt)
    order = scores.argsort(descending=True, stable=True)
    return Generated(found.images[order], found.codes[order], scores[order])


@torch.no_grad()
def similarity(clip: nn.Module, images: Tensor, prompt: str) -> Tensor:
    """Cosine of each picture [N, 3, H, W] (0 ... 1) with the prompt under a CLIP with `tokenizer`: [N] float32.

    Raises:
        ValueError: the CLIP has no tokenizer.
    """
    from ..data import ImagePreprocess, preprocess_batch

    if clip.tokenizer is None:
        raise ValueError("similarity: the CLIP has no tokenizer; set clip.tokenizer")
    config, device = clip.config, next(clip.parameters()).device
    preprocess = clip.preprocess or ImagePreprocess(config.image_size, config.image_mean, config.image_std)
    batch = preprocess_batch(to_arrays(images), preprocess.for_evaluation()).to(device)
    text = clip.encode_text(clip.tokenizer(prompt).to(device), normalize=True)
    return (clip.encode_image(batch, normalize=True) @ text[0]).float().cpu()


def to_arrays(images: Tensor) -> list:
    """[N, 3, H, W] in 0 ... 1 -> N uint8 arrays [H, W, 3]."""
    return list((images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def _vae(model: nn.Module) -> nn.Module:
    if model.vae is None:
        raise ValueError("generate: the model has no discrete VAE for its codes; give it one with attach_vae")
    return model.vae
