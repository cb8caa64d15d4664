"""One process of tests/training/test_training_pretraining.py."""

import sys
from pathlib import Path

import torch
from pretraining_training_helpers import tiny_uniter, toy_loader, toy_pairs

from vlmfast.objectives import PretrainingBatch
from vlmfast.objectives.common import PretrainingLoss
from vlmfast.training import TrainConfig
from vlmfast.training.distributed import torchrun
from vlmfast.training.pretraining import ObjectiveTrainer, given_fields

CONFIG = TrainConfig(steps=3, lr=1e-2, weight_decay=0.01)


def plain_loss(model, image, text, step):
    """A mean over examples without draws, of another head in every step."""
    batch = PretrainingBatch(**given_fields(image), **given_fields(text))
    out = model(**batch.inputs(), heads=("itm",) if step % 2 else ())
    used = out.logits["itm"] if step % 2 else out.pooled
    parts = {"square": used.square().mean(), "sine": used.sin().mean()}
    return PretrainingLoss(sum(parts.values()), parts)


def main(folder: Path, out: Path) -> None:
    with torchrun("cpu") as process:
        pairs = toy_pairs(folder / f"data{process.rank}")
        model = tiny_uniter(seed=process.rank, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        loader = toy_loader(pairs, 10 // process.world, rank=process.rank, world_size=process.world)
        trainer = ObjectiveTrainer(model, loader, CONFIG, plain_loss, device="cpu", progress=False)
        result = trainer.run()
        torch.save({"model": model.state_dict(), "losses": [r["loss"] for r in result.records]},
                   out / f"rank{process.rank}of{process.world}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
