"""What is about to run, said before it runs: size, time, warnings, and a refusal of what makes no sense here.

    make_plan(config, model, loaders, about)    what the run will need
    rows(config, model, world, ..., plan)       the summary, {topic: text}
    warnings(config, plan)                      what is unusual
    check(config, plan, world, about)           raises UserError if this machine cannot hold it, or finish it in a week
"""
import os
import shlex
from dataclasses import dataclass

from plumbing import machine, screen, shards
from plumbing.cli import UserError, plural, reasoned

EPOCHS = 4  # up to here repeated data are worth almost as much as new ones (Muennighoff et al. 2023)
DAY = 86_400  # seconds


@dataclass(frozen=True)
class Plan:
    """What a run will need from here on."""
    steps: int  # optimizer steps still to do
    epochs: float  # of the whole run
    seconds: float  # training and validation
    val_seconds: float  # validation alone
    state_bytes: int  # weights, gradients and the optimizer's state, per rank
    pass_bytes: int  # what one forward and backward pass keeps, per rank


def make_plan(config, model, loaders: tuple, about: dict) -> Plan:
    """Estimate what a run will need; `loaders` are those for training (None if it only evaluates) and validation."""
    train_loader, val_loader = loaders
    steps, epochs, validations = 0, 0.0, 1
    if train_loader:
        first, last = about["first_step"], config.max_steps
        steps, epochs = last - first, last * config.total_batch_size / (train_loader.n_windows * config.sequence_length)
        due = set(range(0, last, config.val_every)) if config.val_every else {0}
        validations = len([step for step in due | {last} if step > first or step == first == 0]) if steps else 0
    T, shape = config.sequence_length, model.config
    val_tokens = min(config.val_tokens, val_loader.n_windows * T)
    flops = machine.flops_per_token(model, T)
    val_seconds = validations * val_tokens * flops / 3 / about["flops_per_s"]  # a forward pass is a third of it
    floats = 3 * shape.vocab_size + 18 * shape.n_layer * shape.n_embd  # per token: logits and their gradient, blocks
    return Plan(steps, epochs, val_seconds + steps * config.total_batch_size * flops / about["flops_per_s"],
                val_seconds, 16 * model.count_parameters(), 4 * floats * config.micro_batch_size * T)


def rows(config, model, world, loaders: tuple, about: dict, plan: Plan) -> dict[str, str]:
    """Return the summary of a run, {topic: text}."""
    train_loader, val_loader = loaders
    shape, T, ranks = model.config, config.sequence_length, world.world_size
    data = f"{val_loader.n_windows:,} windows of {T:,} tokens to validate"
    if train_loader:
        order = "shuffled" if config.shuffle else "in file order"
        data = (f"{train_loader.n_windows:,} windows of {T:,} tokens to train on, {val_loader.n_windows:,} to "
                f"validate, {order}")
    if documents := shards.count_documents(config.data, [loader for loader in loaders if loader]):
        data = f"{documents:,} {plural(documents, 'document')} in {data}"
    result = {
        "device": machine.describe_device(world.device),
        "dtype": reasoned(config.dtype, about["dtype"]),
        "compile": reasoned("yes" if config.compile else "no", about["compile"]),
        "model": f"{shape.n_layer} {plural(shape.n_layer, 'layer')}, {shape.n_head} {plural(shape.n_head, 'head')}, "
                 f"{shape.n_embd} {plural(shape.n_embd, 'channel')}, vocabulary of "
                 f"{shape.vocab_size:,}: {model.count_parameters():,} parameters, {about['origin']}",
        "data": f"{config.data}: {data}",
    }
    if train_loader:
        micro_steps = config.total_batch_size // (config.micro_batch_size * T * ranks)
        last = f" in the last {config.decay_steps:,} steps" if config.decay_steps else ""
        result |= {
            "batch": f"{config.total_batch_size:,} = {config.micro_batch_size} x {T:,} x {ranks} "
                     f"{plural(ranks, 'rank')} x {micro_steps} {plural(micro_steps, 'micro-step')}",
            "schedule": f"{config.max_steps:,} {plural(config.max_steps, 'step')}, "
                        f"{config.max_steps * config.total_batch_size:,} tokens = {plan.epochs:,.2f} epochs",
            "learning": f"{config.optimizer}, rate {config.max_lr:g} -> {config.min_lr:g} ({config.decay}{last}) after "
                        f"{config.warmup_steps:,} {plural(config.warmup_steps, 'step')} of warmup",
            "memory": describe_memory(plan, world),
        }
    if train_loader is None or plan.steps:
        share = f", {plan.val_seconds / plan.seconds:.0%} of it validation" if train_loader else ""
        result["time"] = f"about {duration(plan.seconds)} of computing{share}; a rough estimate"
    return result | ({"output": config.out_dir} if train_loader else {})


def describe_memory(plan: Plan, world) -> str:
    """Say how much memory each rank needs, in MiB or GiB."""
    text = f"{size(plan.state_bytes)} for weights, gradients and optimizer"
    if world.device.type == "cuda":
        return f"{text}, the rest for activations"
    return f"{text}, about {size(plan.pass_bytes)} for activations"


def size(count: float) -> str:
    """Format a number of bytes in MiB, from 10 GiB on in GiB."""
    return f"{count / 2**20:,.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.0f} GiB"


def duration(seconds: float) -> str:
    """Format a rough duration with a suitable unit: seconds, minutes, hours, days or years."""
    for unit, length, least in (("year", 365 * DAY, 1), ("day", DAY, 2), ("hour", 3600, 1), ("minute", 60, 2)):
        if seconds >= least * length:
            count = seconds / length
            digits = 1 if count < 9.95 and unit != "minute" else 0
            return f"{count:,.{digits}f} {unit}s"
    return f"{max(1, round(seconds))} {plural(max(1, round(seconds)), 'second')}"


def warnings(config, plan: Plan, world) -> list[str]:
    """List what is unusual about a run that trains."""
    found = []
    if not plan.steps:
        return found
    if config.warmup_steps >= config.max_steps > 0:
        found.append(f"the warmup of {config.warmup_steps:,} steps does not end within the run: try --warmup_steps "
                     f"{config.max_steps // 10}")
    if plan.epochs > EPOCHS:
        fewer = int(config.max_steps * EPOCHS / plan.epochs)
        remedy = "use more data, or a smaller --total_batch_size"
        if fewer:
            remedy = f"--max_steps {fewer} is {EPOCHS} epochs, or use more data"
        found.append(f"{plan.epochs:,.1f} epochs: beyond {EPOCHS}, a model memorizes more than it learns; {remedy}")
    if plan.seconds > 2 * DAY and (config.yes or plan.seconds <= 7 * DAY or plan.steps < config.max_steps):
        found.append(f"this takes about {duration(plan.seconds)} here")
    elif world.device.type != "cuda" and is_large(config, plan) and 600 < plan.seconds <= 7 * DAY:
        found.append(f"this model is large for {world.device.type}: {demo(config)}")
    return found


def check(config, plan: Plan, world, about: dict) -> None:
    """Raise UserError if this machine cannot hold a run or finish it within a week, with a command that makes sense.

    --yes leaves it to the user. A run that is resumed was begun somewhere: it is not stopped for its length.
    """
    if config.yes or not plan.steps:
        return
    if world.device.type == "cuda":
        here, needed = machine.gpu_bytes(world.device), plan.state_bytes  # activations are measured there
    else:
        here = machine.memory_bytes()
        needed = (plan.state_bytes + plan.pass_bytes) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > here:
        problem = f"this run needs about {size(needed)} of memory, and {world.device} has {size(here)}"
        advice = remedy_for_memory(config, plan, world)
    elif plan.seconds > 7 * DAY and about["resumed_from"] is None:
        problem = f"this run would take about {duration(plan.seconds)} here ({world.device.type})"
        advice = remedy_for_time(config, plan, world, about)
    else:
        return
    raise UserError(f"{problem}: {advice}, or add --yes to start it anyway")


def demo(config) -> str:
    """Return what to do with data on a machine that is too small for the full size."""
    command = screen.here(shlex.join(["python", "train_gpt2.py", "--preset", "demo", "--data", config.data]))
    return f"train it on a GPU, or try `{command}` here, a model of 3 million parameters"


def is_large(config, plan: Plan) -> bool:
    """Return whether a new model is much larger than the demo's."""
    return plan.state_bytes > 2**28 and not (config.init_from or config.branch_from)


def remedy_for_memory(config, plan: Plan, world) -> str:
    """Return what to do about a run that needs too much memory."""
    if plan.pass_bytes > plan.state_bytes and config.micro_batch_size > 1 and world.device.type != "cuda":
        return "use a smaller --micro_batch_size"
    return "use a smaller --model, or a larger GPU" if world.device.type == "cuda" else demo(config)


def remedy_for_time(config, plan: Plan, world, about: dict) -> str:
    """Return what to do about a run that takes too long."""
    if world.device.type != "cuda" and is_large(config, plan):
        return demo(config)
    steps = int(config.max_steps * min(1, 2 * DAY / plan.seconds, EPOCHS / plan.epochs))
    if steps < 1:
        return "train it on a GPU"
    shorter = duration(plan.seconds * steps / config.max_steps)
    return f"`{screen.here(about['command'])} --max_steps {steps}` takes about {shorter}"
