"""The layout that the single-stream models share, apart from any model."""

import pytest
import torch

from vlmfast.layers.bert import init_bert
from vlmfast.layers.single_stream import BertEncoder, Segment, SingleStream, set_eps
from vlmfast.layers.transformer import LayerNorm

KEEP = torch.arange(5) < torch.tensor([[5], [3], [0]])


def encoder(layers=2):
    module = BertEncoder(layers, 16, 2, 24).eval()
    init_bert(module, 0.3)
    return module


def stream_of(*segments, batch=3):
    return SingleStream.of(batch, list(segments), torch.float32, torch.device("cpu"))


def test_segments_join_and_split_in_order():
    stream = stream_of(Segment(5, KEEP, counted=True), Segment(2), Segment(1))
    parts = torch.randn(3, 5, 16), torch.randn(1, 2, 16), torch.randn(3, 1, 16)
    joined = stream.join(*parts)
    assert joined.shape == (3, 8, 16)
    for part, found in zip(parts, stream.split(joined), strict=True):
        assert torch.equal(part.expand(3, -1, -1), found)
    assert stream.keep.sum(1).tolist() == [8, 6, 3]
    assert torch.equal(stream.join(parts[0], None), parts[0])


def test_packing_keeps_the_order_of_rows_and_comes_back():
    stream = stream_of(Segment(5, KEEP, counted=True), Segment(2))
    x = torch.randn(3, 7, 16)
    packed, layout = stream.packed(x)
    assert layout.rows.offsets.tolist() == [0, 7, 12, 14] and layout.rows.offsets.dtype == torch.int32
    assert torch.equal(packed[7:12], torch.cat([x[1, :3], x[1, 5:]]))
    assert torch.equal(layout.padded(packed), x.masked_fill(~stream.keep[..., None], 0))
    assert torch.equal(stream.padded(x), layout.padded(packed))


def test_masks_and_wider_attention_stay_padded():
    x = torch.randn(3, 5, 16)
    bias = torch.zeros(1, 1, 5, 5)
    for stream in (stream_of(Segment(5)), stream_of(Segment(5, KEEP)),
                   stream_of(Segment(5, KEEP, counted=True)).with_bias(bias),
                   stream_of(Segment(5, KEEP, counted=True)).with_prefix(torch.tensor([1, 2, 3]))):
        assert stream.packed(x)[0] is x
    assert torch.equal(stream_of(Segment(5, KEEP)).padded(x), x)


def test_prefix_rows_are_seen_by_all_and_the_rest_by_later_rows():
    module, x = encoder(), torch.randn(3, 5, 16)
    prefix = torch.tensor([1, 3, 5])
    row, column = torch.arange(5)[:, None], torch.arange(5)
    seen = (column < prefix[:, None, None]) | (column <= row)
    bias = torch.zeros(3, 1, 5, 5).masked_fill(~seen[:, None], -torch.inf)
    for segment in (Segment(5), Segment(5, KEEP.roll(1, 0), counted=True)):
        stream = stream_of(segment)
        truth, _ = module(x, stream.with_bias(bias))
        found, maps = module(x, stream.with_prefix(prefix), return_probs=True)
        torch.testing.assert_close(found, truth, rtol=0, atol=2e-5)
        assert (maps[0] * ~seen[:, None]).abs().max() == 0 and len(maps) == 2
        if segment.counted:
            assert found[~segment.keep].abs().max() == 0


def test_examples_without_a_row_come_out_as_zeros():
    module, x = encoder(), torch.randn(3, 5, 16)
    stream = stream_of(Segment(5, KEEP, counted=True))
    for maps in (False, True):
        out, _ = module(x, stream, maps)
        assert out[2].abs().max() == 0 and out[0].abs().min() > 0 and out.isfinite().all()


def test_compiled_without_packing_gives_the_same():
    module, x = encoder(), torch.randn(3, 5, 16)
    stream = stream_of(Segment(5, KEEP, counted=True))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, stream)[0], module(x, stream)[0], rtol=0, atol=2e-5)


def test_blanked_inputs_are_those_of_missing_rows_only():
    x = torch.full((3, 5, 2), torch.nan)
    stream = stream_of(Segment(5, KEEP, counted=True), Segment(1))
    (found,) = stream.blanked(0, x)
    assert torch.equal(found.isnan().all(-1), KEEP)
    assert stream_of(Segment(5, KEEP)).blanked(0, x)[0] is x


def test_epsilon_reaches_every_layer_norm():
    module = encoder()
    set_eps(module, 1e-5)
    norms = [part for part in module.modules() if isinstance(part, LayerNorm)]
    assert len(norms) == 4 and all(part.eps == 1e-5 for part in norms)


@pytest.mark.parametrize("given, message", [
    (dict(mask=torch.ones(3, 4)), r"m: has shape \[3, 4\], must be \[3, 5\]"),
    (dict(lengths=torch.tensor([1, 2, 6])), "n: runs from 1 to 6, must lie in 0..5"),
    (dict(mask=torch.ones(3, 5), lengths=torch.tensor([1, 2, 3])), "n: given together with m"),
])
def test_wrong_masks_and_counts_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Segment.of("m", given.get("mask"), "n", given.get("lengths"), torch.randn(3, 5, 2))
