"""Captions: a picture, or its regions, to a sentence.

Three kinds of model write them: the encoder-decoder `ImageSeq2Seq`; VD-BERT and UNITER, which fill in [MASK] behind the
text so far, with the sequence-to-sequence mask of UniLM (arXiv:1905.03197) and VLP (arXiv:1909.11059) that
`objectives.Pretraining(["seq2seq"])` trains.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.image_seq2seq import ImageSeq2Seq
from ..models.uniter import UNITER
from ..models.vdbert import VDBERT
from ..models.vdbert_answers import Context
from .decoding import Hypothesis, mask_step, select_rows
from .generation import Generation, TextWriter
from .pair_models import MODELS
from .pair_pictures import as_picture, as_regions, is_one_picture, pixel_batch, region_batch


class Captioner(TextWriter):
    """Writes captions.

    Args:
        model: an `ImageSeq2Seq`, a `VDBERT` or a `UNITER`; the latter two with their "mlm" head.
        generation, tokenizer, batch_size: see `TextWriter`.
        preprocess: of pictures; None takes `model.preprocess`.
        max_regions: most regions of a picture; None takes all that the model can.

    Raises:
        TypeError: another model. ValueError: no tokenizer, one with more tokens than the model, or no such head.
    """

    models = (ImageSeq2Seq, VDBERT, UNITER)

    def __init__(self, model: ImageSeq2Seq | VDBERT | UNITER, generation: Generation | None = None, *,
                 preprocess=None, max_regions: int | None = None, **options):
        super().__init__(model, generation, **options)
        self.decoder, self.max_regions = isinstance(model, ImageSeq2Seq), max_regions
        if not self.decoder and "mlm" not in model.available():
            raise ValueError(f"{self.name}: the model has no 'mlm' head, must have one to write")
        if self.decoder and model.config.visual == "none":
            raise ValueError(f"{self.name}: model.config.visual is 'none', must read pictures")
        if self.decoder and model.config.fusion == "gated":
            raise ValueError(f"{self.name}: model.config.fusion is 'gated', must be 'concat': there is no source text")
        self.preprocess = preprocess or (model.preprocess if self.decoder else None)

    @property
    def pixels(self) -> bool:
        """Whether it takes pictures rather than regions."""
        return self.decoder and self.model.config.visual == "grid"

    def __call__(self, image, *, generator: torch.Generator | None = None) -> str | list[str]:
        """Captions.

        Args:
            image: a picture (see `as_picture`; what is transparent becomes white) or, for models of regions, its
                regions (see `as_regions`); or a list of them.
            generator: of chance, where `generation.top_p` is set.

        Returns:
            A text, or a list of them where `image` is a list.

        Raises:
            TypeError, ValueError: something else is given. FileNotFoundError: see `load_image`.
        """
        one = is_one_picture(image)
        found = self.hypotheses([image] if one else image, generator=generator)
        texts = [self.text(hypothesis) for hypothesis in found]
        return texts[0] if one else texts

    def hypotheses(self, images: Sequence, *, generator: torch.Generator | None = None) -> list[Hypothesis]:
        """The tokens with their probabilities, one for each picture."""
        convert = as_picture if self.pixels else as_regions
        pictures = [convert(image, f"image {i}") for i, image in enumerate(images)]
        return self.in_batches(pictures, self._write, generator)

    def _write(self, pictures: list, generator: torch.Generator | None) -> list[Hypothesis]:
        start = {ImageSeq2Seq: self._start_decoder, VDBERT: self._start_vdbert, UNITER: self._start_uniter}
        kind = next(kind for kind in start if isinstance(self.model, kind))
        given = picture_arguments(self.model, pictures, self.preprocess, self.max_regions, self.device)
        step, first, state, reorder = start[kind](given)
        prompt = torch.full((len(pictures), 1), first, device=self.device)
        return self.decode(step, prompt, state, reorder=reorder, generator=generator)

    def _start_decoder(self, given: dict[str, Tensor]):
        return self.model.step, self.model.config.bos_token_id, self.model.start(self.model.encode(**given)), None

    def _start_vdbert(self, given: dict[str, Tensor]):
        """[CLS] slots [SEP] is read once; the caption follows it."""
        slots, rows, tokens = self.model.config.len_vis_input, len(given["image_feat"]), self.tokenizer
        ids = torch.tensor([tokens.cls, *[tokens.unk] * slots, tokens.sep], device=self.device).expand(rows, -1)
        context = self.model.read(ids, **given)

        def predict(written: Tensor, state: Context) -> tuple[Tensor, Context]:
            return self.model.next_logits(state, written[:, None, 1:-1])[:, 0], state

        def reorder(state: Context, at: Tensor) -> Context:
            parts = select_rows((state.keys, state.values, state.bias, state.position), at)
            return Context(*parts)

        return mask_step(predict, self.model.config.mask_word_id), tokens.sep, context, reorder

    def _start_uniter(self, given: dict[str, Tensor]):
        """Nothing is cached: the text stands before the regions and moves none of them, but is short."""

        def predict(written: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            prefix = torch.zeros(len(written), dtype=torch.int64, device=written.device)
            logits = self.model(written, **state, prefix_lengths=prefix, heads=("mlm",)).logits["mlm"]
            return logits[:, -1], state

        return mask_step(predict, self.tokenizer.mask), self.tokenizer.cls, given, None


def picture_arguments(model, pictures: list, preprocess, most: int | None, device: torch.device) -> dict[str, Tensor]:
    """What a model's forward takes of pictures (`Picture`) or regions (`Regions`), on its device.

    Raises:
        ValueError: regions of another width, or with boxes of another kind.
    """
    config = model.config
    if isinstance(model, ImageSeq2Seq) and config.visual == "grid":
        given = pixel_batch([_on_white(picture) for picture in pictures], preprocess, len(pictures))
    elif isinstance(model, ImageSeq2Seq):
        takes = MODELS["LXMERT"]  # for its boxes, fractions of the picture
        given = region_batch(pictures, takes, config.region_dim, most=most)
        if not config.region_loc_dim:
            del given["image_loc"]
    else:
        takes = MODELS[type(model).__name__]
        slots = getattr(config, "len_vis_input", 0)
        given = region_batch(pictures, takes, getattr(config, takes.feature_dim), most=most, slots=slots)
    return {name: value.to(device) for name, value in given.items()}


def _on_white(picture):
    """The picture with white behind what is transparent: preprocessing would make it black."""
    from PIL import Image

    image = picture.pixels
    if isinstance(image, Tensor) or not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return picture
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return type(picture)(picture.image_id, Image.alpha_composite(white, image).convert("RGB"))
