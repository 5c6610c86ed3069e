"""The processes of one run: how they start, find each other, agree, and hear of an error on rank 0.

    processes(device, ...)   a context that gives the World of this process
    World                    rank, world_size, device, autocast, stop, and what ranks do together
"""
import contextlib
import datetime
import os
import time
import uuid
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from plumbing import machine
from plumbing.cli import StopFlag, Stopped, UserError, print0

TIMEOUT = datetime.timedelta(minutes=30)  # for one rank to wait for the others: HellaSwag's download is on rank 0 alone
COPIES = (  # what srun, mpirun, jsrun and flux tell each copy
    "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE",
    "FLUX_JOB_SIZE",
)


@dataclass(frozen=True)
class World:
    """This process among the processes of a run. The default is a single process on the CPU."""
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: contextlib.AbstractContextManager = field(default_factory=contextlib.nullcontext)  # of matrix products
    stop: StopFlag = field(default_factory=StopFlag)  # set when this process receives a signal

    @property
    def double(self) -> torch.dtype:
        """Return the type to sum many numbers in: float64, but on MPS, which has none."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def from_rank0(self, action):
        """Run action() on rank 0 and return its result, which must be picklable, on every rank.

        If it raises, the other ranks raise a UserError with the same message: a rank that knew nothing would wait in
        its next collective until the job is killed.
        """
        if self.world_size == 1:
            return action()
        outcome, raised = [None, ""], None
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                raised, outcome[1] = error, str(error) or type(error).__name__
        dist.broadcast_object_list(outcome, src=0)
        result, message = outcome
        if message:
            raise raised or UserError(message)
        return result

    def check_stop(self) -> None:
        """Raise Stopped after a signal if this is the only rank; several agree in sum_on_host()."""
        if self.world_size == 1 and self.stop.is_set():
            raise Stopped

    def min(self, value: int) -> int:
        """Return the smallest value of all ranks: what all of them can agree on."""
        smallest = torch.tensor(value, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    def all(self, true: bool) -> bool:
        """Return whether it is true on every rank."""
        return bool(self.min(int(true)))

    def sum_on_host(self, values: list[torch.Tensor]) -> list[float]:
        """Sum scalars over the ranks and copy them to the host, all in one transfer.

        Raises Stopped on every rank if one of them has received a signal.
        """
        stop = torch.full_like(values[0], bool(self.stop.is_set()))
        stacked = torch.stack([value.to(stop) for value in (*values, stop)])
        if self.world_size > 1:
            dist.all_reduce(stacked)
        *sums, stop = stacked.tolist()
        if stop:
            raise Stopped
        return sums


@contextlib.contextmanager
def processes(device: str = "auto", deterministic: bool = False, stop: StopFlag | None = None):
    """Join torchrun's process group, if there is one, while the context lasts; yields the World of this process.

    PyTorch's settings of precision and determinism are afterwards what they were.
    """
    with restored_settings(), contextlib.ExitStack() as stack:
        yield from join_processes(device, deterministic, stop or StopFlag(), stack)


@contextlib.contextmanager
def restored_settings():
    """Put back, at the end, what processes() sets for PyTorch as a whole, if it has changed."""
    names = "THP_MEM_ALLOC_ENABLE", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF"
    variables = {name: os.environ.get(name) for name in names}
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        if before[0] != torch.are_deterministic_algorithms_enabled():  # the call imports a compiler, which takes 2 s
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def float32_as_tf32():
    """Have CUDA multiply as TF32 what autocast leaves in float32, while the context lasts."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set precisions in PyTorch's newer way
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def join_processes(device: str, deterministic: bool, stop: StopFlag, stack: contextlib.ExitStack):
    """Yield the World of this process, which leaves the process group afterwards; `stack` undoes settings."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for CPU tensors: 1.6 times the demo's tokens/s
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    values = [os.environ.get(name, alone) for name, alone in names.items()]
    can_meet = values[2] == "1" or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not all(map(str.isdecimal, values)) or int(values[0]) >= int(values[2]) or not can_meet:
        raise UserError(f"{', '.join(names)} are {', '.join(values)}: use torchrun, or unset these variables")
    rank, local_rank, world_size = map(int, values)
    device = machine.pick_device(device, local_rank, world_size)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        machine.keep_freed_memory()  # 1.1 to 1.8 times the tokens/s
    if device.type == "cuda":
        torch.cuda.set_device(device)
        stack.enter_context(float32_as_tf32())
    if world_size > 1:
        on_cuda = device.type == "cuda"
        dist.init_process_group("nccl" if on_cuda else "gloo", store=fresh_store(rank, world_size), rank=rank,
                                world_size=world_size, device_id=device if on_cuda else None, timeout=TIMEOUT)
    stopped = None
    try:
        yield World(rank, world_size, device, stop=stop)
    except Stopped as error:  # on all ranks
        stopped = error
    if world_size > 1:  # skipped on errors: a barrier would wait for ranks that are gone and hide the error
        dist.barrier()  # gloo's threads may still hold a tensor, and abort if Python ends before they let go of it
        dist.destroy_process_group()
    if stopped:
        raise stopped


def fresh_store(rank: int, world_size: int):
    """Return the store over which ranks find each other, with a prefix that no earlier attempt of the job has used.

    torchrun keeps one store over restarts (pytorch/pytorch#135712): a rank could read there where one that is dead now
    had listened, and wait for it for half an hour. Its count of restarts does not tell attempts apart, as each of
    several torchruns counts its own. Returns None without torchrun's store: then the store is new each time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT)
    token, others = uuid.uuid4().hex.encode(), range(1, world_size)
    store.set(f"token/{rank}", token)
    for _ in range(90_000):  # half an hour
        if rank == 0:
            store.set("seen", b" ".join([token, *(store.get(f"token/{other}") for other in others)]))
            if all(store.check([f"reply/{other}"]) and store.get(f"reply/{other}") == token for other in others):
                return dist.PrefixStore(token.decode(), store)
        elif token in (seen := store.get("seen").split()):  # rank 0 has seen this rank, not one of an earlier attempt
            store.set(f"reply/{rank}", seen[0])
            return dist.PrefixStore(seen[0].decode(), store)
        time.sleep(0.02)
    raise ConnectionError("the other ranks did not come within half an hour: are they all running?")


def check_launcher() -> None:
    """Raise UserError if srun or mpirun has started several copies of this, which would not know of each other."""
    def number(name: str) -> int:
        value = os.environ.get(name, "")
        return int(value) if value.isdecimal() else 0

    if "RANK" in os.environ:
        return
    if number("SLURM_PROCID") > 0 or any(number(name) > 1 for name in COPIES):
        raise UserError(
            "srun or mpirun has started several copies of this command, each of which would train alone: start one "
            "torchrun per node, such as srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc_per_node=8 "
            "--rdzv_backend=c10d --rdzv_id=$SLURM_JOB_ID --rdzv_endpoint=HOST:29500 train_gpt2.py; for several runs at "
            f"once unset {', '.join(('SLURM_PROCID', *COPIES))}")
    if number("SLURM_NTASKS") > 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:
        print0(f"note: of SLURM's {number('SLURM_NTASKS')} tasks this is one process; torchrun starts one per GPU")
