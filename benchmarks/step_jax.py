"""The project's own model, data, train step and trainer, for `step.py` to measure."""

import contextlib
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from unicl_jax import data, encoders, losses, sharding
from unicl_jax.augment import make_views, normalize
from unicl_jax.encoders.weights import from_arrays
from unicl_jax.objectives import make_objective
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import init_state, make_train_step

BATCHES = 4  # different ones, taken in turn


def make_iterator(config):
    """The trainer's iterator of a config."""
    text = config.model.text
    return data.make_train_iterator(
        config.data,
        config.model.image.image_size,
        config.batch_size,
        config.seed,
        data.Tokenizer(text.context_length, text.vocab_size),
        local_devices=jax.local_device_count(),
    )


class Ours:
    """The train step as `train.run` compiles it; times each part of it."""

    def __init__(self, config, cached=False):
        """Takes a config as a dict; builds all but compiles nothing yet."""
        jax.config.update("jax_enable_compilation_cache", cached)
        config = self._config = ConfigDict(config)
        self._on_cpu = jax.default_backend() == "cpu"
        self._mesh = sharding.make_mesh()
        # The generator behind the iterator: the same work, without its thread.
        self._reader = make_iterator(config)._batches(0)
        self.host_batches = [next(self._reader) for _ in range(BATCHES)]
        self._batches = [self._put(batch) for batch in self.host_batches]
        self._model = encoders.from_config(config.model)
        self._optimizer, schedule = make_optimizer(config.optimizer, config.total_steps)
        self._loss = losses.sharded(losses.unicl_loss_and_aux, self._mesh)
        objective = make_objective(config.objective, self._model, self._mesh)
        self._make_views = make_views(config.augment)
        self._seed = config.seed
        whole = sharding.replicated(self._mesh)
        rows = sharding.over_batch(self._mesh)
        self._state = jax.jit(
            lambda: init_state(self._model, objective, self._optimizer, self._seed),
            out_shardings=whole,
        )()
        self._step = jax.jit(
            make_train_step(
                self._model,
                objective,
                self._optimizer,
                schedule,
                self._make_views,
                seed=self._seed,
            ),
            in_shardings=(whole, rows, None),
            out_shardings=(whole, whole),
            donate_argnums=0,
        )
        self._calls, self._steps = 0, 0

    def describe(self):
        """What was built, and on what."""
        device = jax.devices()[0]
        params = jax.tree.leaves(self._state.params)
        return {
            "backend": jax.default_backend(),
            "device_kind": device.device_kind,
            "devices": jax.device_count(),
            "parameters": sum(p.size for p in params),
            "text_rows": self.host_batches[0]["tokens"].shape[0],
            "version": jax.__version__,
        }

    def batches(self):
        """The host batches."""
        return self.host_batches

    def compile_step(self):
        """Compiles the step from nothing; its seconds, memory and operations."""
        start = time.perf_counter()
        lowered = self._step.lower(self._state, self._batches[0], np.int32(0))
        traced = time.perf_counter()
        self._step = lowered.compile()
        done = time.perf_counter()
        memory, cost = self._step.memory_analysis(), self._step.cost_analysis() or {}
        return {
            "trace_seconds": traced - start,
            "compile_seconds": done - traced,
            "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
            "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
            "flops": cost.get("flops"),
        }

    def compile_parts(self):
        """Compiles the loss, and the loss with its gradient."""

        def loss(params, model_state, batch, step):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 3)
            images = self._make_views(keys[0], batch["image"]).images[:, 0]
            return self._embed_and_compare(params, model_state, images, batch, keys)

        arguments = self._arguments()
        self._forward = jax.jit(loss).lower(*arguments).compile()
        self._gradient = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()

    def loss_of(self, weights):
        """The first batch's loss, not augmented, by weights in UniCL's layout."""
        model = {k: dict(self._config.model[k]) for k in ("image", "text")}
        params = from_arrays(weights, "unicl", **model).params
        batch = self._batches[0]

        @jax.jit
        def loss(params, model_state, batch):
            images = normalize(batch["image"])
            keys = jax.random.split(jax.random.key(0), 3)
            return self._embed_and_compare(params, model_state, images, batch, keys)

        return float(loss(params, self._state.model_state, batch))

    def time(self, part, calls):
        """Seconds a call of `data`, `transfer`, `forward`, `gradient` or `step`."""
        run = getattr(self, part)
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
            if self._on_cpu:  # else calls that don't depend on each other overlap
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    def data(self):
        """Reads one batch: plan, gather or decode, prompts, tokens."""
        return next(self._reader)["image"]

    def transfer(self):
        """One batch to the device."""
        return self._put(self.host_batches[self._next()])

    def forward(self):
        """The loss alone."""
        return self._forward(*self._arguments())

    def gradient(self):
        """The loss and its gradient."""
        return self._gradient(*self._arguments())

    def step(self):
        """All of a step."""
        batch, step = self._batches[self._next()], np.int32(self._steps)
        self._state, metrics = self._step(self._state, batch, step)
        self._steps += 1
        return metrics["loss"]

    def reset_device_peak(self):
        """Nothing to do: asked for before anything larger than a step has run."""

    def device_peak(self):
        """Peak bytes on the device, or None for the CPU."""
        statistics = jax.devices()[0].memory_stats() or {}
        return None if self._on_cpu else statistics.get("peak_bytes_in_use")

    def _embed_and_compare(self, params, model_state, images, batch, keys):
        u, model_state = self._model.encode_image(
            params, model_state, images, train=True, key=keys[1]
        )
        v, _ = self._model.encode_text(
            params, model_state, batch["tokens"], train=True, key=keys[2]
        )
        if "text_index" in batch:
            v = v[batch["text_index"]]
        scale = self._model.logit_scale(params)
        return self._loss(u, v, batch["label"], scale)[0].mean()

    def _arguments(self):
        batch = self._batches[self._next()]
        return self._state.params, self._state.model_state, batch, jnp.int32(0)

    def _put(self, batch):
        return sharding.global_batch(self._mesh, batch)

    def _next(self):
        self._calls += 1
        return self._calls % BATCHES


class Trainer:
    """`train.run` itself, logging and all, for a few steps."""

    def __init__(self, config, cache):
        """Takes a config as a dict, and a folder for compiled steps."""
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        self._config, self._ours = ConfigDict(config), None

    def alone(self, calls):
        """Seconds a call of the compiled step, in this very process."""
        if self._ours is None:
            self._ours = Ours(self._config, cached=True)
            self._ours.time("step", 2)
        return self._ours.time("step", calls)

    def run(self, workdir):
        """Trains; the seconds a step and the wait for data that its log lines show."""
        from unicl_jax import metrics, train

        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            train.run(self._config, workdir)
        lines = metrics.read(Path(workdir))
        laps = [x for x in lines if "step_seconds" in x]
        # The first began with batches read ahead while the step was compiled.
        return [(x["step_seconds"], x["data_wait"]) for x in laps[1:]]
