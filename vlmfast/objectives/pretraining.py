"""Any selection of the pretraining objectives, for any model: `Pretraining(["mlm", "itm"])(model, batch)`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from vlmfast.ops import info_nce

from .batch import PretrainingBatch
from .common import IGNORE, PretrainingLoss
from .language import cross_entropy, prefix_lm_loss, sample_prefix_lengths, seq2seq_loss
from .masking import EPS, MaskedRegions, mask_regions, mask_tokens, whole_image_feature
from .matching import hard_negatives, matching_loss, sample_mismatches, word_region_alignment
from .models import OBJECTIVES, Heads, head_for, heads_of, image_vectors, inner, region_keep, run, takes, text_vectors
from .presets import PRESETS, Conventions
from .regions import (
    masked_region_classification,
    masked_region_kl,
    masked_region_nce,
    masked_region_regression,
    masked_region_soft_cross_entropy,
    region_feature_loss,
    region_label_loss,
    sample_region_negatives,
)

WORDS, REGIONS = ("mlm", "mlm_whole_word"), ("mrfr", "mrc", "mrc_kl", "mrm_nce", "mrc_attributes")
PAIRS, ALONE = ("itm", "wra"), ("contrastive", "prefix_lm", "seq2seq")
NEGATIVES = ("in_batch", "hard", "given")


class Pretraining:
    """The named objectives on one batch of whole texts and images, which are masked and paired here.

    ================= ==========================================================================================
    mlm               masked tokens (BERT, arXiv:1810.04805)
    mlm_whole_word    the same, all pieces of a word together; needs `words`
    nsp               does the second sentence follow the first; needs `next_sentence`
    mrfr              features of masked regions (UNITER, arXiv:1909.11740)
    mrc               classes of masked regions; needs `region_probs` or `region_classes`
    mrc_kl            the detector's distribution of masked regions; needs `region_probs`
    mrc_attributes    attributes of all regions (LXMERT, arXiv:1908.07490); needs `region_attributes`
    mrm_nce           masked regions' features among others (12-in-1, arXiv:1912.02315)
    itm               do text and image match, with mismatches from the batch
    wra               word-region alignment by optimal transport (UNITER)
    contrastive       InfoNCE of texts alone and images alone (CLIP, arXiv:2103.00020)
    prefix_lm         text behind a prefix (SimVLM, arXiv:2108.10904)
    seq2seq           target text: of a decoder, or masked tokens behind the prefix (UniLM, arXiv:1905.03197)
    ================= ==========================================================================================

    Args:
        objectives: names from the table.
        preset: a name in `PRESETS` or a `Conventions`; None: that of the model's authors.
        heads: how the model names its scores; None: by its class, see `models.HEADS`.
        weights: factor by objective, 1 where not given (wra: the preset's `wra_weight`).
        mask_id: id of [MASK].
        random_ids: (first, end) of the ids that replace some masked tokens; None: the model's vocabulary.
        special_ids: ids that are never masked, where the batch has no `special`; BERT's padding, [CLS], [SEP], [MASK].
        negatives: of itm and wra: "in_batch", the preset's exchange; "hard", beside each pair its image with the
            text most like it and its text with such an image, drawn by contrastive similarity; "given", the batch's
            `matched`. None: "given" where the batch has it, else "in_batch".
        nsp_match_index: class of "follows": 0 as in BERT, or None for the model's own class of a matching pair.
        temperature: of contrastive, for models without a `logit_scale`.
        label_smoothing: of seq2seq, over the other tokens (OSCAR, VD-BERT).
        least_prefix: tokens that always are in a drawn prefix (VD-BERT: its [CLS], image slots and [SEP]).
        generator: of every draw; None: torch's.

    Raises:
        ValueError: an unknown objective, preset or weight.
    """

    def __init__(self, objectives: Sequence[str], *, preset: str | Conventions | None = None,
                 heads: Heads | None = None, weights: dict[str, float] | None = None, mask_id: int = 103,
                 random_ids: tuple[int, int] | None = None, special_ids: Sequence[int] = (0, 101, 102, 103),
                 negatives: str | None = None, nsp_match_index: int | None = 0, temperature: float = 0.07,
                 label_smoothing: float = 0.0, least_prefix: int = 0, generator: torch.Generator | None = None):
        if isinstance(objectives, str):
            raise TypeError(f"Pretraining: objectives is {objectives!r}, must be a list of names")
        self.objectives = tuple(dict.fromkeys(objectives))
        if not self.objectives:
            raise ValueError(f"Pretraining: objectives is empty, must name some of {', '.join(OBJECTIVES)}")
        for where, names in (("objective", self.objectives), ("objective in weights", weights or {})):
            if unknown := [name for name in names if name not in OBJECTIVES]:
                raise ValueError(f"Pretraining: unknown {where} {unknown[0]!r}, must be one of {', '.join(OBJECTIVES)}")
        if isinstance(preset, str) and preset not in PRESETS:
            raise ValueError(f"Pretraining: preset is {preset!r}, must be one of {', '.join(PRESETS)}")
        if negatives not in (None, *NEGATIVES):
            raise ValueError(f"Pretraining: negatives is {negatives!r}, must be one of {', '.join(NEGATIVES)}")
        if not temperature > 0:
            raise ValueError(f"Pretraining: temperature is {temperature}, must be positive")
        self.preset, self.heads, self.weights = preset, heads, dict(weights or {})
        self.mask_id, self.random_ids, self.special_ids = mask_id, random_ids, tuple(special_ids)
        self.negatives, self.nsp_match_index, self.temperature = negatives, nsp_match_index, temperature
        self.label_smoothing, self.least_prefix, self.generator = label_smoothing, least_prefix, generator

    def __call__(self, model: nn.Module, batch: PretrainingBatch, only: Sequence[str] | None = None) -> PretrainingLoss:
        """The losses of one step.

        Args:
            model: see `models`.
            batch: what the objectives need of it is in the table above.
            only: some of the objectives (UNITER draws one a step; see `multitask.TaskSampler`).

        Returns:
            total [] and the weighted parts by objective.

        Raises:
            ValueError: the model's heads cannot serve an objective, or the batch lacks a field.
        """
        names = self.objectives if only is None else tuple(only)
        if unknown := [name for name in names if name not in self.objectives]:
            raise ValueError(f"Pretraining: only has {', '.join(map(repr, unknown))}, must be some of "
                             f"{', '.join(self.objectives)}")
        parts = Step(self, model, batch, names).losses()
        parts = {name: self.weights.get(name, 1.0) * parts[name] for name in names}
        return PretrainingLoss(sum(parts.values()), parts)


def passes(names: Sequence[str], joint: bool, hard: bool) -> list[tuple[str, ...]]:
    """Which objectives share a forward pass."""
    words, regions, pairs, alone = ([name for name in group if name in names] for group in
                                    (WORDS, REGIONS, PAIRS, ALONE))
    if joint:
        found = [words[:1] + regions + ([] if hard else pairs), *([name] for name in words[1:])]
        found += [pairs] if hard else []
    else:
        found = [*([name] for name in words), regions, pairs]
    if "nsp" in names:  # on masked words, as in BERT, unless the pair head is asked about the image there
        host = next((group for group in found if set(group) & set(WORDS) and "itm" not in group), None)
        if host is None:
            found.append(["nsp"])
        else:
            host.append("nsp")
    return [tuple(group) for group in [*found, *([name] for name in alone)] if group]


class Step:
    """One call of `Pretraining`: the passes over one batch."""

    def __init__(self, options: Pretraining, model: nn.Module, batch: PretrainingBatch, names: Sequence[str]):
        self.options, self.model, self.batch, self.names = options, model, batch, names
        self.heads = options.heads or heads_of(model)
        preset = options.preset or self.heads.preset
        self.rules = PRESETS[preset] if isinstance(preset, str) else preset
        self.head = {name: head_for(model, name, self.heads) for name in names}
        self.generator = options.generator
        given = "given" if batch.matched is not None else "in_batch"
        self.negatives = options.negatives or given

    def losses(self) -> dict[str, Tensor]:
        parts = {}
        for group in passes(self.names, self.rules.joint, self.negatives == "hard"):
            run_group = {"contrastive": self.contrastive, "prefix_lm": self.prefix_lm, "seq2seq": self.seq2seq}
            parts |= {group[0]: run_group[group[0]]()} if group[0] in run_group else self.masked(group)
        return parts

    def masked(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Masked words, masked regions and the pair, in one pass."""
        batch, matched, rules = self.batch, self.batch.matched, self.rules
        for name in names:
            batch.need(name, *(() if name in REGIONS else ("input_ids",)))
        if set(names) & set(PAIRS):
            batch, matched = self.paired(next(name for name in names if name in PAIRS))
        whole, labels, regions = batch, None, None
        if word := next((name for name in names if name in WORDS), None):
            tokens = self.mask_words(batch, word)
            batch, labels = replace(batch, input_ids=tokens.input_ids), tokens.labels
            if matched is not None and not rules.mismatched_words:
                labels = torch.where(matched[:, None], labels, IGNORE)
        if region := next((name for name in names if name in REGIONS), None):
            batch.need(region, "image_feat")
            regions = self.mask_regions(batch)
            batch = replace(batch, image_feat=regions.features)
        output = run(self.model, batch, tuple(h for name in names if (h := self.head[name])),
                     None if regions is None else regions.hidden)
        parts = {}
        for name in names:
            logits = output.logits[self.head[name]] if self.head[name] else None
            if name in WORDS:
                parts[name] = cross_entropy(logits, labels, normalizer=rules.word_normalizer)
            elif name in REGIONS:
                parts[name] = self.region_loss(name, logits, whole, regions, matched)
            elif name == "itm":
                every = torch.ones(len(batch), dtype=torch.bool, device=batch.device)
                parts[name] = matching_loss(logits, every if matched is None else matched, self.heads.match_index)
            elif name == "nsp":
                batch.need(name, "next_sentence")
                index = self.options.nsp_match_index
                parts[name] = matching_loss(logits, batch.next_sentence, self.heads.match_index if index is None
                                            else index)
            else:
                weight = 1.0 if "wra" in self.options.weights else rules.wra_weight
                parts[name] = weight * word_region_alignment(
                    output.text_hidden, output.image_hidden, matched, keep_text=batch.text_keep,
                    keep_image=region_keep(batch, output.image_hidden))
        return parts

    def paired(self, name: str) -> tuple[PretrainingBatch, Tensor | None]:
        """Pairs to judge, and which of them match."""
        batch, rules, size = self.batch, self.rules, len(self.batch)
        if batch.image_feat is None and batch.image is None:
            batch.need(name, "image_feat")
        if self.negatives == "given":
            batch.need(name, "matched")
            return batch, batch.matched
        own = torch.arange(size, device=batch.device)
        if self.negatives == "hard":
            if size < 2:
                raise ValueError(f"Pretraining: objective {name!r} draws negatives from the batch, which has {size} "
                                 "example(s), must have at least 2")
            image, text = (x.detach() for x in self.vectors)
            found = hard_negatives(image @ text.T, scale=float(self.scale), groups=batch.groups,
                                   generator=self.generator)
            pairs = batch.pair(torch.cat([own, found.texts, own]), torch.cat([own, own, found.images]))
            return pairs, torch.arange(3 * size, device=batch.device) < size
        index = sample_mismatches(size, rate=rules.match_rate, exact=rules.match_exact, groups=batch.groups,
                                  generator=self.generator, device=batch.device)
        return batch.pair(*((index, own) if rules.replaces == "text" else (own, index))), index == own

    def mask_words(self, batch: PretrainingBatch, name: str, free: Tensor | None = None):
        """`free` [B, T]: the tokens that may be selected, special or not."""
        options, rules = self.options, self.rules
        if name == "mlm_whole_word":
            batch.need(name, "words")
        if free is None:
            special = batch.special
            if special is None:
                special = torch.isin(batch.input_ids, batch.input_ids.new_tensor(options.special_ids))
            free = batch.text_keep & ~special
        size = inner(self.model).config.vocab_size if options.random_ids is None else options.random_ids[1]
        if not 0 <= options.mask_id < size:
            raise ValueError(f"Pretraining: mask_id is {options.mask_id}, must lie in 0..{size - 1}")
        return mask_tokens(batch.input_ids, ~free, mask_id=options.mask_id, random_ids=options.random_ids or (0, size),
                           rate=rules.word_rate, split=rules.word_split, generator=self.generator,
                           words=batch.words if name == "mlm_whole_word" else None,
                           most=None if name == "mlm_whole_word" else rules.most_words,
                           at_least_one=rules.least_words or name == "seq2seq")

    def mask_regions(self, batch: PretrainingBatch) -> MaskedRegions:
        rules, keep, boxes = self.rules, batch.image_keep, batch.boxes
        if rules.whole_image:
            keep = keep & (torch.arange(keep.shape[1], device=keep.device) > 0)
        if boxes is None and batch.image_loc is not None and rules.neighbour_iou is not None:
            boxes = batch.image_loc[..., :4]
        found = mask_regions(batch.image_feat, keep, rate=rules.region_rate, split=rules.region_split,
                             at_least_one=rules.least_regions, boxes=boxes, neighbour_iou=rules.neighbour_iou,
                             hide_neighbours=rules.hide_neighbours, generator=self.generator)
        if rules.whole_image:
            eps = EPS if rules.whole_image == "vlbert" else None
            excluded = found.masked if eps else found.masked | found.near
            first = whole_image_feature(found.features[:, 1:], keep[:, 1:], excluded[:, 1:], eps=eps)
            found = found._replace(features=torch.cat([first[:, None], found.features[:, 1:]], dim=1))
        return found

    def region_loss(self, name: str, logits: Tensor, batch: PretrainingBatch, regions: MaskedRegions,
                    matched: Tensor | None) -> Tensor:
        rules, masked, counted = self.rules, regions.masked, batch.image_keep
        if matched is not None and not rules.mismatched_regions:
            masked, counted = masked & matched[:, None], counted & matched[:, None]
        if name == "mrc_attributes":
            batch.need(name, "region_attributes")
            return self.labelled(logits, batch.region_attributes, batch.attribute_confidence, counted)
        if name == "mrc" and (rules.class_loss == "labels" or batch.region_probs is None):
            if batch.region_classes is None:
                batch.need(name, "region_classes" if rules.class_loss == "labels" else "region_probs")
            if rules.class_loss == "labels":
                return self.labelled(logits, batch.region_classes, batch.region_confidence, counted)
            return cross_entropy(logits, batch.region_classes.where(masked, IGNORE))
        target = "image_feat" if name in ("mrfr", "mrm_nce") else "region_probs"
        batch.need(name, target)
        target, what = getattr(batch, target), target
        if target.shape != logits.shape:
            raise ValueError(f"Pretraining: objective {name!r}: {what} has shape {list(target.shape)}, head "
                             f"{self.head[name]!r} gives {list(logits.shape)}; they must be equal")
        if name == "mrc_kl":
            return masked_region_kl(logits, target, masked, normalizer=rules.kl_normalizer)
        if name == "mrm_nce":
            first = int(rules.whole_image is not None)
            logits, target, masked = logits[:, first:], target[:, first:], masked[:, first:]
            negatives = sample_region_negatives(*masked.shape, rules.num_negative, generator=self.generator,
                                                device=masked.device)
            return masked_region_nce(logits, target, masked, negatives)
        if name == "mrc":
            loss = {"likeliest": masked_region_classification, "soft": masked_region_soft_cross_entropy}
            return loss[rules.class_loss](logits, target, masked, normalizer=rules.class_normalizer)
        if rules.feature_loss == "smooth_l1":
            return region_feature_loss(logits, target, masked, factor=rules.region_factor,
                                       normalizer=rules.feature_normalizer)
        return masked_region_regression(logits, target, masked, normalizer=rules.feature_normalizer)

    def labelled(self, logits: Tensor, labels: Tensor, confidence: Tensor | None, counted: Tensor) -> Tensor:
        confidence = torch.ones_like(labels, dtype=torch.float32) if confidence is None else confidence
        return region_label_loss(logits, labels.where(counted, IGNORE), confidence.masked_fill(~counted, 0),
                                 factor=self.rules.region_factor, normalizer=self.rules.class_normalizer
                                 if self.rules.class_loss == "labels" else "all_regions")

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Images and texts [B, D], each without the other; with a gradient only if a loss reads them."""
        if not self.heads.alone:
            raise ValueError(f"Pretraining: contrastive features need texts and images alone, "
                             f"{type(inner(self.model)).__name__} reads them together")
        with torch.set_grad_enabled(torch.is_grad_enabled() and "contrastive" in self.names):
            image, text = image_vectors(self.model, self.batch), text_vectors(self.model, self.batch)
        if image.shape[1] != text.shape[1]:
            raise ValueError(f"Pretraining: objective 'contrastive': images are {image.shape[1]} wide, texts "
                             f"{text.shape[1]}; they must be equal")
        return image, text

    @property
    def scale(self) -> Tensor | float:
        learned = getattr(inner(self.model), "logit_scale", None)
        return 1 / self.options.temperature if learned is None else learned.exp()

    def contrastive(self) -> Tensor:
        batch = self.batch
        batch.need("contrastive", "input_ids", *(("image_feat",) if batch.image is None else ()))
        image, text = self.vectors
        mask = weight = None
        if batch.groups is not None:
            mask = (batch.groups[:, None] == batch.groups) & ~torch.eye(len(batch), dtype=torch.bool,
                                                                        device=batch.device)
        if batch.matched is not None:
            if not batch.matched.any():
                return image.sum() * 0 + text.sum() * 0
            weight = batch.matched.float()
        return info_nce(image, text, self.scale, mask=mask, weight=weight)

    def prefix_lm(self) -> Tensor:
        batch = self.batch
        batch.need("prefix_lm", "input_ids")
        prefix = batch.prefix_lengths
        if prefix is None:
            prefix = sample_prefix_lengths(batch.text_keep.sum(1), least=self.options.least_prefix,
                                           generator=self.generator)
        logits = run(self.model, batch, (self.head["prefix_lm"],), prefix_lengths=prefix).logits
        return prefix_lm_loss(logits[self.head["prefix_lm"]], batch.input_ids, prefix, batch.text_keep)

    def seq2seq(self) -> Tensor:
        batch, head = self.batch, self.head["seq2seq"]
        if takes(self.model, "decoder_input_ids"):
            batch.need("seq2seq", "target_ids")
            given = batch.target_ids[:, :-1].clamp(min=0)
            logits = run(self.model, batch, (head,), decoder_input_ids=given).logits[head]
            labels = batch.target_ids[:, 1:]
        else:
            batch.need("seq2seq", "input_ids", "prefix_lengths")
            behind = torch.arange(batch.input_ids.shape[1], device=batch.device) >= batch.prefix_lengths[:, None]
            tokens = self.mask_words(batch, "seq2seq", behind & batch.text_keep)
            logits = run(self.model, replace(batch, input_ids=tokens.input_ids), (head,),
                         prefix_lengths=batch.prefix_lengths).logits[head]
            labels = tokens.labels
        return seq2seq_loss(logits, labels, label_smoothing=self.options.label_smoothing, smooth="others")
