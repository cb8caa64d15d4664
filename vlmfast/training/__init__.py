"""One training loop for image-text models: exact large batches, resume bit for bit, `torchrun`."""

from .config import TrainConfig
from .diffusion import DiffusionTrainer
from .dvae import DVAEObjective, DVAETrainer
from .loaders import StreamLoader, TensorLoader
from .loop import LossTrainer, Trainer, TrainResult, train
from .schedule import learning_rate
from .state import NonFiniteLoss

__all__ = [
    "DVAEObjective",
    "DVAETrainer",
    "DiffusionTrainer",
    "LossTrainer",
    "NonFiniteLoss",
    "StreamLoader",
    "TensorLoader",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "learning_rate",
    "train",
]
