"""The BERT-like models whose checkpoints `load` and `save_pretrained` know."""

from dataclasses import dataclass
from types import ModuleType

from ..models.imagebert import ImageBERT
from ..models.lxmert import LXMERT
from ..models.pixelbert import PixelBERT
from ..models.uniter import UNITER
from ..models.vdbert import VDBERT
from ..models.vilbert import ViLBERT
from ..models.visualbert import VisualBERT
from ..models.vlbert import VLBERT
from . import imagebert, lxmert, pixelbert, uniter, vdbert, vilbert, visualbert, vlbert
from .own import OWN, Own


@dataclass(frozen=True)
class BertLike:
    """One model's reader and writer.

    Attributes:
        module: has `load(path, *, config, strict, device, dtype)` and `save(model, folder)`.
        model: the class.
        layout: what `save` writes, as `save_pretrained` reports it.
        model_type: in config.json.
        keys: parts of tensor names that no other model's files have.
    """

    module: ModuleType | Own
    model: type
    layout: str
    model_type: str
    keys: tuple[bytes, ...]


BERT_LIKE: dict[str, BertLike] = {
    "vilbert": BertLike(vilbert, ViLBERT, "vilbert", "vilbert", (b"encoder.c_layer.",)),
    "lxmert": BertLike(lxmert, LXMERT, "huggingface", "lxmert", (b"encoder.x_layers.",)),
    "visualbert": BertLike(visualbert, VisualBERT, "huggingface", visualbert.MODEL_TYPE,
                           (b"token_type_embeddings_visual", b"visual_token_type_embeddings")),
    "uniter": BertLike(uniter, UNITER, "uniter", uniter.MODEL_TYPE, (b"img_embeddings.pos_linear",)),
    "vlbert": BertLike(vlbert, VLBERT, "vlbert", vlbert.MODEL_TYPE, (b"end_embedding.weight",)),
    "vdbert": BertLike(vdbert, VDBERT, "vdbert", vdbert.MODEL_TYPE, (b"vis_pe_embed.0.weight",)),
    "pixelbert": BertLike(pixelbert, PixelBERT, "pixelbert", pixelbert.MODEL_TYPE, (b"cnn.grid_encoder.0.weight",)),
    "imagebert": BertLike(imagebert, ImageBERT, "imagebert", imagebert.MODEL_TYPE,
                          (b"bert.embeddings.image_location_embeddings",)),
    **{own.model_type: BertLike(own, own.model, own.model_type, own.model_type, (own.key,)) for own in OWN},
}
BY_MODEL_TYPE = {entry.model_type: name for name, entry in BERT_LIKE.items()}
