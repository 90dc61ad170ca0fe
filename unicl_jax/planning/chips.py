"""What is known of chips: data, each number with where it comes from.

Bytes and FLOP/s are decimal (GB = 1e9), but for GiB. Dense peaks, never the "sparse"
ones of datasheets, which are twice as high.
"""

import dataclasses

GIB, GB, T = 2**30, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as a topology names it.
      title: for people.
      kind: "tpu" or "gpu".
      memory: bytes of HBM, or GDDR, that a program can have.
      bandwidth: of it, bytes/s.
      bf16: peak matrix FLOP/s with bfloat16 inputs.
      f32: the same with float32 ones as XLA multiplies them by default: in one bfloat16
        pass on a TPU, in TF32 on a GPU that has it.
      link: bytes/s of one link, one way: to a neighbour in the torus, or a GPU's whole
        NVLink or PCIe.
      axes: of the torus, which a chip has two links along; 0: all to all in a host.
      per_host: chips of each host of several.
      network: bytes/s of a host to other hosts, one way; 0: only neighbours are linked.
      sources: where the numbers come from.
      devices: that a chip looks like to JAX.
      one_host: chips up to which a single host has them all.
      clock: cycles a second, that the compiler's estimates count; 0: not known.
      pod: chips of the largest slice; 0: of GPUs, there is none.
      libtpu: the compiler's name of it; "": it can't compile for it.
    """

    name: str
    title: str
    kind: str
    memory: float
    bandwidth: float
    bf16: float
    f32: float
    link: float
    axes: int
    per_host: int
    network: float
    sources: str
    devices: int = 1
    one_host: int = 0
    clock: float = 0.0
    pod: int = 0
    libtpu: str = ""


_CLOUD = "cloud.google.com/tpu/docs/"
# One way per link: a chip's bidirectional figure over twice its links, which is also
# what all-reduce per pod comes to (v5e: 51.2 TB/s over 256 chips and 4 links).
_TPUS = (
    Chip(
        *("v4", "TPU v4", "tpu", 32 * GIB, 1228 * GB, 275 * T, 275 * T),
        *(45 * GB, 3, 4, 0),
        f"{_CLOUD}v4: memory, peak; the scaling book's table: bandwidth, link",
        clock=1.05e9,  # its peak over its matrix units' 2 x 128 x 128
        pod=4096,
        libtpu="v4",
    ),
    Chip(
        *("v5e", "TPU v5e", "tpu", 16 * GIB, 819 * GB, 197 * T, 197 * T),
        *(50 * GB, 2, 4, 0),
        f"{_CLOUD}v5e: 400 GB/s bidirectional over 4 ports",
        one_host=8,
        clock=1.5e9,  # its peak over its matrix units' 2 x 128 x 128
        pod=256,
        libtpu="v5e",
    ),
    Chip(
        *("v5p", "TPU v5p", "tpu", 95 * GIB, 2765 * GB, 459 * T, 459 * T),
        *(100 * GB, 3, 4, 0),
        f"{_CLOUD}v5p: 1,200 GB/s bidirectional over 6 links",
        clock=1.75e9,  # its peak over its matrix units' 2 x 128 x 128
        pod=6144,
        libtpu="v5p",
    ),
    Chip(
        *("v6e", "TPU v6e (Trillium)", "tpu", 32 * GIB, 1638 * GB, 918 * T, 918 * T),
        *(100 * GB, 2, 4, 0),
        f"{_CLOUD}v6e: 800 GB/s bidirectional over 4 ports",
        one_host=8,
        pod=256,
        libtpu="v6e",
    ),
    Chip(
        *("v7x", "TPU7x (Ironwood)", "tpu", 192 * GIB, 7380 * GB, 2307 * T, 2307 * T),
        *(100 * GB, 3, 4, 0),
        f"{_CLOUD}tpu7x: 1,200 GB/s bidirectional over 6 links",
        devices=2,
        pod=9216,
        libtpu="tpu7x",
    ),
)
# GPUs: NVLink and PCIe one way, half of a datasheet's bidirectional figure. The network
# is what such a server usually has, a card for each GPU; it is not the GPU's to say.
# Of V100, T4, L4 and RTX 4090 NVIDIA's own sheets were not at hand: their figures were
# compared with what others print of them (modal-labs/modal-client pull request 2797
# for memory, waredb.com for the RTX 4090, sysrqmts.com for the T4, store.sourcecode.com
# for the L4, xenon.com.au and gamersnexus.com for the V100), and float32 with cores x 2
# x boost clock: 5120 x 2 x 1.53 GHz, 2560 x 2 x 1.59, 16384 x 2 x 2.52.
_GPUS = (
    Chip(
        *("v100", "V100 SXM2 16 GB", "gpu", 16 * GIB, 900 * GB, 15.7 * T, 15.7 * T),
        *(150 * GB, 0, 8, 12.5 * GB),
        "NVIDIA V100 datasheet; no bfloat16 units, so float32's; network of "
        "DGX-1: 4 x 100 Gbit/s, of which one is counted",
    ),
    Chip(
        *("t4", "T4", "gpu", 15 * GIB, 320 * GB, 8.1 * T, 8.1 * T),
        *(16 * GB, 0, 4, 6.25 * GB),
        "NVIDIA T4 datasheet; memory as nvidia-smi shows it, 15,360 MiB: of 16 GiB, "
        "its error correction takes one; no bfloat16 units, so float32's; PCIe 3 x16; "
        "network: 50 Gbit/s, AWS g4dn",
    ),
    Chip(
        *("a100-40", "A100 SXM 40 GB", "gpu", 40 * GIB, 1555 * GB, 312 * T, 156 * T),
        *(300 * GB, 0, 8, 200 * GB),
        "NVIDIA A100 datasheet; network: DGX A100, 8 x 200 Gbit/s",
    ),
    Chip(
        *("a100-80", "A100 SXM 80 GB", "gpu", 80 * GIB, 2039 * GB, 312 * T, 156 * T),
        *(300 * GB, 0, 8, 200 * GB),
        "NVIDIA A100 datasheet; network: DGX A100, 8 x 200 Gbit/s",
    ),
    Chip(
        *("l4", "L4", "gpu", 23034 * 2**20, 300 * GB, 121 * T, 60 * T),
        *(32 * GB, 0, 8, 12.5 * GB),
        "NVIDIA L4 datasheet, half its sparse peaks of 242 and 120; memory as "
        "nvidia-smi shows it, 23,034 MiB; PCIe 4 x16; network: 100 Gbit/s, Google "
        "Cloud g2-standard-96",
    ),
    Chip(
        *("rtx4090", "RTX 4090", "gpu", 24 * GIB, 1008 * GB, 165.2 * T, 82.6 * T),
        *(32 * GB, 0, 4, 1.25 * GB),
        "NVIDIA Ada whitepaper: bfloat16 with float32 sums; PCIe 4 x16, no NVLink; "
        "network: 10 Gbit/s, an assumption",
    ),
    Chip(
        *("h100", "H100 SXM", "gpu", 80 * GIB, 3350 * GB, 989 * T, 494 * T),
        *(450 * GB, 0, 8, 400 * GB),
        "NVIDIA H100 datasheet; network: DGX H100, 8 x 400 Gbit/s",
    ),
    Chip(
        *("h200", "H200 SXM", "gpu", 141 * GB, 4800 * GB, 989 * T, 494 * T),
        *(450 * GB, 0, 8, 400 * GB),
        "NVIDIA H200 datasheet; network: DGX H200, 8 x 400 Gbit/s",
    ),
    Chip(
        *("b200", "B200 (HGX)", "gpu", 180 * GB, 8000 * GB, 2250 * T, 1100 * T),
        *(900 * GB, 0, 8, 400 * GB),
        "NVIDIA Blackwell datasheet, HGX B200; network: DGX B200, 8 x 400 Gbit/s",
    ),
)
CHIPS = {chip.name: chip for chip in (*_TPUS, *_GPUS)}
# Other names that people and the compiler give them.
ALIASES = {"a100": "a100-40", "trillium": "v6e", "tpu7x": "v7x", "4090": "rtx4090"}
