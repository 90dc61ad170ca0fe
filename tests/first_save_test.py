"""The first save of a run compiles next to nothing, whatever its arrays' shapes are."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from unicl_jax.checkpoint import Checkpoints
from unicl_jax.step import TrainState


def test_a_save_compiles_no_program_for_each_shape_and_device(make_mesh, tmp_path):
    whole = NamedSharding(make_mesh(8), PartitionSpec())
    params = {
        f"rows_{n}": np.random.default_rng(n).normal(size=(8 * n, 3)).astype("f4")
        for n in range(1, 6)
    }
    state = jax.device_put(TrainState(jnp.int32(4), params, {}, {}, {}), whole)
    compiled = []

    def listen(name, *_, **__):
        compiled.extend([name] * ("backend_compile" in name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    checkpoints = Checkpoints(tmp_path, kept=1)
    try:
        assert checkpoints.save(state, {"step": 4})
        checkpoints.wait()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    restored, _ = checkpoints.restore(state)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert {x.sharding for x in jax.tree.leaves(restored)} == {whole}
    # The digest's are one for each of six shapes and their helpers; sliced by Orbax,
    # as it would by itself, there would be 8 more for each of five.
    assert len(compiled) < 20
