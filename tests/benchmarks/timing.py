"""How the benchmarks take time: synchronized, after a warm-up."""

import time

import torch


def seconds(function, device, repeats, warm_up=3):
    """The times of `repeats` calls, after `warm_up` that do not count."""
    times = []
    for _ in range(warm_up + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[warm_up:]


def recorded(function, device, mode="global"):
    """The function as a CUDA graph, so that its time is the GPU's and not Python's; mode: of the capture."""
    if device != "cuda":
        return function
    function()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        function()

    def replay(function=function):  # whose tensors must live as long
        graph.replay()

    return replay


def place(device):
    """The name of the machine."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
