"""How KV bytes travel between instances: which way, how fast, and how much memory that may take.

Invariant: each field's default is the default everywhere. Knows no transport (`llumsched.engine`).
"""

from dataclasses import dataclass

from llumsched.core.params import check_params, param

# Chosen at the hand-shake: the first of the table that both instances can use.
AUTO = "auto"
# Names of the transports, in the order in which they are tried, and where each one's class is.
TRANSPORTS = {
    "cuda_ipc": "llumsched.engine.transfer.cuda_ipc:CudaIpc",
    "shared_memory": "llumsched.engine.transfer.shared_memory:SharedMemory",
    "nixl": "llumsched.engine.transfer.nixl:Nixl",
    "tcp": "llumsched.engine.transfer.tcp:Tcp",
    "gloo": "llumsched.engine.transfer.torch_group:Gloo",
    "nccl": "llumsched.engine.transfer.torch_group:Nccl",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """Limits on memory and network for a migration."""

    transport: str = param(
        "auto",
        "How KV bytes travel. auto is the first that both instances can use: cuda_ipc between GPUs "
        "of one host, shared_memory on one host, nixl between hosts where it is installed, tcp. "
        "gloo and nccl are torch.distributed's.",
        choices=(AUTO, *TRANSPORTS),
    )
    bandwidth_limit_mb_s: float = param(
        0.0,
        "Megabytes a second that an instance sends at most, over all its migrations; the last "
        "stage of each, for which its request stands still, is not slowed down. 0 is no limit.",
        at_least=0,
    )
    core_share: float = param(
        0.015,
        "Share of one core that copying blocks may take at either end where engines compute on "
        "CPUs, over all migrations that leave an instance, but for the last stage of each: the "
        "other requests are slowed down by as much where no core is idle. 1 is no limit.",
        above=0,
        at_most=1,
    )
    checksum: bool = param(
        False, "Check every part of a stage where it arrives; a wrong one ends its migration."
    )
    staging_slots: int = param(
        4,
        "Parts of a stage between gather and scatter at a time, over all migrations that leave an "
        "instance.",
        at_least=1,
    )
    staging_slot_mb: float = param(
        0.0,
        "Megabytes of such a part; one block at least. 0 is 8 where engines compute on CPUs, 64 on "
        "GPUs.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check_params(self)
