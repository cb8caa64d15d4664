"""Pictures from texts with GLIDE: the public code's trajectories, the notebooks' recipes, inpainting and guidance."""

import numpy as np
import pytest
import torch
from glide_golden import BASE, INPAINT, NOISED_CLIP, UPSAMPLE, float_weights, unet_settings
from PIL import Image

import vlmfast
from vlmfast import models
from vlmfast.data.gpt2_tokenizer import GPT2Tokenizer
from vlmfast.diffusion import Schedule, sample
from vlmfast.models.glide import GLIDE, GLIDEConfig
from vlmfast.models.noised_clip import NoisedCLIP, NoisedCLIPConfig
from vlmfast.ops import diffusion_noise
from vlmfast.tasks import GlidePipeline, Recipe
from vlmfast.tasks.diffusion_generation import PRESETS, UPSAMPLER_OFFSET, schedule_of

SMALL = dict(image_size=16, num_channels=32, channel_mult=(1, 2), attention_resolutions=(8,), num_head_channels=16,
             text_ctx=12, xf_width=32, xf_layers=1, xf_heads=2)
QUICK = dict(steps=5, progress=False)


@pytest.fixture(scope="module")
def tokenizer():
    return GPT2Tokenizer.train(["a red circle", "a blue square"] * 3, 270)


def make(tokenizer, name="glide-tiny", **changes):
    """A model whose zero-initialised layers are filled."""
    torch.manual_seed(1)
    model = models.create(name, **{**SMALL, "n_vocab": tokenizer.vocab_size, **changes}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.05)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def pipe(tokenizer):
    return GlidePipeline(make(tokenizer), make(tokenizer, "glide-tiny-upsample", image_size=32))


class GivenTokens:
    """A tokenizer of the reference's rows, whose prompts are their numbers."""

    def __init__(self, inputs):
        self.inputs = inputs

    def tokens_and_mask(self, text, context):
        row = slice(int(text), int(text) + 1)
        return self.inputs["tokens"][row], self.inputs["mask"][row]


# of samples and of the estimates of x0, as the reference files' table has them
TOLERANCES = {(BASE, "p_sample"): (5e-4, 2e-3), (BASE, "ddim_sample"): (5e-4, 2e-3),
              (UPSAMPLE, "p_sample"): (2e-4, 1e-2), (UPSAMPLE, "ddim_sample"): (2e-4, 1e-2),
              (INPAINT, "p_sample"): (2e-4, 1e-3), (INPAINT, "ddim_sample"): (5e-4, 2e-3)}


@pytest.mark.parametrize("sampler", ["p_sample", "ddim_sample"])
@pytest.mark.parametrize("case", [BASE, INPAINT, UPSAMPLE])
def test_trajectories_of_the_public_code(golden, golden_close, case, sampler):
    """Every step of every sample with the reference's noise."""
    weights, inputs, outputs, metadata = golden(case)
    config = metadata["config"]
    model = GLIDE(GLIDEConfig(**unet_settings(config))).eval()
    model.load_state_dict(float_weights(weights))
    assert schedule_of(model).respace("10").timestep_map.tolist() == outputs["timestep_map"].tolist()
    pipe = GlidePipeline.__new__(GlidePipeline)
    pipe.base, pipe.tokenizer, pipe.clip = model, GivenTokens(inputs), None
    recipe = Recipe(steps=config["options"]["timestep_respacing"], guidance_scale=config["guidance_scale"],
                    sampler="ancestral" if sampler == "p_sample" else "ddim", eta=0.0)

    def known(side):
        return (inputs["inpaint_image"] * inputs["inpaint_mask"])[:1], inputs["inpaint_mask"][:1]

    taken = []
    for row in range(config["batch"]):
        conditions = {"low_res": inputs["low_res"][row:row + 1]} if case == UPSAMPLE else {}
        steps = []
        pipe._sample(model, str(row), 1, recipe, conditions, known if case == INPAINT else None,
                     x_T=inputs["x_T"][row:row + 1], seed=None,
                     noise=lambda k, row=row: inputs["p_sample.noise"][k, row:row + 1], progress=False,
                     callback=steps.append)
        taken.append(steps)
    x, x0 = (torch.stack([torch.cat([getattr(steps[k], name) for steps in taken]) for k in range(10)])
             for name in ("x", "x0"))
    rows = config["batch"]  # with guidance the reference's second half is of no use
    of_sample, of_x0 = TOLERANCES[case, sampler]
    golden_close(x, outputs[f"{sampler}.sample"][:, :rows], of_sample)
    golden_close(x0, outputs[f"{sampler}.pred_xstart"][:, :rows], of_x0)


def test_recipes_of_the_notebooks():
    base, enlarge = PRESETS["text2im"]
    assert base == Recipe(steps="100", sampler="ancestral", guidance_scale=3.0, temperature=1.0)
    assert enlarge == Recipe(steps="fast27", sampler="ddim", eta=0.0, guidance_scale=None, temperature=0.997)
    base, enlarge = PRESETS["inpaint"]
    assert (base.steps, base.sampler, base.guidance_scale) == ("100", "ancestral", 5.0)
    assert (enlarge.steps, enlarge.sampler, enlarge.temperature) == ("fast27", "ancestral", 0.997)
    base, _ = PRESETS["clip_guided"]
    assert (base.guidance_scale, base.clip_scale) == (None, 3.0)


def test_a_text_becomes_pictures(pipe):
    image = pipe("a red circle", seed=7, upsample_steps=3, **QUICK)
    assert isinstance(image, Image.Image) and image.size == (32, 32) and image.mode == "RGB"
    several = pipe("a red circle", images=3, seed=7, upsample_steps=3, **QUICK)
    assert len(several) == 3 and np.array_equal(several[0], image) and not np.array_equal(several[1], image)
    assert not np.array_equal(pipe("a blue square", seed=7, upsample_steps=3, **QUICK), image)
    assert not np.array_equal(pipe("a red circle", seed=8, upsample_steps=3, **QUICK), image)
    assert pipe("a red circle", images=3, seed=7, upsample_steps=3, batch_size=2, **QUICK)[1] == several[1]


def test_batches_differ(tokenizer):
    found = GlidePipeline(make(tokenizer)).generate("a red circle", images=4, batch_size=2, seed=7, **QUICK)
    assert all(not torch.equal(found[i], found[j]) for i in range(4) for j in range(i))


def test_both_stages_are_their_parts(pipe, tokenizer):
    """Rows with the text, then rows without; the small picture in 256 levels; colder noise to enlarge it."""
    found = pipe.generate("a red circle", images=2, seed=3, steps=6, guidance_scale=2.5, sampler="ddim", eta=0.5,
                          upsample_steps=4, progress=False)
    tokens, mask = tokenizer.tokens_and_mask(["a red circle"] * 2 + [""] * 2, 12)
    base, upsampler = pipe.base, pipe.upsampler
    with torch.no_grad():
        x = sample(lambda x, t: base(x, t, tokens=tokens, mask=mask), (2, 3, 16, 16),
                   Schedule.cosine(1000).respace("6"), sampler="ddim", eta=0.5, guidance_scale=2.5, seed=3,
                   progress=False)
        small = ((x + 1) * 127.5).round() / 127.5 - 1
        start = 0.997 * diffusion_noise((2, 3, 32, 32), 3, UPSAMPLER_OFFSET)
        x = sample(lambda x, t: upsampler(x, t, tokens=tokens[:2], mask=mask[:2], low_res=small), start,
                   Schedule.linear(1000).respace("4"), sampler="ddim", seed=3, progress=False)
    torch.testing.assert_close(found, ((x + 1) / 2).clamp(0, 1), rtol=0, atol=1e-4)


def test_what_the_model_predicts_is_in_its_config(tokenizer):
    model = make(tokenizer, prediction="v")
    found = GlidePipeline(model).generate("a red circle", seed=4, sampler="ddim", guidance_scale=1.0, **QUICK)
    tokens, mask = tokenizer.tokens_and_mask("a red circle", 12)
    with torch.no_grad():
        x = sample(lambda x, t: model(x, t, tokens=tokens, mask=mask), (1, 3, 16, 16),
                   Schedule.cosine(1000).respace(5), sampler="ddim", prediction="v", seed=4, progress=False)
    torch.testing.assert_close(found, (x + 1) / 2)


def test_guidance_of_one_is_the_text_alone(pipe):
    plain, guided, strong = (
        pipe.draw("a red circle", 1, Recipe(steps=4, sampler="ddim", guidance_scale=scale), seed=1, progress=False)
        for scale in (None, 1.0, 6.0))
    assert torch.equal(plain, guided) and not torch.allclose(plain, strong, atol=1e-3)


@pytest.mark.parametrize("trained", [True, False], ids=["trained-to", "not-trained-to"])
def test_inpainting_keeps_what_is_not_white(tokenizer, trained):
    pipe = GlidePipeline(make(tokenizer, inpaint=trained))
    photo = Image.new("RGB", (40, 30), (200, 40, 90))
    mask = Image.new("L", (40, 30), 0)
    mask.paste(255, (20, 0, 40, 30))
    found = pipe.generate("a red circle", seed=1, image=photo, mask=mask, **QUICK)[0]
    wanted = torch.tensor([200, 40, 90])[:, None, None] / 255
    torch.testing.assert_close(found[:, :, :8], wanted.expand(3, 16, 8), rtol=0, atol=1e-5)
    assert (found[:, :, 8:] - wanted).abs().mean() > 0.05
    other = pipe.generate("a red circle", seed=1, image=Image.new("RGB", (40, 30)), mask=mask, **QUICK)[0]
    assert not torch.equal(other[:, :, 8:], found[:, :, 8:]), "what is painted anew depends on what stays"
    with pytest.raises(ValueError, match="mask has 20 x 30 pixels, must be 40 x 30"):
        pipe.generate("a red circle", image=photo, mask=mask.crop((0, 0, 20, 30)), **QUICK)
    with pytest.raises(ValueError, match="mask is missing"):
        pipe.generate("a red circle", image=photo, **QUICK)


def test_clip_guidance_pulls_towards_the_text(golden, tokenizer):
    from vlmfast.data import CLIPTokenizer

    words = CLIPTokenizer.train(["a red circle", "a blue square"] * 3, 530, context_length=12)
    torch.manual_seed(0)
    clip = NoisedCLIP(NoisedCLIPConfig(
        image_size=16, n_vocab=words.vocab_size, max_text_len=12, n_embd=16, n_head_text=2, n_head_state_text=16,
        n_xf_blocks_text=1, n_head_image=2, n_head_state_image=16, n_xf_blocks_image=1)).eval()
    clip.tokenizer = words
    pipe = GlidePipeline(make(tokenizer), clip=clip)
    tokens = words("a red circle")

    def similarity(x):
        image = clip.encode_image(x, torch.zeros(4, dtype=torch.int64), normalize=True)
        return float((image @ clip.encode_text(tokens, normalize=True).T).mean())

    with torch.no_grad():
        free, pulled = (
            similarity(pipe.draw("a red circle", 4, Recipe(steps=20, clip_scale=scale), seed=2, progress=False))
            for scale in (None, 30.0))
    assert pulled > free + 0.02, (free, pulled)
    assert torch.equal(pipe.generate("a red circle", seed=1, clip_scale=5.0, **QUICK),
                       pipe.generate("a red circle", seed=1, preset="clip_guided", clip_scale=5.0, **QUICK))
    with pytest.raises(ValueError, match="clip_scale needs a noised CLIP"):
        GlidePipeline(make(tokenizer)).generate("a red circle", clip_scale=1.0, **QUICK)


def test_loading_gives_a_pipeline(pipe, tokenizer, tmp_path):
    vlmfast.save_pretrained(pipe.base, tmp_path / "run")
    found = vlmfast.load(tmp_path / "run")
    assert isinstance(found, GlidePipeline) and found.upsampler is not None and found.tokenizer == tokenizer
    want, image = (p("a red circle", seed=2, upsample_steps=2, **QUICK) for p in (pipe, found))
    assert np.array_equal(want, image)
    files = [tmp_path / name for name in ("base.pt", "upsample.pt")]
    for model, file in zip((pipe.base, pipe.upsampler), files, strict=True):
        torch.save(model.state_dict(), file)
    heads = {"num_head_channels": 16, "xf_heads": 2}
    bare = vlmfast.load(*files, format="glide", config=heads)
    assert isinstance(bare, GlidePipeline) and bare.upsampler.config.super_res
    with pytest.raises(ValueError, match="there is no tokenizer"):
        bare("a red circle", **QUICK)
    bare.tokenizer = tokenizer
    side = bare.upsampler.config.image_size
    assert bare("a red circle", upsample_steps=2, **QUICK).size == (side, side)
    assert isinstance(vlmfast.load(files[1], format="glide", config=heads), GLIDE)
    assert bare.config == bare.base.config and not bare.training, "what it lacks is the base model's"


def test_misuse_is_named(pipe, tokenizer):
    with pytest.raises(ValueError, match="preset is 'dalle'"):
        pipe("a red circle", preset="dalle")
    with pytest.raises(ValueError, match="tokens, context is 12"):
        pipe("a red circle " * 9)
    with pytest.raises(ValueError, match="images is 0"):
        pipe("a red circle", images=0)
    with pytest.raises(ValueError, match="sampler is 'euler'"):
        pipe("a red circle", sampler="euler", progress=False)
    with pytest.raises(ValueError, match="steps is 'quick'"):
        pipe("a red circle", steps="quick", progress=False)
    with pytest.raises(ValueError, match="base is an upsampler"):
        GlidePipeline(pipe.upsampler)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pipe.nothing()


def test_the_noised_clip_of_the_reference_guides_a_step(golden, golden_close):
    weights, inputs, outputs, metadata = golden(NOISED_CLIP)
    names = NoisedCLIPConfig.__dataclass_fields__
    clip = NoisedCLIP(NoisedCLIPConfig(**{k: v for k, v in metadata["config"].items() if k in names})).eval()
    clip.load_state_dict(float_weights(weights))
    gradients = []

    def cond_fn(x, timesteps):
        gradients.append(clip.cond_fn(inputs["text"], inputs["text_len"], metadata["config"]["grad_scale"])(
            x, inputs["timesteps"]))
        return gradients[-1]

    sample(lambda x, t: torch.zeros(3, 6, 8, 8), inputs["images"], Schedule.cosine(1), cond_fn=cond_fn, progress=False)
    golden_close(gradients[0], outputs["cond_fn"])
