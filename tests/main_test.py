"""The command itself, in processes of its own: stopped, killed, mistyped, and twice.

A tiny model on the quick start's data. TensorFlow and PyTorch are stubs that cannot be
imported, in every process here: this data needs neither.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from tiny_run import rows, saved

from unicl_jax import main
from unicl_jax.workdir import saved_steps

ROOT = Path(__file__).parents[1]
LIMIT = 240  # seconds until a process counts as hung; each takes a few
STEPS, EVERY = 200, 20  # long enough to be met by a signal, a few ms a step

RECIPE = """
from unicl_jax import config as config_lib

def get_config():
    c = config_lib.default()
    c.batch_size, c.total_steps = 16, {steps}
    c.model.image.name = "swin"
    c.model.image.image_size = 32
    c.model.image.patch_size = 8
    c.model.image.window_size = 2
    c.model.image.embed_dim = 8
    c.model.image.depths = {depths}
    c.model.image.num_heads = {depths}
    c.model.image.drop_path = 0.1
    c.model.text.name = "transformer"
    c.model.text.vocab_size = 600
    c.model.text.context_length = 40
    c.model.text.width = 32
    c.model.text.num_heads = 2
    c.model.text.num_layers = 1
    c.model.embed_dim = 16
    sources = dict(emoji_captions="image_text", fashion_mnist="image_label")
    for name, kind in sources.items():
        c.data.sources[name] = dict(format="quickstart", path=name, kind=kind)
    c.data.templates = "short"
    c.data.text_length = "{text_length}"
    c.augment.shift, c.augment.color = 2, 0.2
    c.optimizer.warmup_steps = 4
    # npz, to do without the quick start's baseline, which takes a second.
    c.evaluations.fashion = dict(format="npz", path="{held_out}", templates="short")
    c.evaluate_every_steps, c.checkpoint_every_steps = {every}, {every}
    c.log_every_steps = {log}
    return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recipes, a held-out set, and stubs in place of libraries that are not needed."""
    from unicl_jax.data import quickstart

    folder = tmp_path_factory.mktemp("main")
    images, labels, names = quickstart.fashion_mnist("test")
    held_out = folder / "held_out.npz"
    np.savez(held_out, images=images[:200], labels=labels[:200], class_names=names)
    for name, options in {
        "long": dict(steps=STEPS, every=EVERY, log=2, depths=(1, 1)),
        "short": dict(steps=6, every=3, log=1, depths=(1,), text_length="bucket"),
    }.items():
        options = dict(text_length="pack") | options
        recipe = RECIPE.format(held_out=held_out, **options)
        (folder / f"{name}.py").write_text(recipe)
    for library in ("tensorflow", "tensorflow_datasets", "torch"):
        (folder / "stubs" / library).mkdir(parents=True)
        (folder / "stubs" / library / "__init__.py").write_text(
            f"raise ImportError('{library} is not needed here')"
        )
    return folder


class Command:
    """`python -m unicl_jax.main` in a process of its own, on `devices` CPU devices."""

    def __init__(self, folder, recipe, workdir, *more, devices=1):
        self.workdir = folder / workdir
        path = [str(folder / "stubs"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "unicl_jax.main"),
                f"--config={folder / recipe}.py",
                f"--workdir={self.workdir}",
                *more,
            ],
            env={
                **os.environ,
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
            },
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_checkpoint_after(self, step):
        """Returns when a checkpoint of a later step is whole."""
        deadline = time.monotonic() + LIMIT
        while max(saved_steps(self.workdir), default=0) <= step:
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, f"hung: {self.end()}"
            time.sleep(0.005)
        return self

    def send(self, number):
        self.process.send_signal(number)
        return self

    def end(self):
        """Waits for the end: exit code, stdout, stderr. A hung process is killed."""
        try:
            out, err = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()  # not SIGTERM: jax's notifier would swallow it
            out, err = self.process.communicate()
            pytest.fail(f"hung for {LIMIT} s; it had said:\n{out}\n{err}")
        return self.process.returncode, out, err


# --- Killed and stopped.


@pytest.fixture(scope="module")
def uninterrupted(folder):
    code, out, err = Command(folder, "long", "uninterrupted").end()
    assert code == 0, err
    return folder / "uninterrupted", out, err


@pytest.fixture(scope="module")
def interrupted(folder):
    """One run met by kill -9, SIGTERM and Ctrl-C, each after a new checkpoint."""
    ends, step = {}, 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        command = Command(folder, "long", "interrupted")
        command.wait_for_checkpoint_after(step).send(number)
        ends[number] = command.end()
        step = max(saved_steps(command.workdir))
    ends["last"] = Command(folder, "long", "interrupted").end()
    return folder / "interrupted", ends


def test_the_command_trains_without_tensorflow_and_says_what_came_of_it(uninterrupted):
    workdir, out, err = uninterrupted
    assert "Traceback" not in err
    assert f"step {STEPS}/{STEPS}" in out
    assert re.search(r"fashion .* 10 ", out)  # the table: ten ways
    assert "curves.png" in out
    expected = ["checkpoints", "concepts.json", "config.json", "curves.png"]
    expected += ["metrics.jsonl", "predictions.png", "records.json", "tensorboard"]
    assert sorted(p.name for p in workdir.iterdir()) == expected


def test_a_killed_run_ends_as_killed_and_the_same_command_goes_on(interrupted):
    _, ends = interrupted
    assert ends[signal.SIGKILL][0] == -signal.SIGKILL
    # The next start, stopped in its turn, began at a checkpoint.
    step = re.search(r"going on from step (\d+) of", ends[signal.SIGTERM][1])[1]
    assert int(step) % EVERY == 0


@pytest.mark.parametrize(
    "number, code, after",
    [(signal.SIGTERM, 143, signal.SIGINT), (signal.SIGINT, 130, "last")],
)
def test_a_signal_saves_and_says_that_the_same_command_goes_on(
    interrupted, number, code, after
):
    _, ends = interrupted
    found, _, err = ends[number]
    assert found == code
    said = err.strip().splitlines()[-1]
    step = re.fullmatch(
        r"stopped at step (\d+), saved\. The same command goes on from there\.", said
    )[1]
    assert "Traceback" not in err
    assert f"going on from step {step} of {STEPS}" in ends[after][1]


def test_however_it_was_interrupted_the_run_ends_in_the_same_bits(
    interrupted, uninterrupted
):
    (workdir, ends), expected = interrupted, uninterrupted[0]
    assert ends["last"][0] == 0, ends["last"][2]
    a, b = saved(workdir), saved(expected)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
    assert a["['step']"] == STEPS
    assert rows(workdir) == rows(expected)


# --- Several processes.


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_train_as_one_with_the_same_devices(folder):
    """2 processes x 2 devices over loopback, and 1 process x 4.

    The slowest test here: with several processes jax's compile cache serves only the
    first one.
    """
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    together = [
        Command(
            *(folder, "short", "two", address),
            *("--num_processes=2", f"--process_id={i}"),
            devices=2,
        )
        for i in range(2)
    ]
    try:
        ends = [command.end() for command in together]
    finally:
        for command in together:
            command.process.kill()
    for code, _, err in ends:
        assert code == 0, err
    assert "step 5/6" in ends[0][1]
    # One process talks; Gloo does in each, from threads that cut each other's lines.
    gloo = re.compile(r"Gloo|peer ranks|^\s*$")
    assert [line for line in ends[1][1].splitlines() if not gloo.search(line)] == []
    code, _, err = Command(folder, "short", "one", devices=4).end()
    assert code == 0, err
    two, one = rows(folder / "two"), rows(folder / "one")
    assert len(two) == len(one) == 6 + 2
    for a, b in zip(two, one, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key.startswith("eval/") or key in ("step", "label_share"):
                assert a[key] == b[key], key
            else:
                # Not bit-equal: between processes the sums over devices are Gloo's,
                # in another order than XLA's own, and float32 rounds at 6e-8. AdamW
                # divides a gradient by its size, so one that is all round-off (a
                # key's bias has none) still moves, some other way: 2e-5 were seen.
                rel = 1e-3 if key == "update_norm" else 1e-5
                assert a[key] == pytest.approx(b[key], rel=rel), key


@pytest.mark.parametrize(
    ("several", "code", "at_once"),
    [(False, 2, False), (True, 0, False), (True, 1, True), (True, 2, True)]
    + [(True, 128 + signal.SIGINT, True)]
    + [(True, 128 + signal.SIGTERM, False)],  # all stop at one step, after saving
)
def test_one_that_fails_among_several_processes_does_not_wait_for_them(
    several, code, at_once, monkeypatch
):
    left = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: several)
    monkeypatch.setattr(os, "_exit", left.append)
    with pytest.raises(SystemExit) as ended:
        main.leave(code)
    assert ended.value.code == code and left == [code] * at_once


@pytest.mark.parametrize("several", [False, True])
def test_an_unforeseen_error_among_several_processes_is_a_code(
    several, monkeypatch, capsys
):
    def fail(*args):
        raise OSError("no such disk")

    monkeypatch.setattr(main, "parse", fail)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: several)
    if several:
        assert main.main([]) == main.FAILED
        assert "OSError: no such disk" in capsys.readouterr().err
    else:
        with pytest.raises(OSError, match="no such disk"):
            main.main([])


# --- Mistyped, and the like: in this process.


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `main` on some flags; returns the exit code and the lines of stderr."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        for name in ("config", "workdir", "coordinator_address", "num_processes"):
            flags.FLAGS[name].unparse()
        _forget_overrides()
        flags.FLAGS.unparse_flags()
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])  # overrides: from it
        code = main.main(sys.argv)
        return code, capsys.readouterr().err.splitlines()

    yield run
    for name in ("config", "workdir", "coordinator_address", "num_processes"):
        flags.FLAGS[name].unparse()
    _forget_overrides()


def _forget_overrides():
    """What overrides a config defines itself, and would be there twice."""
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)


# ml_collections reads recipes by a method that Python 3.12 deprecates.
load_module = pytest.mark.filterwarnings(r"ignore:.*load_module\(\):DeprecationWarning")
QUICKSTART = "--config=configs/quickstart.py"


@load_module
@pytest.mark.parametrize(
    "arguments, said",
    [
        ((QUICKSTART, "--workdir={}", "--wrkdir=x"), "wrkdir"),
        ((QUICKSTART, "--workdir={}", "--num_processes=x"), "num_processes"),
        ((QUICKSTART, "--workdir={}", "train"), "flags must start with --: got train"),
        ((QUICKSTART,), "--workdir must be given"),
        (("--workdir={}",), "--config must be given"),
        (("--config=configs/none.py", "--workdir={}"), 'there is no "configs/none.py"'),
        (("--config", "configs/none.py", "--workdir={}"), '"configs/none.py"'),
        ((f"{QUICKSTART}:none", "--workdir={}"), 'no variant "none"'),
        (
            (QUICKSTART, "--workdir={}", "--config.batchsize=8"),
            'did you mean "batch_size"?',
        ),
        (
            (QUICKSTART, "--workdir={}", "--config.optimizer.lerning_rate=8"),
            'did you mean "learning_rate"?',
        ),
        ((QUICKSTART, "--workdir={}", "--config.zzz=8"), "zzz"),
        ((QUICKSTART, "--workdir={}", "--config.total_steps=many"), "total_steps"),
        ((QUICKSTART, "--workdir={}", "--config.batch_size=12"), "are 8 and 16."),
        (
            (QUICKSTART, "--workdir={}", "--config.model.image.window_size=3"),
            "window_size must divide stage 0's resolution 8",
        ),
        (
            (QUICKSTART, "--workdir={}", "--config.model.image.remta=True"),
            'model.image: "swin" has no option "remta"; did you mean "remat"?',
        ),
        (
            (QUICKSTART, "--workdir={}", "--config.model.text.causal=no"),
            "model.text.causal must be True or False: got 'no'.",
        ),
        (
            (QUICKSTART, "--workdir={}", "--config.model.image.depths=3"),
            "model.image.depths must be tuple, as (1, 4) is: got 3.",
        ),
        ((QUICKSTART, "--workdir={}", "--num_processes=2"), "must be given together"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_a_mistake_in_the_command_gets_one_line_and_exit_code_2(
    command, tmp_path, arguments, said
):
    workdir = tmp_path / "run"
    code, lines = command(*(a.replace("{}", str(workdir)) for a in arguments))
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert said in lines[0]
    assert not workdir.exists()


@load_module
def test_any_option_of_a_tower_can_be_set(command, tmp_path, monkeypatch):
    """Those that the recipe leaves at their defaults, too."""
    runs = []
    monkeypatch.setattr(main.train, "run", lambda config, workdir: runs.append(config))
    options = ["image.remat=True", "image.name=swin_small", "text.eps=1e-5"]
    options += ["image.window_size=2", "image.depths=(2,2)", "text.activation=gelu"]
    options += ["text.causal=false", "text.scan=true"]
    flags_given = [f"--config.model.{option}" for option in options]
    code, lines = command(QUICKSTART, f"--workdir={tmp_path}/run", *flags_given)
    assert (code, lines) == (0, [])
    (config,) = runs
    image, text = config.model.image, config.model.text
    assert (image.remat, image.name, image.window_size) == (True, "swin_small", 2)
    assert (image.depths, text.eps, text.activation) == ((2, 2), 1e-5, "gelu")
    assert (text.causal, text.scan) == (False, True)
    assert config.is_locked and image.is_locked


@load_module
def test_a_recipe_with_a_syntax_error_shows_where(command, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n    pass\n")
    with pytest.raises(SyntaxError) as caught:
        command(f"--config={tmp_path}/broken.py", f"--workdir={tmp_path}/run")
    assert caught.value.filename.endswith("broken.py") and caught.value.lineno == 1


@load_module
def test_a_loss_that_is_no_number_has_an_exit_code_of_its_own(folder, command):
    code, err = command(
        f"--config={folder}/short.py",
        f"--workdir={folder}/non_finite",
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.warmup_steps=1",
    )
    assert code == 3
    assert re.match(r"error: loss and gradients must be finite: step \d", err[-1])


@load_module
@pytest.mark.parametrize("field", ["zz", "mix.prob", "data.sources.none.path"])
def test_a_field_that_is_like_no_other_is_named(field, command):
    code, err = command(QUICKSTART, f"--config.{field}=0.5")
    name = field.split(".")[-2 if "none" in field else -1]
    assert code == 2 and f'there is no config field "{name}"' in err[-1]


def test_from_the_shell_a_mistake_has_no_traceback(folder):
    code, out, err = Command(folder, "long", "typo", "--config.batchsize=8").end()
    assert (code, out) == (2, "")
    assert err.startswith('error: there is no config field "batchsize"; did you mean')
    assert len(err.splitlines()) == 1
    assert not (folder / "typo").exists()


def test_help_lists_the_flags(folder):
    code, out, err = Command(folder, "long", "help", "--help").end()
    assert code in (0, 1)  # absl's exit code for --help is 1
    assert "--workdir" in out + err and "--config" in out + err
    assert "error" not in err
