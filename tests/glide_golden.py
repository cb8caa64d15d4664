"""The reference files of GLIDE as models and as the checkpoints that users have."""

import torch

BASE = "generative/glide_base__text2im_cfg3_p_and_ddim"
INPAINT = "generative/glide_inpaint__inpaint_cfg3"
UPSAMPLE = "generative/glide_upsampler__upsample_ddim"
NOISED_CLIP = "generative/glide_noised_clip__encoders"
UNETS = BASE, INPAINT, UPSAMPLE
# what names and shapes of the small files do not tell
HEADS = {"num_head_channels": 16, "xf_heads": 2}
CLIP_HEADS = {"n_head_image": 2, "n_head_text": 2}


def float_weights(weights: dict) -> dict:
    """The stored float8 and float16 in float32, without loss."""
    return {key: value.float() for key, value in weights.items()}


def unet_settings(config: dict) -> dict:
    """A GLIDEConfig's fields from the reference's options."""
    options = config["options"]
    numbers = {name: tuple(int(part) for part in options[name].split(","))
               for name in ("channel_mult", "attention_resolutions")}
    same = ("image_size", "num_channels", "num_res_blocks", "num_head_channels", "dropout", "text_ctx", "xf_width",
            "xf_layers", "xf_heads", "xf_final_ln", "xf_padding", "inpaint", "super_res", "noise_schedule",
            "diffusion_steps")
    return {"n_vocab": config["n_vocab"], **numbers, **{name: options[name] for name in same}}


def image_inputs(given: dict) -> dict:
    """The conditions of the model as the published notebooks give them."""
    found = {name: given[name] for name in ("low_res", "inpaint_mask") if name in given}
    if "inpaint_image" in given:
        found["inpaint_image"] = given["inpaint_image"] * given["inpaint_mask"]
    return found


def clip_files(folder, weights: dict, only: str | None = None):
    """clip_image_enc.pt and clip_text_enc.pt as published; paths of both."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for tower in ("image", "text"):
        paths.append(folder / f"clip_{tower}_enc.pt")
        prefix = f"{tower}_encoder."
        if only in (None, tower):
            torch.save({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)},
                       paths[-1])
    return paths
