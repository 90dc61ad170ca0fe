"""The plan: its parts against numbers worked by hand, the command end to end."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from unicl_jax import exit_codes, plan, sharding
from unicl_jax.errors import InputError
from unicl_jax.planning import (
    advice,
    compiling,
    hlo,
    jaxpr,
    network,
    plans,
    report,
    roofline,
)
from unicl_jax.planning.batch import make_batch, mean_slots
from unicl_jax.planning.chips import CHIPS, GIB
from unicl_jax.planning.jaxpr import Work
from unicl_jax.planning.network import Collective
from unicl_jax.planning.topology import parse_topology

ROOT = Path(__file__).parents[1]


def recipe(name, variant=""):
    found = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    return found["get_config"](*([variant] if variant else []))


def mesh_of(devices, fsdp=1, tensor=1):
    shape = devices // fsdp // tensor, fsdp, tensor
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


# Topologies.


def test_topologies_of_tpus_and_gpus():
    pod = parse_topology("v5e:16x16")
    assert (pod.chips, pod.devices, pod.hosts) == (256, 256, 64)
    assert parse_topology("v5e:2x4").hosts == 1
    assert parse_topology("v5p:4x4x8").hosts == 32
    assert parse_topology("h100:2x8").shape == (2, 8)
    assert parse_topology("H100:8").hosts == 1
    assert parse_topology("v7x:2x2x1").devices == 8  # a chip is two


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v9:4x4", "known chips: v4, v5e"),
        ("v5e:4x4x4", "v5e:4x4, v5e:4x8"),
        ("v5e:32x32", "at most 256 chips"),
        ("v5p:4x4", "3 axes"),
        ("h100:2x2x2", "hosts x GPUs"),
        ("v5e:4x", "v5e:2x2"),
        ("h100:0", "hosts x GPUs"),
    ],
)
def test_wrong_topologies_list_right_ones(text, said):
    with pytest.raises(InputError, match=said):
        parse_topology(text)


def test_every_chip_says_where_its_numbers_come_from():
    for chip in CHIPS.values():
        assert len(chip.sources) > 10, chip.name
        assert chip.bf16 >= chip.f32 > chip.bandwidth > chip.link > 1e9, chip.name
        assert (chip.axes > 0) == (chip.kind == "tpu") == (chip.network == 0)


@pytest.mark.parametrize(
    ("name", "cores", "boost"),
    [("v100", 5120, 1.53e9), ("t4", 2560, 1.59e9), ("rtx4090", 16384, 2.52e9)],
)
def test_float32_peaks_are_cores_times_clock(name, cores, boost):
    # Of the last one TF32 is as fast as its cores are.
    assert CHIPS[name].f32 == pytest.approx(2 * cores * boost, rel=0.01)


# Time on links.


def test_an_all_gather_on_a_full_pod_of_v5e():
    # Two axes of 16, both closed: 4 links of 50 GB/s; 255/256 of 1 GB has to come in,
    # and 8 hops on each axis.
    topology = parse_topology("v5e:16x16")
    taken = network.seconds(Collective("all-gather", 1e9, 256), topology)
    assert taken == pytest.approx(1e9 * 255 / 256 / 200e9 + 16e-6)


def test_an_all_reduce_is_two_of_it_and_a_line_has_half():
    topology = parse_topology("v5e:4x4")  # not closed: lines of 4
    taken = network.seconds(Collective("all-reduce", 1e9, 16), topology)
    assert taken == pytest.approx(2 * (1e9 * 15 / 16 / 100e9 + 6e-6))


def test_a_group_along_one_axis_has_that_axis_alone():
    topology = parse_topology("v5p:4x4x4")  # a cube: closed
    one = Collective("reduce-scatter", 1e9, 4, spans=(1, 1, 4))
    assert network.seconds(one, topology) == pytest.approx(0.75 * 1e9 / 200e9 + 2e-6)


def test_gpus_of_two_hosts_meet_over_the_network():
    topology = parse_topology("h100:2x8")
    taken = network.seconds(Collective("all-reduce", 1e9, 16), topology)
    inside, over = 1e9 * 7 / 8 / 450e9, 1e9 / 2 / 400e9
    assert taken == pytest.approx(2 * (inside + over) + 10e-6)
    assert network.seconds(Collective("all-reduce", 1e9, 1), topology) == 0


def test_roofline_takes_the_slower_of_each_operation():
    chip = CHIPS["v5e"]
    work = [
        Work("dot_general", 197e12, False, 1e6),  # a second of products
        Work("reduce_sum", 0.0, False, 819e9),  # a second of memory
    ]
    products, memory, total = roofline.work_seconds(work, chip)
    assert products == pytest.approx(1)
    assert memory == pytest.approx(1, rel=1e-5)
    assert total == pytest.approx(1 / roofline.PRODUCTS + 1 / roofline.MEMORY)


def test_hidden_exchange_is_not_waited_for():
    topology = parse_topology("v5e:16x16")
    one = Collective("all-gather", 1e9, 256)
    taken = network.seconds(one, topology)
    half = Collective("all-gather", 1e9, 256, count=2, hidden=taken / 2)
    assert roofline.link_seconds([half], topology, 1.0) == pytest.approx(
        (2 * taken, taken)
    )
    # Nothing hides behind work that is not there.
    assert roofline.link_seconds([half], topology, 0.0)[1] == pytest.approx(2 * taken)


# Counting a traced program.


def counted(fn, *shapes, dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jaxpr.count(jax.make_jaxpr(fn)(*arguments))


def test_flops_of_products_loops_and_recomputation():
    dot = counted(lambda a, b: a @ b, (8, 16), (16, 32))
    assert dot.flops == 2 * 8 * 16 * 32
    assert dot.bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)

    def loop(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=5)[0]

    assert counted(loop, (8, 16), (16, 16)).flops == 5 * 2 * 8 * 16 * 16

    def loss(a, b, block):
        return (block(block(a, b), b) ** 2).sum()

    def block(a, b):
        return jnp.tanh(a @ b)

    shapes = (8, 16), (16, 16)
    plain = counted(jax.grad(lambda a, b: loss(a, b, block), (0, 1)), *shapes)
    again = counted(
        jax.grad(lambda a, b: loss(a, b, jax.checkpoint(block)), (0, 1)), *shapes
    )
    one = 2 * 8 * 16 * 16
    assert plain.flops == 6 * one
    assert again.flops == 8 * one


def test_an_update_without_products_lies_where_the_old_state_lay():
    def update(good, w, g):
        return jax.lax.cond(good, lambda w: w - (w + g) * 3 + g * w, lambda w: w, w)

    arguments = jax.ShapeDtypeStruct((), bool), *[jnp.zeros((64, 64))] * 2
    assert jaxpr.count(jax.make_jaxpr(update)(*arguments)).peak == 0


def test_flops_of_a_convolution_and_its_gradients():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = (2, 8, 8, 3), (2, 2, 3, 5)
    forward = 2 * 2 * 4 * 4 * 5 * 2 * 2 * 3
    assert counted(convolve, *shapes).flops == forward
    grad = jax.grad(lambda x, k: (convolve(x, k) ** 2).sum(), (0, 1))
    assert counted(grad, *shapes).flops == pytest.approx(3 * forward, rel=0.3)


def test_what_is_elementwise_is_never_in_memory():
    def fn(a, b):
        h = a @ b  # 4 kB, kept
        return jnp.tanh(jnp.exp(h) * 3 + 1) @ b  # read from h

    found = counted(fn, (32, 32), (32, 32))
    assert found.peak == 2 * 4 * 32 * 32 - 4 * 32 * 32  # h; the result is no temporary
    assert found.bytes == 2 * (3 * 4 * 32 * 32)


def test_activations_live_from_forward_to_backward_and_remat_ends_that():
    def net(x, weights, block):
        for w in weights:
            x = block(x, w)
        return (x**2).sum()

    def block(x, w):
        return x + jnp.tanh(jnp.tanh(x @ w) @ w)

    def peak(block, rows):
        def grad(x, *weights):
            return jax.grad(lambda ws: net(x, ws, block))(weights)

        return counted(grad, (rows, 64), *[(64, 64)] * 8).peak

    row = 4 * 64
    by_row = (peak(block, 2048) - peak(block, 1024)) / 1024
    # Of each of 8 blocks two products, and the stream or what it is made of.
    assert 2 * 8 * row <= by_row <= 4 * 8 * row
    again = jax.checkpoint(block)
    by_row = (peak(again, 2048) - peak(again, 1024)) / 1024
    assert 7 * row <= by_row <= 14 * row


# HLO.

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}

%all-reduce-scatter.1 (p: f32[1024,128]) -> f32[256,128] {
  %p = f32[1024,128]{1,0:T(8,128)} parameter(0)
  %ar = f32[1024,128]{1,0:T(8,128)} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %ds = f32[256,128]{1,0} dynamic-slice(%ar, %i), dynamic_slice_sizes={256,128}
}

%body (arg: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %arg = (s32[], f32[8,128]{1,0}) parameter(0)
  %cp = f32[8,128]{1,0} collective-permute(%e), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %t = (s32[], f32[8,128]{1,0}) tuple(%n, %cp)
}

%cond (arg: (s32[], f32[8,128])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

ENTRY %main (a: bf16[16,512]) -> f32[] {
  %a = bf16[16,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %ag = (bf16[16,512]{1,0:T(8,128)(2,1)}, bf16[64,512]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="jit(step)/gather"}
  %f = f32[8,128]{1,0} fusion(%a), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"3000"}
  %agd = bf16[64,512]{1,0} all-gather-done(%ag)
  %w = (s32[], f32[8,128]{1,0}) while(%t0), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %rs = f32[256,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %ar2 = (f32[96]{0}, /*index=1*/f32[4,32]{1,0}) all-reduce(%h, %k), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  ROOT %r = f32[] fusion(%agd), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1000"}
}
"""  # noqa: E501


def test_collectives_of_a_program():
    found = hlo.read(TEXT, 4, clock=1e9)
    by_kind = {c.kind: c for c in found.collectives}
    assert len(by_kind) == len(found.collectives) == 4
    gather = by_kind["all-gather"]
    assert (gather.bytes, gather.devices, gather.count) == (2 * 64 * 512, 4, 1)
    assert gather.hidden == pytest.approx(3e-6)  # 3,000 cycles before it is needed
    assert gather.what == "jit(step)/gather"
    permute = by_kind["collective-permute"]
    assert (permute.bytes, permute.count, permute.hidden) == (4 * 8 * 128, 7, None)
    scatter = by_kind["reduce-scatter"]  # a sum of which each keeps a part
    assert (scatter.bytes, scatter.devices) == (4 * 1024 * 128, 4)
    assert by_kind["all-reduce"].bytes == 4 * (96 + 128)
    assert by_kind["all-reduce"].devices == 2
    assert found.cycles == 4000
    assert found.loops == [7]


# As libtpu 0.0.52 writes a gather of weights that it spreads over other work.
STEPS = """\
HloModule jit_step, is_scheduled=true

%first (p: f32[4096,128]) -> f32[16384,128] {
  %all-gather.262 = f32[16384,128]{1,0:T(8,128)} all-gather(%p), channel_id=50, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="13"}
}

%second (p: f32[4096,128]) -> f32[16384,128] {
  %all-gather.264 = f32[16384,128]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=50, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="13"}
}

ENTRY %main (a: f32[4096,128]) -> f32[] {
  %start = f32[16384,128]{1,0} fusion(%a), kind=kCustom, calls=%first
  %work = f32[8]{0} fusion(%b), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"700"}
  %both = f32[8]{0} fusion(%b), kind=kOutput, calls=%second, backend_config={"estimated_cycles":"300"}
  ROOT %r = f32[] fusion(%both), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"50"}
}
"""  # noqa: E501


def test_a_collective_in_steps_is_one_and_hidden():
    found = hlo.read(STEPS, 16, clock=1e9)
    (gather,) = found.collectives
    assert (gather.kind, gather.devices) == ("all-gather", 4)
    assert gather.bytes == 4 * 16384 * 128
    assert gather.hidden == pytest.approx(1e-6)
    assert found.cycles == 1050


def test_groups_of_devices():
    assert hlo.first_group("replica_groups=[2,4]<=[8]", 8) == [0, 1, 2, 3]
    assert hlo.first_group("replica_groups=[2,4]<=[4,2]T(1,0)", 8) == [0, 2, 4, 6]
    assert hlo.first_group("replica_groups={{0,3},{1,2}}", 4) == [0, 3]
    assert hlo.first_group("replica_groups={}", 3) == [0, 1, 2]
    along = "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, use_global"
    assert hlo.first_group(along, 8) == [0, 1, 2, 3]
    assert hlo.first_group(along.replace("{'axis_1'}", "{'axis_0'}"), 8) == [0, 4]
    part = along.replace("{'axis_1'}", "{'axis_1':(1)2}")
    assert hlo.first_group(part, 8) == [0, 2]
    both = along.replace("{'axis_1'}", "{'axis_0','axis_1'}")
    assert hlo.first_group(both, 8) == list(range(8))
    places = [(x, y) for x in range(2) for y in range(4)]
    assert network.spans_of([0, 1, 2, 3], places) == (1, 4)
    assert network.spans_of([0, 4], places) == (2, 1)


def test_bytes_of_types():
    assert hlo.type_bytes("(f32[8,128]{1,0:T(8,128)}, s32[], pred[3])") == 4096 + 4 + 3
    assert hlo.type_bytes("bf16[2,3]{1,0}") == 12


def test_a_real_program_of_eight_devices(make_mesh):
    mesh = make_mesh(8)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def step(w, x):
        def one(carry, _):
            shifted = jax.shard_map(
                lambda x: jax.lax.ppermute(
                    x, "data", [(i, (i + 1) % 8) for i in range(8)]
                ),
                mesh=mesh,
                in_specs=PartitionSpec("data"),
                out_specs=PartitionSpec("data"),
            )(carry)
            return shifted, None

        x, _ = jax.lax.scan(one, x, None, length=3)
        return jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).mean())(w)

    arguments = jnp.zeros((64, 32)), jnp.zeros((16, 64))
    compiled = jax.jit(step, in_shardings=(whole, rows), out_shardings=whole)
    found = hlo.read(compiled.lower(*arguments).compile().as_text(), 8)
    sums = [c for c in found.collectives if c.kind == "all-reduce"]
    assert sum(c.bytes * c.count for c in sums) == 4 * 64 * 32
    assert {c.devices for c in sums} == {8}
    moved = [c for c in found.collectives if c.kind == "collective-permute"]
    assert sum(c.bytes * c.count for c in moved) == 3 * 4 * 2 * 64
    assert found.loops in ([3], [])  # XLA may unroll


# The batch, and what a device holds.


def test_the_batch_of_the_paper_packs_its_texts():
    config = recipe("swin_tiny")
    assert mean_slots(config) == (10 + 21) / 2
    batch = make_batch(config, mesh_of(256))
    assert batch.arrays["image"].shape == (4096, 224, 224, 3)
    assert batch.arrays["caption"].shape == (4096, 2)
    # 16 texts of 15.5 slots are 248: two rows of 128 a device.
    assert batch.arrays["tokens"].tokens.shape == (512, 128)
    assert batch.arrays["tokens"].ends.shape == (256, 16)
    assert "--text_slots" in batch.assumed[0]
    assert make_batch(config, mesh_of(256), 8).arrays["tokens"].tokens.shape[0] == 256
    config.micro_batches = 4  # packed each by itself: 4 texts of 62 slots in a row
    packed = make_batch(config, mesh_of(256)).arrays["tokens"]
    assert packed.tokens.shape == (1024, 128) and packed.ends.shape == (1024, 4)
    config.micro_batches = 1
    config.data.text_length = "full"
    assert make_batch(config, mesh_of(4)).arrays["tokens"].shape == (4096, 77)
    config.data.text_length = "bucket"
    assert make_batch(config, mesh_of(4)).arrays["tokens"].shape == (4096, 77)
    assert make_batch(config, mesh_of(4), 33).arrays["tokens"].shape == (4096, 48)
    with pytest.raises(InputError, match="text_slots must be from 2"):
        make_batch(config, mesh_of(4), 100)


def test_the_batch_is_the_trainers(tmp_path):
    """The same keys, shapes and dtypes as the iterator's of the same config."""
    from unicl_jax import data

    config = recipe("quickstart")
    config.batch_size, config.data.share_prompts = 16, True
    assumed = make_batch(config, mesh_of(1)).arrays
    text = config.model.text
    tokenize = data.Tokenizer(text.context_length, text.vocab_size)
    real = data.make_train_iterator(config.data, 32, 16, 0, tokenize)
    batch = next(real)
    real.close()
    for name, array in batch.items():
        assert array.dtype == assumed[name].dtype, name
        if name != "tokens":  # as many as there are different texts
            assert array.shape == assumed[name].shape, name
    assert set(batch) == set(assumed)


@pytest.fixture(scope="module")
def small():
    """A small model's plan on eight GPUs, and the same divided by fsdp."""
    config = recipe("quickstart")
    topology = parse_topology("h100:8")
    whole = plans.estimate_plan(config, topology, 100, None)
    config = recipe("quickstart")
    config.mesh.fsdp = 8
    return whole, plans.estimate_plan(config, topology, 100, None)


def test_state_and_its_division(small):
    whole, divided = small
    parameters = whole.estimate.whole
    assert whole.memory.parameters == parameters
    # Muon's matrices have one moment, the others two.
    assert parameters < whole.memory.optimizer < 2.01 * parameters
    assert divided.memory.state < whole.memory.state / 7
    assert whole.memory.batch == 32 * (32 * 32 * 3 + 4 + 8 + 4 + 4 * 10)


def test_averages_are_held_and_micro_batches_save_activations():
    config, topology = recipe("quickstart"), parse_topology("h100:1")
    config.ema_decay, config.batch_size = 0.99, 4096
    whole = plans.estimate_plan(config, topology, 100, None)
    assert whole.memory.other == pytest.approx(whole.estimate.trained)
    config.micro_batches = 8
    parts = plans.estimate_plan(config, topology, 100, None)
    assert parts.memory.temporary < 0.4 * whole.memory.temporary


def test_collectives_by_rule(small):
    whole, divided = small
    sums = [c for c in whole.collectives if c.what == "gradients"]
    assert [(c.kind, c.devices, c.bytes) for c in sums] == [
        ("all-reduce", 8, whole.estimate.trained)
    ]
    loss = [c for c in whole.collectives if c.what == "loss"]
    texts = [c for c in loss if c.kind == "all-gather"]
    assert 4 * 256 * 128 in {c.bytes for c in texts}  # all texts' embeddings, float32
    kinds = {c.kind for c in divided.collectives if "fsdp" in c.what}
    assert kinds == {"all-gather", "reduce-scatter"}


def test_the_loss_of_all_devices_counts(small):
    """An eighth of 256 x 256 logits on each device, not 32 x 32 of them."""
    whole, _ = small
    logits = 2 * 32 * 256 * 128
    dots = [w for w in whole.estimate.counted.work if w.flops == logits]
    assert len(dots) >= 3  # forward, and to images and texts


def test_largest_batch_is_where_memory_ends(small):
    whole, _ = small
    fixed, by_row = advice.fixed_and_by_row(whole)
    assert fixed + by_row * whole.rows == pytest.approx(whole.memory.total)
    largest = advice.largest_batch(whole)
    rows = largest.batch // 8
    assert fixed + by_row * rows <= whole.memory.limit < fixed + by_row * (rows + 1)


def test_search_draws_a_line_through_compiled_sizes(small):
    whole, _ = small
    found = dict(text="", cost={}, lower_seconds=0, compile_seconds=0, places=[])

    def compile_at(batch):
        used = 3e9 + 1e6 * batch
        if used > whole.memory.limit:
            return compiling.Compiled(
                **found, memory={}, warnings=[], used=used, limit=whole.memory.limit
            )
        memory = dict(arguments=1e9, temporary=used - 1e9, code=0)
        return compiling.Compiled(**found, memory=memory, warnings=[])

    first = dataclasses.replace(whole, compiled=compile_at(256))
    largest = advice.search_largest_batch(first, compile_at)
    most = (whole.memory.limit - 3e9) / 1e6
    assert 0.95 * most < largest.batch <= most
    assert len(largest.tried) <= 1 + advice.SEARCHED


# The compiler's refusals.

REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in \
memory space hbm. Used 24.28G of 15.75G hbm. Exceeded hbm capacity by 8.53G.

Total hbm usage >= 24.53G:
    reserved        258.00M

  Largest program allocations in hbm:

  1. Size: 1.50G
     Operator: op_name="jit(train_step)/jvp(Swin)/blocks_0/mlp/dot_general"
     Shape: bf16[4096,3136,384]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 1.50G
     ==========================

  2. Size: 512.00M
     Shape: f32[8192]{0}
"""


def test_out_of_memory_is_an_answer():
    found = compiling.out_of_memory(REFUSAL)
    assert found["used"] == int(24.28 * GIB)
    assert found["limit"] == int(15.75 * GIB)
    assert found["largest"][0].startswith("1.50G bf16[4096,3136,384]")
    assert "blocks_0/mlp/dot_general" in found["largest"][0]
    assert compiling.out_of_memory("INVALID_ARGUMENT: no such thing") is None


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        (
            "ABORTED: Internal error when accessing libtpu multi-process lockfile.",
            1,
            "one process at a time",
        ),
        ("The TPU is already in use by process with pid 17", 1, "one process"),
        ("", -9, "memory of this machine"),
        ("ValueError: Unknown topology v5e:3x3", 1, "must know the topology"),
        (
            "ERROR: Unknown command line flag 'xla_tpu_x'. Did you mean: xla_tpu_y ?",
            1,
            "LIBTPU_INIT_ARGS must hold flags that this libtpu knows: it does not know "
            "xla_tpu_x;",
        ),
        ("jax.errors.JaxRuntimeError: INTERNAL: broken", 1, "broken"),
    ],
)
def test_other_refusals_are_one_line(said, code, expected):
    error = compiling._what_failed(said, "v5e:3x3", code)
    assert expected in str(error)
    assert isinstance(error, InputError)


def test_a_kept_program_is_read_not_compiled(tmp_path):
    import gzip

    path = tmp_path / "x.json.gz"
    kept = compiling.Compiled("text", {}, {}, 1, 2, [], [], None, None, [])
    path.write_bytes(gzip.compress(json.dumps(kept._asdict()).encode()))
    assert compiling.compile_step(None, "none", 1, None, path) == kept


def test_a_program_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    import gzip

    made = compiling.Compiled("text", {}, {}, 1, 2, [], [], None, None, [])._asdict()
    compilations, write = [], Path.write_bytes

    def compiled(command, **_):
        compilations.append(command)
        write(Path(command[-1]), gzip.compress(json.dumps(made).encode()))
        return subprocess.CompletedProcess(command, 0, b"", b"")

    def half(path, content):
        write(path, content[: len(content) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", compiled)
    keep = tmp_path / "kept" / "x.json.gz"
    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="no space"):
            compiling.compile_step(None, "none", 1, None, keep)
    assert not any(keep.parent.iterdir())
    for _ in range(2):
        assert compiling.compile_step(None, "none", 1, None, keep).text == "text"
    assert len(compilations) == 2 and [*keep.parent.iterdir()] == [keep]


# The command.


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command: its exit code, its lines, and what it says is wrong."""

    def forget():
        for name in ("config", "workdir"):
            flags.FLAGS[name].unparse()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # overrides define themselves
        flags.FLAGS.unparse_flags()

    def run(*arguments):
        forget()
        config = f"--config={ROOT}/configs/quickstart.py"
        monkeypatch.setattr(sys, "argv", ["plan.py", config, *arguments])
        code = plan.main(sys.argv)
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    forget()


# ml_collections reads recipes by a method that Python 3.12 deprecates.
load_module = pytest.mark.filterwarnings(r"ignore:.*load_module\(\):DeprecationWarning")


@load_module
def test_the_command_from_end_to_end(command, tmp_path):
    out = tmp_path / "deep" / "plan.json"
    code, said, _ = command("--topology=h100:8", f"--json={out}")
    assert code == 0
    assert max(map(len, said.splitlines())) <= 80
    for part in ("memory of a device", "fits", "all-reduce", "images/s", "batch_size"):
        assert part in said
    found = json.loads(out.read_text())
    assert found["fits"] and found["chips"] == 8
    assert found["memory"]["total"] < found["memory"]["limit"]
    assert found["times"]["step"] >= found["times"]["work"]
    assert {c["kind"] for c in found["collectives"]} >= {"all-reduce", "all-gather"}


@load_module
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--topology must be given"),
        (["--topology=v9:8"], "known chips"),
        (["--topology=h100:8", "--compile"], "--compile is for TPUs"),
        (["--topology=h100:7"], "nearest are 252 and 259"),
        (["--topology=h100:8", "--config.mesh.fsdp=3"], "must be the number of dev"),
        (["--topology=h100:8", "--concepts=0"], "--concepts must be at least 1"),
        (["--topology=h100:8", "--config.objective=unicel"], 'did you mean "unicl"'),
        (["--topology=h100:8", "--bogus=1"], "bogus"),
    ],
)
def test_wrong_input_is_told_in_a_line(command, arguments, said):
    code, _, error = command(*arguments)
    assert code == plan.BAD_INPUT
    assert error.startswith("error: ") and said in error
    assert "Traceback" not in error


@load_module
def test_a_place_that_cannot_be_written_is_told_at_once(command, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    given = (f"--json={file}/plan.json", f"--json={tmp_path}")
    given += (f"--keep={file}/programs --compile",)
    for flags_given in given:
        code, said, error = command("--topology=v5e:1x1", *flags_given.split())
        assert (code, said) == (plan.BAD_INPUT, "")
        flag = flags_given.split("=")[0]
        assert error.startswith(f"error: {flag} must be a place that can be written")


def test_kept_programs_are_told_apart(tmp_path, monkeypatch):
    config, topology = recipe("quickstart"), parse_topology("v5e:2x2")
    kept = [
        plan._kept(tmp_path, config, topology, 1000, None),
        plan._kept(tmp_path, config, topology, 2000, None),
        plan._kept(tmp_path, config, topology, 1000, 8.0),
        plan._kept(tmp_path, recipe("quickstart", "lit"), topology, 1000, None),
        plan._kept(tmp_path, config, parse_topology("v5e:2x4"), 1000, None),
    ]
    assert plan._kept(tmp_path, config, topology, 1000, None) == kept[0]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_reduce=true")
    kept.append(plan._kept(tmp_path, config, topology, 1000, None))
    monkeypatch.setattr(plan.agreement, "code", lambda: {"unicl_jax": "0"})
    kept.append(plan._kept(tmp_path, config, topology, 1000, None))
    assert len(set(kept)) == len(kept)


def test_bfloat16_is_not_said_to_be_faster_than_itself():
    config = recipe("quickstart")

    def line(name):
        found = plans.estimate_plan(config, parse_topology(name), 1000, None)
        lines = advice.advice(found, 1000, None)
        return next(x for x in lines if "model.dtype" in x)

    assert "TFLOP/s" not in line("v5e:2x2")
    assert "989 TFLOP/s instead of 494" in line("h100:4")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (12.3, "12 seconds"),
        (90, "1.5 minutes"),
        (4.3 * 3600, "4.3 hours"),
        (3.2 * 86400, "3.2 days"),
        (1234 * 86400, "1,234 days"),
    ],
)
def test_a_short_run_does_not_take_no_days(value, said):
    assert report.duration(value) == said


@load_module
def test_what_does_not_fit_has_its_own_exit_code(monkeypatch, command):
    # The state fits, a step's activations don't.
    chip = dataclasses.replace(CHIPS["t4"], memory=100e6)
    monkeypatch.setitem(CHIPS, "tiny", chip)
    code, said, _ = command("--topology=tiny:1")
    assert code == plan.DOES_NOT_FIT
    of_others = {x for x in vars(exit_codes).values() if isinstance(x, int)}
    assert code not in of_others and code < 128  # nor a signal's
    assert "does not fit" in said
    for change in ("batch_size=", "micro_batches=", "model.image.remat=True"):
        assert f"--config.{change}" in said
    assert max(map(len, said.splitlines())) <= 80


@load_module
def test_without_libtpu_it_says_how_to_get_it(monkeypatch, command):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    code, _, said = command("--topology=v5e:2x2", "--compile")
    assert code == plan.BAD_INPUT
    assert 'pip install "jax[tpu]"' in said


@pytest.mark.slow  # the short form compiles for TPUs in loss_on_tpus_test.py
def test_a_small_step_compiled_for_a_tpu(tmp_path):
    """The estimate of memory beside the compiler's, of a model of any size at all."""
    if compiling.importlib.util.find_spec("libtpu") is None:
        pytest.skip(
            'libtpu, which compiles for TPUs, is absent: pip install "jax[tpu]"'
        )
    out = tmp_path / "plan.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "unicl_jax.plan", "--topology=v5e:2x2"),
            *("--compile", f"--config={ROOT}/configs/quickstart.py", f"--json={out}"),
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if "one process at a time" in done.stderr:
        pytest.skip("another process holds libtpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""  # nothing of libtpu's
    found = json.loads(out.read_text())
    assert found["how"] == "compiled"
    kinds = {c["kind"] for c in found["collectives"]}
    assert "all-to-all" not in kinds and "all-reduce" in kinds
    assert np.isfinite(found["times"]["step"])
