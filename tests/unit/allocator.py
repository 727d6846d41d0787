"""What PyTorch's allocator is asked for."""

import torch


def allocations(run):
    """Changes in allocated bytes while this runs, in order, as PyTorch's allocator tells them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(changes):
    return int(torch.tensor(changes).cumsum(0).max())
