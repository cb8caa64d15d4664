"""The models, CLIP excepted, whose checkpoints `load` and `save_pretrained` know: one table of readers and writers."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from ..models.dalle import DALLE
from ..models.dalle_mini import DALLEMini
from ..models.dvae import DVAE, DiscreteVAE
from ..models.glide import GLIDE
from ..models.imagebert import ImageBERT
from ..models.lxmert import LXMERT
from ..models.noised_clip import NoisedCLIP
from ..models.pixelbert import PixelBERT
from ..models.uniter import UNITER
from ..models.vdbert import VDBERT
from ..models.vilbert import ViLBERT
from ..models.visualbert import VisualBERT
from ..models.vlbert import VLBERT
from ..models.vqgan import VQGAN
from . import (
    dalle,
    dalle_mini,
    dvae,
    glide,
    imagebert,
    lxmert,
    pixelbert,
    uniter,
    vdbert,
    vilbert,
    visualbert,
    vlbert,
    vqgan,
)
from .own import OWN, Own


@dataclass(frozen=True)
class Format:
    """A reader, and the writer of its model.

    Attributes:
        model: the class.
        load: `load(path, *parts, config, strict, device, dtype)`.
        save: `save(model, folder)`; returns the layout it wrote where it has more than one.
        layout: what `save` writes, as `save_pretrained` reports it.
        model_type: in config.json.
        keys: parts of tensor names that no file of another format, or of a later one in the table, has.
        files: what a folder without config.json holds, each file under one of its names.
        parts: whether a model may have further files.
        huggingface: its folders are transformers' too.
        wordpiece: its texts are split by a WordPieceTokenizer.
    """

    model: type[nn.Module]
    load: Callable[..., nn.Module]
    save: Callable
    layout: str
    model_type: str = ""
    keys: tuple[bytes, ...] = ()
    files: tuple[tuple[str, ...], ...] = ()
    parts: bool = False
    huggingface: bool = False
    wordpiece: bool = False


def _bert_like(model: type, module: ModuleType | Own, layout: str, model_type: str, *keys: bytes) -> Format:
    return Format(model, module.load, module.save, layout, model_type, keys, huggingface=layout == "huggingface",
                  wordpiece=True)


FORMATS: dict[str, Format] = {
    "vilbert": _bert_like(ViLBERT, vilbert, "vilbert", "vilbert", b"encoder.c_layer."),
    "lxmert": _bert_like(LXMERT, lxmert, "huggingface", "lxmert", b"encoder.x_layers."),
    "visualbert": _bert_like(VisualBERT, visualbert, "huggingface", visualbert.MODEL_TYPE,
                             b"token_type_embeddings_visual", b"visual_token_type_embeddings"),
    "uniter": _bert_like(UNITER, uniter, "uniter", uniter.MODEL_TYPE, b"img_embeddings.pos_linear"),
    "vlbert": _bert_like(VLBERT, vlbert, "vlbert", vlbert.MODEL_TYPE, b"end_embedding.weight"),
    "vdbert": _bert_like(VDBERT, vdbert, "vdbert", vdbert.MODEL_TYPE, b"vis_pe_embed.0.weight"),
    "pixelbert": _bert_like(PixelBERT, pixelbert, "pixelbert", pixelbert.MODEL_TYPE, b"cnn.grid_encoder.0.weight"),
    "imagebert": _bert_like(ImageBERT, imagebert, "imagebert", imagebert.MODEL_TYPE,
                            b"bert.embeddings.image_location_embeddings"),
    **{own.model_type: _bert_like(own.model, own, own.model_type, own.model_type, own.key) for own in OWN},
    # before the discrete VAEs: one may lie in the same file
    "dalle-pytorch": Format(DALLE, dalle.load, dalle.save, "dalle", dalle.MODEL_TYPE, (b".fn.to_qkv.weight",)),
    "min-dalle": Format(DALLEMini, dalle_mini.load, dalle_mini.save, "dalle-mini", dalle_mini.MODEL_TYPE,
                        files=tuple(dalle_mini.SIDES.values())),
    "flava": Format(DVAE, dvae.load_flava, dvae.save, dvae.FLAVA_TYPE, dvae.FLAVA_TYPE,
                    (b"blocks.group_1.group.block_1.",), huggingface=True),
    "openai-dvae": Format(DVAE, dvae.load_openai, dvae.save, dvae.DVAE_TYPE, dvae.DVAE_TYPE,
                          (b"blocks.group_1.block_1.", b"dall_e.encoder"), files=(dvae.PICKLES[:1],), parts=True),
    "taming": Format(VQGAN, vqgan.load_taming, vqgan.save, vqgan.MODEL_TYPE, vqgan.MODEL_TYPE, (b"quantize.embed",)),
    "min-dalle-vqgan": Format(VQGAN, vqgan.load_min_dalle, vqgan.save, vqgan.MODEL_TYPE,
                              keys=(b"decoder.up.0.block.0.",)),
    "dalle-pytorch-vae": Format(DiscreteVAE, dvae.load_dalle_pytorch, dvae.save, dvae.DISCRETE_TYPE,
                                dvae.DISCRETE_TYPE, (b"encoder.0.0.weight",)),
    "glide": Format(GLIDE, glide.load_glide, glide.save_glide, glide.GLIDE_TYPE, glide.GLIDE_TYPE, (glide.GLIDE_KEY,),
                    files=(tuple(base for base, _ in glide.PAIRS),), parts=True),
    "glide-noised-clip": Format(NoisedCLIP, glide.load_noised_clip, glide.save_noised_clip, glide.CLIP_TYPE,
                                glide.CLIP_TYPE, glide.CLIP_KEYS, files=tuple((name,) for name in glide.TOWERS),
                                parts=True),
}
BY_MODEL_TYPE = {entry.model_type: name for name, entry in FORMATS.items() if entry.model_type}
