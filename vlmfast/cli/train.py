"""`vlmfast train MODEL`: one sub-command for each family of models."""

from . import train_clip, train_dalle, train_dvae

HELP = "train a model on your own pairs"
FAMILIES = {"clip": train_clip, "dvae": train_dvae, "dalle": train_dalle}


def add_arguments(parser, common) -> None:
    families = parser.add_subparsers(title="models", required=True, metavar="model")
    for name, module in FAMILIES.items():
        family = families.add_parser(name, help=module.HELP, description=module.HELP, parents=[common])
        family.set_defaults(run=module.run)
        module.add_arguments(family)
