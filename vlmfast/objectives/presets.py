"""The conventions of the public pretraining code, each a named preset of explicit settings."""

from dataclasses import dataclass

from .masking import WORD_SPLIT
from .matching import WRA_WEIGHT


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """How a model's authors mask, pair and divide; see `common` for the normalizers.

    Attributes:
        joint: words and regions are masked in one pass, which the pair loss shares; False: words with whole images,
            regions with whole texts, pairs whole, a pass each.
        word_rate, word_split, least_words, most_words: see `masking.mask_tokens` (at_least_one, most).
        word_normalizer: of mlm and mlm_whole_word.
        region_rate, region_split, least_regions: see `masking.mask_regions`.
        neighbour_iou, hide_neighbours: likewise.
        whole_image: row 0 of the regions is the whole image, never masked: its feature is the mean of the others after
            masking, with the divisor of "vilbert" or "vlbert" (see `masking.whole_image_feature`); None: no such row.
        mismatched_words, mismatched_regions: whether those of mismatched pairs are predicted.
        feature_loss, feature_normalizer: of mrfr, "squared" or "smooth_l1".
        class_loss, class_normalizer: of mrc: "likeliest" class of the detector's distribution without background,
            "labels" on every region weighted by confidence, "soft" cross entropy with the distribution.
        kl_normalizer: of mrc_kl.
        region_factor: multiplies the losses "labels" and "smooth_l1".
        num_negative: of mrm_nce.
        replaces, match_rate, match_exact: which side of a pair is exchanged, with what probability, or in exactly
            that share of the batch.
        wra_weight: of word-region alignment, against matching.
    """

    joint: bool = True
    word_rate: float = 0.15
    word_split: tuple[float, float, float] = WORD_SPLIT
    least_words: bool = False
    most_words: int | None = None
    word_normalizer: str = "labels"
    region_rate: float = 0.15
    region_split: tuple[float, float, float] = (0.9, 0.0, 0.1)
    least_regions: bool = False
    neighbour_iou: float | None = None
    hide_neighbours: bool = True
    whole_image: str | None = None
    mismatched_words: bool = True
    mismatched_regions: bool = True
    feature_loss: str = "squared"
    feature_normalizer: str = "elements"
    class_loss: str = "likeliest"
    class_normalizer: str = "mask"
    kl_normalizer: str = "elements"
    region_factor: float = 1.0
    num_negative: int = 128
    replaces: str = "text"
    match_rate: float = 0.5
    match_exact: bool = False
    wra_weight: float = WRA_WEIGHT

    def __post_init__(self):
        for name, allowed in {"whole_image": (None, "vilbert", "vlbert"), "feature_loss": ("squared", "smooth_l1"),
                              "class_loss": ("likeliest", "labels", "soft"), "replaces": ("text", "image")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Conventions: {name} is {getattr(self, name)!r}, must be one of {list(allowed)}")


PRESETS: dict[str, Conventions] = {
    # facebookresearch/vilbert-multi-task, objective 1 as in the public weights
    "vilbert": Conventions(neighbour_iou=0.4, hide_neighbours=False, whole_image="vilbert", mismatched_words=False,
                           mismatched_regions=False, feature_normalizer="mask_dim", kl_normalizer="mask"),
    # airsplay/lxmert
    "lxmert": Conventions(region_split=(0.8, 0.1, 0.1), feature_loss="smooth_l1", feature_normalizer="all_regions",
                          class_loss="labels", class_normalizer="all_regions", region_factor=1 / 0.15),
    # ChenRocks/UNITER
    "uniter": Conventions(joint=False, least_words=True, region_split=(1.0, 0.0, 0.0), least_regions=True,
                          replaces="image"),
    # uclanlp/visualbert: no region losses; a caption is exchanged
    "visualbert": Conventions(),
    # jackroos/VL-BERT
    "vlbert": Conventions(whole_image="vlbert", class_loss="soft", class_normalizer="valid_rows"),
    # salesforce/VD-BERT: words only
    "vdbert": Conventions(most_words=30, word_normalizer="labels_eps"),
    # no public code: region losses on matched pairs, from the paper's description
    "imagebert": Conventions(mismatched_regions=False),
    # zdou0830/METER: exactly half of the batch gets a false image; words and pairs in passes of their own
    "meter": Conventions(joint=False, replaces="image", match_exact=True),
    "pixelbert": Conventions(),
}
