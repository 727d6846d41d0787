"""Ranks as threads of one process, for tests of what ranks say to each other."""

import threading

import torch


class ThreadCollective:
    """A `Collective` between threads; `parts` and `barrier` are shared by all ranks."""

    def __init__(self, parts, barrier, rank):
        self.parts, self.barrier, self.rank, self.world = parts, barrier, rank, len(parts)

    def all_gather(self, tensor):
        self.parts[self.rank] = tensor.clone()
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        assert len({(part.shape, part.dtype) for part in parts}) == 1
        return parts

    def all_reduce_sum(self, tensor):
        return torch.stack(self.all_gather(tensor)).sum(dim=0)

    def all_reduce_max(self, tensor):
        return torch.stack(self.all_gather(tensor)).amax(dim=0)


def on_ranks(world, work):
    """What work(collective) gives on each of so many ranks. An error of one of them is raised here."""
    parts, barrier, results, errors = [None] * world, threading.Barrier(world, timeout=600), [None] * world, []

    def run(rank):
        try:
            results[rank] = work(ThreadCollective(parts, barrier, rank))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
