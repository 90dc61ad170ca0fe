#!/usr/bin/env bash
# Prints flags of libtpu for a v5e, with which gradients are summed beside the products of
# the backward pass; docs/scaling.md says what they gain and cost. Launchers and
# `python -m unicl_jax.plan --compile` take them along:
#
#   export LIBTPU_INIT_ARGS="$(launch/tpu_flags.sh)"
#
# Known to libtpu 0.0.42.1, and tried on no chip yet: not set by themselves, for libtpu ends
# a process at a flag that it does not know.
flags=(
  --xla_enable_async_all_reduce=true
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  # A sum goes on inside products only if it is of one array: larger ones stay alone.
  --xla_jf_crs_combiner_threshold_in_bytes=2097152
)
echo "${flags[*]}"
