"""How HellaSwag's rows are grouped into passes and shared among ranks. This decides the speed, not the losses.

    make_batches(work, batch_tokens)       groups examples that share equally long beginnings
    assign_batches(batches, world_size)    shares the batches among ranks
    make_passes(lengths, batch_tokens)     cuts the rows of a batch into passes of similar length
"""
from collections.abc import Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """Tokens to read in one pass; the last `scored` of them are predicted."""
    example: int
    ending: int
    tokens: list[int]
    scored: int


class Work(NamedTuple):
    """The rows of one example, which all begin with the same `shared` tokens."""
    shared: int
    rows: list[Row]

    @property
    def cost(self) -> int:
        """Count the tokens that go through the model."""
        return self.shared + sum(len(row.tokens) - 1 - self.shared for row in self.rows)


def make_batches(work: list[Work], batch_tokens: int) -> list[list[Work]]:
    """Group examples with similar `shared` into batches of at most 16 * batch_tokens; all share as much as the first.

    An example thus shares up to 3 tokens less than it could. The batches depend on the examples alone, not on the
    number of ranks, so that the results do not depend on it either.
    """
    batches, size = [], 0
    for item in sorted(work, key=lambda item: (item.shared, item.cost)):
        size += item.cost
        if not batches or item.shared > batches[-1][0].shared + 3 or size > 16 * batch_tokens:
            batches.append([])
            size = item.cost
        batches[-1].append(item)
    return batches


def assign_batches(batches: list[list[Work]], world_size: int) -> list[list[list[Work]]]:
    """Return the batches of each rank: the costliest come first, each goes to the rank with the least work."""
    assigned, costs = [[] for _ in range(world_size)], [0] * world_size
    for batch in sorted(batches, key=lambda batch: -sum(item.cost for item in batch)):
        rank = costs.index(min(costs))
        assigned[rank].append(batch)
        costs[rank] += sum(item.cost for item in batch)
    return assigned


def make_passes(lengths: list[int], batch_tokens: int) -> Iterator[slice]:
    """Yield slices of ascending lengths, one for each pass.

    A pass has one length, or at most batch_tokens when padded to its longest row, batch_tokens / 16 of them padding.
    """
    start, tokens = 0, 0
    for i, length in enumerate(lengths):
        padded = (i + 1 - start) * length
        if i > start and (padded > batch_tokens or padded - tokens - length > batch_tokens // 16):
            yield slice(start, i)
            start, tokens = i, 0
        tokens += length
    yield slice(start, len(lengths))
