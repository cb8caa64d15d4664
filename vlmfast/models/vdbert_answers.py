"""Likelihood and writing of answers with a masked language model of sequence-to-sequence form (VD-BERT,
arXiv:2004.13278, sec. 3.4; UniLM, arXiv:1905.03197).

A token is predicted at a [MASK] that sees the dialog and the tokens before it. The dialog never sees an answer, so it
is read once and its keys and values serve all answers; in one pass, an answer's rows are a_1 .. a_n MASK_1 .. MASK_m.

Sizes: B batch, P rows of the dialog with its image, N answers of each, A tokens of an answer, C width, V vocabulary,
H heads, D channels per head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.bert import BertLayer
from ..ops.attention import attention, cross_attention


@dataclass(frozen=True)
class Context:
    """A dialog that was read.

    Attributes:
        keys, values: of each layer [B, P, H, D].
        bias: [B, 1, 1, P] of the rows that do not exist, or None.
        position: [B] the position of an answer's first token.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None
    position: Tensor


class Answers:
    """What a VD-BERT does with answers; evaluation mode only."""

    def read(self, input_ids: Tensor, image_feat: Tensor | None = None, image_loc: Tensor | None = None,
             token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None,
             image_mask: Tensor | None = None, *, text_lengths: Tensor | None = None,
             num_regions: Tensor | None = None) -> Context:
        """Image and dialog up to where the answer begins; arguments as in `forward`, attention_mask [B, P].

        Raises:
            RuntimeError: the model is in training mode, or has no "mlm" head.
            TypeError, ValueError: shapes or types do not fit.
        """
        if self.training or "mlm" not in self.config.heads:
            must = "in evaluation mode" if self.training else "built with the head 'mlm'"
            raise RuntimeError(f"read: the model must be {must} to score and write answers")
        if self.config.mask_word_id >= self.config.vocab_size:
            raise ValueError(f"read: config.mask_word_id is {self.config.mask_word_id}, must be less than vocab_size, "
                             f"{self.config.vocab_size}")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask: has shape {list(attention_mask.shape)}, must be "
                             f"{list(input_ids.shape)}")
        stream = self._stream(input_ids, image_feat, image_loc, attention_mask, image_mask, text_lengths, num_regions)
        x, keys, values = self.embed(input_ids, image_feat, image_loc, token_type_ids), [], []
        for layer in self.bert.encoder.layer:
            x, key, value = _through(layer, x, lambda *qkv: attention(*qkv, bias=stream.rows.bias).out)
            keys.append(key)
            values.append(value)
        first, image, rest = stream.segments
        position = torch.full((len(x),), x.shape[1], device=x.device)
        if rest.keep is not None:
            position = first.size + image.size + rest.keep.sum(1)
        return Context(tuple(keys), tuple(values), stream.rows.bias, position)

    def option_states(self, context: Context, options: Tensor, start: int = 0) -> Tensor:
        """States of the [MASK]s at which tokens `start` to n of answers [B, N, n] are predicted: [B, N, n + 1 - start,
        C]. The last one predicts what follows the n tokens."""
        batch, answers, count = options.shape
        place = torch.cat([torch.arange(count), torch.arange(start, count + 1)]).to(options.device)  # [L]
        token = torch.arange(len(place), device=options.device) < count
        seen = (place[:, None] > place) & token | torch.eye(len(place), dtype=torch.bool, device=options.device)
        masks = options.new_full((batch, answers, count + 1 - start), self.config.mask_word_id)
        ids = torch.cat([options, masks], dim=2).flatten(1)  # [B, N * L]
        position = (context.position[:, None] + place)[:, None].expand(-1, answers, -1).flatten(1)
        longest = self.config.max_position_embeddings
        if position.numel() and int(position.max()) >= longest:
            raise ValueError(f"options: end at position {int(position.max())}, must end before {longest}")
        x = self.bert.embeddings(ids, torch.ones_like(ids), position)
        for layer, key, value in zip(self.bert.encoder.layer, context.keys, context.values, strict=True):

            def attend(query: Tensor, own_key: Tensor, own_value: Tensor, key=key, value=value) -> Tensor:
                far = cross_attention(query, key, value, bias=context.bias, return_lse=True)
                near = attention(*(part.reshape(batch * answers, len(place), *part.shape[2:])
                                   for part in (query, own_key, own_value)), mask=seen[None], return_lse=True)
                lse = near.lse.unflatten(0, (batch, answers)).transpose(1, 2).flatten(2)  # [B, H, N * L]
                share = torch.sigmoid(lse - far.lse).transpose(1, 2)[..., None].to(far.out.dtype)
                return torch.lerp(far.out, near.out.reshape(far.out.shape), share)

            x, _, _ = _through(layer, x, attend)
        return x.unflatten(1, (answers, len(place)))[:, :, count:]

    def score_options(self, input_ids: Tensor, image_feat: Tensor | None, image_loc: Tensor | None, options: Tensor,
                      token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                      image_mask: Tensor | None = None, *, text_lengths: Tensor | None = None,
                      num_regions: Tensor | None = None) -> Tensor:
        """Generative scores of answers: the sum of log p(token | image, dialog, tokens before).

        Args:
            input_ids: [B, P] image slots and dialog, without an answer; the rest as in `forward`.
            options: [B, N, A] token ids of the answers, 0 behind their end.

        Returns:
            [B, N] float32 or wider; the best answer has the highest score.

        Raises:
            RuntimeError: the model is in training mode, or has no "mlm" head.
            TypeError, ValueError: shapes or types do not fit.
        """
        if options.is_floating_point() or options.dtype == torch.bool:
            raise TypeError(f"options: is {options.dtype}, must be integers")
        if options.ndim != 3 or len(options) != len(input_ids) or not options.shape[2]:
            raise ValueError(f"options: has shape {list(options.shape)}, must be [{len(input_ids)}, N, A] with A > 0")
        context = self.read(input_ids, image_feat, image_loc, token_type_ids, attention_mask, image_mask,
                            text_lengths=text_lengths, num_regions=num_regions)
        states = self.option_states(context, options[:, :, :-1])  # [B, N, A, C]
        scores = []
        for state, option in zip(states, options, strict=True):  # one example's scores over V at a time
            logits = self.cls.predictions(state, self.word_table)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            each = logits.gather(-1, option[..., None].long())[..., 0]
            scores.append(each.masked_fill(option == 0, 0).sum(-1))
        return torch.stack(scores)

    def next_logits(self, context: Context, tokens: Tensor) -> Tensor:
        """Scores [B, N, V] of the token that follows `tokens` [B, N, n], n from 0."""
        state = self.option_states(context, tokens, start=tokens.shape[2])[:, :, 0]
        return self.cls.predictions(state, self.word_table)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, image_feat: Tensor | None = None, image_loc: Tensor | None = None,
                 token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                 image_mask: Tensor | None = None, *, text_lengths: Tensor | None = None,
                 num_regions: Tensor | None = None, max_tokens: int = 10, num_beams: int = 1,
                 length_penalty: float = 0.0, end_id: int = 102) -> tuple[Tensor, Tensor]:
        """Write an answer by beam search.

        Args:
            input_ids ... num_regions: image and dialog, as in `read`.
            max_tokens: the answer's length, end token included.
            num_beams: hypotheses kept; 1 takes the likeliest token each time.
            length_penalty: the best hypothesis has the highest log p / tokens ** length_penalty.
            end_id: the token that ends an answer ([SEP]).

        Returns:
            (tokens [B, n] with n <= max_tokens, 0 behind end_id; log p [B]).
        """
        for name, value in (("max_tokens", max_tokens), ("num_beams", num_beams)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: is {value!r}, must be an integer of at least 1")
        context = self.read(input_ids, image_feat, image_loc, token_type_ids, attention_mask, image_mask,
                            text_lengths=text_lengths, num_regions=num_regions)
        batch = len(input_ids)
        tokens = torch.zeros(batch, 1, 0, dtype=torch.long, device=input_ids.device)
        scores = torch.zeros(batch, 1, device=input_ids.device)
        done = torch.zeros_like(scores, dtype=torch.bool)
        for _ in range(max_tokens):
            each = self.next_logits(context, tokens).float()
            each[..., 0] = -torch.inf  # padding is no word
            each = each.log_softmax(-1).masked_fill(done[..., None], -torch.inf)
            each[..., 0] = torch.where(done, 0, each[..., 0])  # an ended answer goes on with padding, at no cost
            total = scores[..., None] + each  # [B, beams, V]
            scores, best = total.flatten(1).topk(min(num_beams, total[0].numel()))
            beam, word = best // each.shape[-1], best % each.shape[-1]
            tokens = torch.cat([tokens.gather(1, beam[..., None].expand(-1, -1, tokens.shape[2])), word[..., None]], 2)
            done = done.gather(1, beam) | (word == end_id)
            if done.all():
                break
        best = (scores / (tokens != 0).sum(-1).clamp(min=1) ** length_penalty).argmax(1, keepdim=True)
        return tokens.gather(1, best[..., None].expand(-1, -1, tokens.shape[2]))[:, 0], scores.gather(1, best)[:, 0]


def _through(layer: BertLayer, x: Tensor, attend) -> tuple[Tensor, Tensor, Tensor]:
    """(states, keys, values) of a BERT layer whose attention is `attend(query, key, value)`, each [B, S, H, D]."""
    half = layer.attention
    query, key, value = (part(x).unflatten(-1, (half.self.heads, -1))
                         for part in (half.self.query, half.self.key, half.self.value))
    x = half.output(attend(query, key, value).flatten(-2), x)
    return layer.output(layer.intermediate(x), x), key, value
