"""Multimodal machine translation: a text and its picture to the text in another language."""

from collections.abc import Sequence

import torch

from ..models.image_seq2seq import ImageSeq2Seq
from .captioning import picture_arguments
from .decoding import Hypothesis
from .generation import Generation, TextWriter
from .pair_pictures import as_picture, as_regions, is_one_picture


class Translator(TextWriter):
    """Translates texts with their pictures.

    Args:
        model: an `ImageSeq2Seq`.
        generation, tokenizer, batch_size: see `TextWriter`.
        preprocess: of pictures; None takes `model.preprocess`.
        max_regions: most regions of a picture; None takes all.

    Raises:
        TypeError: another model. ValueError: no tokenizer, or one with more tokens than the model.

    Source: Multi30K (Elliott et al. 2016, arXiv:1605.00459).
    """

    models = (ImageSeq2Seq,)

    def __init__(self, model: ImageSeq2Seq, generation: Generation | None = None, *, preprocess=None,
                 max_regions: int | None = None, **options):
        super().__init__(model, generation, **options)
        self.preprocess, self.max_regions = preprocess or model.preprocess, max_regions

    def __call__(self, text: str | Sequence[str], image=None, *,
                 generator: torch.Generator | None = None) -> str | list[str]:
        """Translations.

        Args:
            text: one text or several; what is longer than the model's positions is an error, not cut.
            image: of one text, or a list with one for each: pictures or regions, as the model takes them. None: the
                text alone.
            generator: of chance, where `generation.top_p` is set.

        Returns:
            A text, or a list of them where `text` is a list.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        one = isinstance(text, str)
        texts = [text] if one else list(text)
        pictures = None if image is None else [image] if is_one_picture(image) else list(image)
        found = [self.text(h) for h in self.hypotheses(texts, pictures, generator=generator)]
        return found[0] if one else found

    def hypotheses(self, texts: Sequence[str], images: Sequence | None = None, *,
                   generator: torch.Generator | None = None) -> list[Hypothesis]:
        """The tokens with their probabilities, one for each text."""
        pictures: Sequence = [None] * len(texts)
        if images is not None:
            visual = self.model.config.visual
            if visual == "none":
                raise ValueError(f"{self.name}: image is given, the model reads text alone; must be None")
            if len(images) != len(texts):
                raise ValueError(f"{self.name}: image has {len(images)} entries, text has {len(texts)}")
            convert = as_picture if visual == "grid" else as_regions
            pictures = [convert(image, f"image {i}") for i, image in enumerate(images)]
        return self.in_batches(list(zip(texts, pictures, strict=True)), self._write, generator)

    def _write(self, rows: list[tuple], generator: torch.Generator | None) -> list[Hypothesis]:
        texts, pictures = zip(*rows, strict=True)
        most = min(self.model.config.max_position_embeddings, self.tokenizer.max_length)
        source = self.tokenizer(texts, max_length=most, truncate=False).to(self.device)
        given = {}
        if pictures[0] is not None:
            given = picture_arguments(self.model, list(pictures), self.preprocess, self.max_regions, self.device)
        memory = self.model.encode(source.input_ids, text_lengths=source.lengths, **given)
        prompt = torch.full((len(rows), 1), self.model.config.bos_token_id, device=self.device)
        return self.decode(self.model.step, prompt, self.model.start(memory), generator=generator)
