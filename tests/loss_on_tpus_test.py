"""What crosses the wires of a v5e-256 in the sharded loss: compiled for it, not run."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# libtpu takes a lock and prints: in a process of its own.
COMPILE = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from unicl_jax.losses import sharded, unicl_loss

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16")
mesh = Mesh(np.array(topology.devices), ("data",), axis_types=(AxisType.Auto,))
loss, batch, dim = sharded(unicl_loss, mesh), 32768, 512

def shape(*size, dtype):
    spec = PartitionSpec("data") if size else PartitionSpec()
    return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec))

found = {}
for implementation in ("dense", "blockwise", "ring"):
    def mean(u, v, labels, scale):
        return loss(u, v, labels, scale, implementation=implementation).mean()

    embeddings = shape(batch, dim, dtype=jnp.bfloat16)
    arguments = embeddings, embeddings, shape(batch, dtype=jnp.int32)
    step = jax.jit(jax.value_and_grad(mean, (0, 1, 3)))
    compiled = step.lower(*arguments, shape(dtype=jnp.float32)).compile()
    text = compiled.as_text()
    kinds = "all-gather all-to-all collective-permute".split()
    found[implementation] = {
        kind: re.findall(rf"= (.*?) {kind}(?:-start)?\\(", text) for kind in kinds
    } | {"temporary": compiled.memory_analysis().temp_size_in_bytes}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip(
            'libtpu, which compiles for TPUs, is absent: pip install "jax[tpu]"'
        )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so none is shared
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("implementation", ["dense", "blockwise", "ring"])
def test_no_all_to_all(compiled, implementation):
    assert compiled[implementation]["all-to-all"] == []


@pytest.mark.parametrize(
    # Blockwise once forward, and once in each branch that may come after it: far apart
    # logits, the gradient by one shift, by two.
    ("implementation", "gathers"),
    [("dense", 1), ("blockwise", 4)],
)
def test_texts_are_gathered_and_images_never(compiled, implementation, gathers):
    found = compiled[implementation]["all-gather"]
    features = [x for x in found if "bf16[32768,512]" in x]
    assert len(features) == gathers  # the images have the same shape


def test_the_ring_gathers_nothing(compiled):
    assert compiled["ring"]["all-gather"] == []
    moved = " ".join(compiled["ring"]["collective-permute"])
    assert "bf16[128,512]" in moved and "[32768" not in moved


def test_blockwise_and_ring_hold_no_row_of_logits_a_chip(compiled):
    texts = 32768 * 512 * 2  # what is gathered
    assert compiled["blockwise"]["temporary"] < 3 * texts
    assert compiled["ring"]["temporary"] < texts / 10
