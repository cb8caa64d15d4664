"""One process of tests/training/test_training_distributed.py."""

import sys
from pathlib import Path

import torch
from training_helpers import tiny_batch, tiny_model

from vlmfast.training import TensorLoader, TrainConfig, Trainer
from vlmfast.training.distributed import torchrun

CONFIG = TrainConfig(steps=4, lr=1e-2)


def loaders(world: int):
    images, tokens = tiny_batch()
    return [TensorLoader(images, tokens, 6, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), rank=rank, world_size=world)
            for rank in range(world)]


class Double:
    """The loader in float64, so that two processes and one differ by rounding only."""

    def __init__(self, loader):
        self.loader = loader
        self.batch_size, self.seed, self.set_epoch = loader.batch_size, loader.seed, loader.set_epoch

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ((images.double(), tokens) for images, tokens in self.loader)


def main(out: Path, chunks: int) -> None:
    with torchrun("cpu") as process:
        config = TrainConfig(**{**CONFIG.to_dict(), "accumulate": chunks})
        model = tiny_model(seed=process.rank).double()  # all start from the first one's weights nevertheless
        trainer = Trainer(model, Double(loaders(process.world)[process.rank]), config, device="cpu", progress=False,
                          out=out / "run", save_model=lambda model, folder: None)
        result = trainer.run()
        losses = [record["loss"] for record in result.records]
        assert len(losses) == (CONFIG.steps if process.first else 0), "only the first process logs"
        torch.save({"losses": losses, "model": model.state_dict()}, out / f"rank{process.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
