"""The train step in PyTorch, for `step.py` to measure beside ours."""

import contextlib
import os
import time

import numpy as np
import torch
from torch import nn

from benchmarks.torch_towers import TwoTower
from unicl_jax.augment import MEAN, STD
from unicl_jax.optimizer import NO_DECAY

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def augment(images, config):
    """`unicl_jax.augment` with PyTorch's random numbers: uint8 -> normalised float."""
    batch, height, width, _ = images.shape
    device = images.device
    if config["shift"]:
        most = config["shift"]
        offsets = torch.randint(-most, most + 1, (2, batch, 1), device=device)
        rows = (torch.arange(height, device=device) + offsets[0]).clamp(0, height - 1)
        columns = (torch.arange(width, device=device) + offsets[1]).clamp(0, width - 1)
        which = torch.arange(batch, device=device)[:, None, None]
        images = images[which, rows[:, :, None], columns[:, None, :]]
    if config["flip"]:
        flipped = torch.rand(batch, 1, 1, 1, device=device) < 0.5
        images = torch.where(flipped, images.flip(2), images)
    x = images.float()
    if config["color"]:
        gain = torch.rand(5, batch, 1, 1, 1, device=device)
        gain = 1 + config["color"] * (2 * gain - 1)
        x = x * gain[0] * gain[2:, :, 0, 0, 0].T[:, None, None]
        mean = x.mean((1, 2, 3), keepdim=True)
        x = ((x - mean) * gain[1] + mean).clamp(0, 255)
    return normalize(x)


def normalize(x):
    """`unicl_jax.augment.normalize`."""
    mean, std = (torch.tensor(c, device=x.device) for c in (MEAN, STD))
    return (x.float() / 255 - mean) / std


class Peer:
    """The model, its optimizer and some batches; times each part of a step."""

    def __init__(self, config, batches, model, mode, compile_mode):
        """Takes a config as a dict, host batches, a key of MODELS, eager or compile."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high")  # TF32 on GPU, as XLA has it
        torch.manual_seed(0)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._config, self._host = config, batches
        self._model = TwoTower(model, config["model"]).to(self._device)
        decayed, other = [], []
        for name, p in self._model.named_parameters():
            skip = p.ndim < 2 or name.split(".")[-1] in NO_DECAY
            (other if skip else decayed).append(p)
        options = config["optimizer"]
        groups = [
            {"params": decayed, "weight_decay": options["weight_decay"]},
            {"params": other, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=1e-5,  # small, so that nothing overflows: the work is the same
            betas=(options["b1"], options["b2"]),
            eps=options["eps"],
            fused=True,
        )
        self._loss = self._augmented_loss
        if mode == "compile":
            self._loss = torch.compile(self._augmented_loss, mode=compile_mode)
        self._batches = [self._put(batch) for batch in batches]
        self._calls = 0

    def describe(self):
        """What was built."""
        return {
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "threads": torch.get_num_threads(),
            "version": torch.__version__,
        }

    def weights_and_loss(self):
        """The weights at hand, and the loss of the first batch without augmentation."""
        batch = self._batches[0]
        with torch.no_grad(), self._autocast():
            loss = self._model(normalize(batch["image"]), batch)
        weights = {k: v.cpu().numpy() for k, v in self._model.state_dict().items()}
        return weights, float(loss)

    def warm_up(self):
        """Runs the first step, compiling if asked to; returns its seconds."""
        start = time.perf_counter()
        self.step()
        self._wait()
        return time.perf_counter() - start

    def time(self, part, calls):
        """Seconds a call of `transfer`, `forward`, `gradient` or `step`."""
        run = getattr(self, part)
        self._optimizer.zero_grad()
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self._wait()
        return (time.perf_counter() - start) / calls

    def transfer(self):
        """One batch to the device."""
        self._put(self._host[self._next()])

    def forward(self):
        """The loss, with what its gradient needs kept."""
        return self._loss(self._batches[self._next()])

    def gradient(self):
        """The loss and its gradient."""
        self._optimizer.zero_grad(set_to_none=True)
        self.forward().backward()

    def step(self):
        """All of a step."""
        self.gradient()
        clip = self._config["optimizer"]["clip_norm"]
        if clip:
            nn.utils.clip_grad_norm_(self._model.parameters(), clip)
        self._optimizer.step()

    def reset_device_peak(self):
        """Forgets the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def device_peak(self):
        """Peak bytes on the device, or None for the CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return None

    def _augmented_loss(self, batch):
        with self._autocast():
            return self._model(augment(batch["image"], self._config["augment"]), batch)

    def _autocast(self):
        dtype = DTYPES[self._config["model"]["dtype"]]
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype)

    def _put(self, batch):
        return {
            k: torch.from_numpy(np.ascontiguousarray(v)).to(self._device)
            for k, v in batch.items()
        }

    def _next(self):
        self._calls += 1
        return self._calls % len(self._host)

    def _wait(self):
        if self._device.type == "cuda":
            torch.cuda.synchronize()
