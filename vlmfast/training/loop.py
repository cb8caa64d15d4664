"""The training loop."""

import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import state as saved
from .config import TrainConfig
from .contrastive import Objective, accumulate_gradient, chunk_sizes
from .distributed import this_process
from .log import CURVE_NAME, JSONLog, draw_curve
from .schedule import WeightAverage, learning_rate, make_optimizer


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step, total: optimizer steps taken, and of the whole run.
        interrupted: stopped before its end by Ctrl-C, SIGTERM or `stop_after`; it can be resumed.
        validation: figures of the last validation.
        records: lines of the log.
    """

    step: int
    total: int
    interrupted: bool
    validation: dict[str, float]
    records: list[dict] = field(repr=False)


class Trainer:
    """Trains a dual encoder on pairs.

    Args:
        model: `model(image, text)` -> unit features and scale (see `CLIPOutput`), with parameter `logit_scale` (a
            logarithm) and perhaps `logit_bias`; lies on `device`.
        loader: a `vlmfast.data.PairLoader` or another one of `vlmfast.training.loaders`; its share is this process's.
        config: settings.
        out: folder for checkpoints, log and curve; None writes nothing.
        validate: called with the model in eval mode after each epoch, on the first process; returns numbers.
        resume: go on from the checkpoint in `out`; config and data must be those of the first part.
        device: None takes CUDA if there is a GPU.
        progress: show a progress bar.
        save_model: writes the model into a folder; None takes `vlmfast.checkpoints.save_pretrained`.

    Raises:
        ValueError: settings, data or checkpoint do not fit. FileNotFoundError: nothing to resume.
    """

    def __init__(self, model: nn.Module, loader, config: TrainConfig, *, out: str | Path | None = None,
                 validate: Callable[[nn.Module], dict[str, float]] | None = None, resume: bool = False,
                 device: torch.device | str | None = None, progress: bool = True,
                 save_model: Callable[[nn.Module, Path], object] | None = None):
        self.process = this_process(device)
        if config.amp == "fp16" and self.process.device.type != "cuda":
            raise ValueError(f"Trainer: amp is 'fp16' on {self.process.device.type}, must be 'bf16' or 'none' there")
        if config.objective == "siglip" and getattr(model, "logit_bias", None) is None:
            raise ValueError("Trainer: objective is 'siglip', the model has no logit_bias")
        if resume and out is None:
            raise ValueError("Trainer: resume needs out, the folder of the run")
        self.model, self.loader, self.config = model, loader, config
        self.out = None if out is None else Path(out)
        self.validate, self.progress, self.save_model = validate, progress, save_model
        self.per_epoch = len(loader)
        self.total = config.steps or config.epochs * self.per_epoch
        self.step, self.seconds = 0, 0.0
        self.objective = Objective(config.objective, config.label_smoothing, self.process.group)
        self.validation: dict[str, float] = {}
        self._stop = False

        saved.seed_everything(config.seed, self.process.rank)
        model.to(self.process.device)
        if self.process.world > 1:
            ids = [self.process.device.index] if self.process.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(model, device_ids=ids)
        else:
            self.wrapped = model
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=config.amp == "fp16")
        self.average = WeightAverage(model, config.ema) if config.ema else None
        if resume:
            self._resume()
        if self.out is not None and self.process.first:
            self.out.mkdir(parents=True, exist_ok=True)
        self.log = JSONLog(self.out if self.process.first else None, self.step)

    def run(self, stop_after: int | None = None) -> TrainResult:
        """Trains to the end, or until step `stop_after`; both ends write a checkpoint.

        Raises:
            NonFiniteLoss: the loss or the gradient is not finite; the last checkpoint stays as it was.
        """
        last = self.total if stop_after is None else min(stop_after, self.total)
        self.wrapped.train()
        with self._signals(), self._bar() as bar:
            while self.step < last and not self._stop:
                epoch, first = divmod(self.step, self.per_epoch)
                self.loader.set_epoch(epoch, first)
                for batch in self.loader:
                    self._train_step(batch, epoch, bar)
                    every = self.config.save_every
                    if self._stop or self.step >= last:
                        break
                    if every and self.step % every == 0 and self.step % self.per_epoch:
                        self.save()
                self._close_epoch(epoch)
        return TrainResult(self.step, self.total, self.step < self.total, self.validation, self.log.records)

    def _close_epoch(self, epoch: int) -> None:
        """Validates where an epoch or the run is complete; always saves."""
        if self.validate is not None and (self.step % self.per_epoch == 0 or self.step == self.total):
            start = time.perf_counter()
            if self.process.first:
                with self._evaluation():
                    self.validation = self.validate(self.model)
                self.log.write(step=self.step, epoch=epoch + 1, validation=self.validation,
                               seconds=round(self.seconds + time.perf_counter() - start, 3))
            self._barrier()
            self.seconds += time.perf_counter() - start
        self.save()

    def add_gradient(self, batch: tuple, factor: Tensor) -> tuple[Tensor, dict]:
        """Adds the gradient of the batch's loss, times `factor`; returns the loss [] and figures for the log, those
        under "parts" also for the progress bar."""
        loss, accuracy = accumulate_gradient(self.wrapped, *batch, self.objective, self.config.accumulate,
                                             autocast=self._autocast, loss_factor=factor)
        return loss, {"accuracy": accuracy}

    def after_step(self) -> dict:
        """What the weights need after each optimizer step; returns figures for the log."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, math.log(100.0))
        return {"logit_scale": self.model.logit_scale.exp().item()}

    def examples(self, batch: tuple) -> int:
        """How many of them a batch has."""
        return len(batch[0])

    def _train_step(self, batch, epoch: int, bar) -> None:
        start = time.perf_counter()
        device, config = self.process.device, self.config
        batch = tuple(part.to(device, non_blocking=True) for part in batch)
        lr = learning_rate(self.step, self.total, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        factor = self.scaler.scale(torch.ones((), device=device))
        loss, figures = self.add_gradient(batch, factor)
        value = loss.item()
        if not math.isfinite(value):
            raise saved.NonFiniteLoss(self._failure(f"the loss is {value}", lr))
        self.scaler.unscale_(self.optimizer)
        if config.max_grad_norm:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm).item()
            if not math.isfinite(norm) and not self.scaler.is_enabled():
                raise saved.NonFiniteLoss(self._failure(f"the norm of the gradient is {norm}", lr))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        figures = {**self.after_step(), **figures}
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        self._agree_on_stop()

        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        count = self.examples(batch) * self.process.world
        parts = figures.get("parts", {})
        bar.set_postfix(loss=f"{value:.3f}", refresh=False,
                        **{name: f"{x:.3f}" for name, x in parts.items() if len(parts) > 1})
        bar.update(count)
        if self.process.first and (self.step % config.log_every == 0 or self.step == self.total):
            self.log.write(step=self.step, epoch=epoch + 1, loss=value, lr=lr, **figures,
                           images_per_second=round(count / elapsed, 1), seconds=round(self.seconds, 3))

    def _failure(self, what: str, lr: float) -> str:
        kept = "nothing was saved yet"
        if self.out is not None and (self.out / saved.STATE_NAME).exists():
            kept = f"the last checkpoint in {self.out} is untouched"
        return f"training stopped at step {self.step + 1}: {what} (learning rate {lr:.3g}); {kept}. " \
               "Try a lower learning rate, a longer warm-up, or amp none"

    def _autocast(self):
        if self.config.amp == "none":
            return nullcontext()
        dtype = torch.bfloat16 if self.config.amp == "bf16" else torch.float16
        return torch.autocast(self.process.device.type, dtype=dtype)

    @contextmanager
    def _bar(self):
        from tqdm.auto import tqdm

        size = self.loader.batch_size * self.process.world
        with tqdm(total=self.total * size, initial=self.step * size, unit="img", desc="training", smoothing=0.05,
                  disable=not (self.progress and self.process.first)) as bar:
            yield bar

    @contextmanager
    def _signals(self):
        """The first Ctrl-C or SIGTERM ends the run after the step under way; the second Ctrl-C at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number, frame):
            if self._stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _agree_on_stop(self) -> None:
        """All processes leave at the same step, also when only one got the signal."""
        if self.process.world > 1:
            flag = torch.tensor(float(self._stop), device=self.process.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self._stop = bool(flag.item())

    def _barrier(self) -> None:
        if self.process.world > 1:
            dist.barrier()

    @contextmanager
    def _evaluation(self):
        """Eval mode, averaged weights if there are any, generators as they were afterwards."""
        random = saved.random_states(self.process.device)
        present = None
        if self.average is not None:
            present = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self.average.values)
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            if present is not None:
                self.model.load_state_dict(present)
            self.model.train()
            saved.set_random_states(random, self.process.device)

    def use_average(self) -> None:
        """Puts the averaged weights, if there are any, into the model for good: what a finished run is judged by."""
        if self.average is not None:
            self.model.load_state_dict(self.average.values)
        self.model.eval()

    def save(self) -> None:
        """Writes the checkpoint: first what resuming needs, then the model for users and the curve."""
        if self.out is None:
            return
        random = saved.gather_random_states(self.process.device)
        if self.process.first:
            saved.write_state(self.out, {
                "step": self.step, "seconds": self.seconds, "config": self.config.to_dict(),
                "data": self._data(), "random": random,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
            })
            with self._evaluation():
                self._write_model()
            self.draw(self.out / CURVE_NAME)
        self._barrier()

    def draw(self, path: Path) -> None:
        """Draws the curve of the log."""
        draw_curve(self.log.records, path)

    def _data(self) -> dict[str, int]:
        """What decides the order of the pairs."""
        return {"processes": self.process.world, "batch size": self.loader.batch_size,
                "batches per epoch": len(self.loader), "data seed": self.loader.seed}

    def _write_model(self) -> None:
        if self.save_model is not None:
            self.save_model(self.model, self.out)
            return
        from ..checkpoints import save_pretrained

        save_pretrained(self.model, self.out)

    def _resume(self) -> None:
        state = saved.read_state(self.out)
        config = TrainConfig.from_dict(state["config"])
        for name, value in config.to_dict().items():
            given = getattr(self.config, name)
            if given != value:
                raise ValueError(f"resume: {name} is {given!r}, the run in {self.out} has {value!r}")
        for name, given in self._data().items():
            if state["data"][name] != given:
                raise ValueError(f"resume: {name} is {given} now, it was {state['data'][name]} in {self.out}")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"resume: the checkpoint in {self.out} is of another model ({reason})") from error
        self.step, self.seconds = state["step"], state["seconds"]
        saved.set_random_states(state["random"][self.process.rank], self.process.device)


class LossTrainer(Trainer):
    """Trains any model on a loss that is a mean over samples.

    Args:
        loss: `loss(model, *batch)` -> (loss [], figures for the log by name); the batch's tensors lie side by side
            along their first dimension, and `config.accumulate` chunks of them are taken one after the other.
        options: see `Trainer`.
    """

    def __init__(self, model: nn.Module, loader, config: TrainConfig,
                 loss: Callable[..., tuple[Tensor, dict[str, float]]], **options):
        super().__init__(model, loader, config, **options)
        self.loss = loss

    def add_gradient(self, batch: tuple[Tensor, ...], factor: Tensor) -> tuple[Tensor, dict]:
        sizes = chunk_sizes(len(batch[0]), self.config.accumulate)
        total, figures = torch.zeros((), device=batch[0].device), {}
        for i, part in enumerate(zip(*(x.split(sizes) for x in batch), strict=True)):
            last = i == len(sizes) - 1
            share = sizes[i] / len(batch[0])
            with self.wrapped.no_sync() if self.wrapped is not self.model and not last else nullcontext():
                with self._autocast():
                    loss, found = self.loss(self.wrapped, *part)
                (loss * share * factor).backward()
            total += loss.detach() * share
            for name, value in found.items():
                figures[name] = figures.get(name, 0.0) + float(value) * share
        return total, figures

    def after_step(self) -> dict:
        return {}


def train(model: nn.Module, loader, config: TrainConfig | None = None, *, stop_after: int | None = None,
          **options) -> TrainResult:
    """Trains `model` in place on `loader`'s batches; `options` are the keyword arguments of `Trainer`.

    Equivalent to::

        trainer = Trainer(model, loader, config, **options)
        result = trainer.run(stop_after)
        if not result.interrupted:
            trainer.use_average()
    """
    trainer = Trainer(model, loader, config or TrainConfig(), **options)
    result = trainer.run(stop_after)
    if not result.interrupted:
        trainer.use_average()
    return result
