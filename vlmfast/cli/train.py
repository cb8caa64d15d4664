"""`vlmfast train MODEL`: one sub-command for each model or family of models."""

from . import train_bert, train_clip, train_dalle, train_dvae, train_glide

HELP = "train a model on your own data"
FAMILIES = {"clip": train_clip, "dvae": train_dvae, "dalle": train_dalle, "glide": train_glide}


def add_arguments(parser, common) -> None:
    families = parser.add_subparsers(title="models", required=True, metavar="model")
    for name, module in FAMILIES.items():
        family = families.add_parser(name, help=module.HELP, description=module.HELP, parents=[common])
        family.set_defaults(run=module.run)
        module.add_arguments(family)
    for name in train_bert.MODELS:
        text = train_bert.HELP.format(name)
        family = families.add_parser(name, help=text, description=text, parents=[common])
        family.set_defaults(run=train_bert.run)
        train_bert.add_arguments(family, name)
