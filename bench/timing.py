"""Medians of CUDA-event timings, the L2 cache flushed before each call."""

import statistics

import torch

L2_FLUSH_BYTES = 256 << 20
COPY_BYTES = 2 << 30


def median_ms(call, budget_ms=300.0, most=200, count=None):
    """Median GPU time of call(), in ms: calls follow one another with no synchronisation. Ranks
    that call together give `count`, lest each finds its own."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    call()
    torch.cuda.synchronize()
    once = elapsed([timed(call, flush) for _ in range(5)])
    count = count or max(10, min(most, int(budget_ms / statistics.median(once))))
    return statistics.median(elapsed([timed(call, flush) for _ in range(count)]))


def timed(call, flush):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    call()
    end.record()
    return begin, end


def elapsed(pairs):
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def graphed(call):
    """A function that replays call() from a CUDA graph; call() must be warm already."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def copy_bytes_per_second():
    """What this card reaches in a device-to-device copy, bytes read plus bytes written."""
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (median_ms(lambda: target.copy_(source)) * 1e-3)


def peak_extra_bytes(call):
    """The most memory call() holds at once beyond what was held before it."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
