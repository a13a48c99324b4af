"""What makes it fast: the same arithmetic as the modules above this folder, as kernels.

    codes.py     nvfp4.py and packed.py with bits, on the even and the odd columns side by side
    update.py    storage.py and optim.py: the whole update of a matrix in one kernel
    norms.py     the norms and rotary positions of model.py with the sums around them, one kernel each way
    layers.py    `fuse(model, optimizer)`, the only door: products, blocks, the loss
    graph.py     `record(step)`: a step as a CUDA graph, updates on a stream beside
    compiled.py  how torch.compile is used

Nothing outside imports any of this but the programs, through the door. Without it everything runs, slower.
What is equal to what, and the test that holds it (all of them run on a CPU, eagerly and compiled):

    decoded values, codes, scales     all bits                             tests/test_fused.py
    the update: weights, moments      all bits on a CPU; on a GPU a product and a sum are one instruction,
                                      which rounds once, so a number near the middle of two places may go
                                      the other way                        tests/test_fused.py
    norms, rotary positions, SwiGLU   all bits in fp32; in bf16 sums are rounded once instead of each
                                      (compiled: added up in another order)     tests/test_norms.py
    what FP8 products read            all bits                             tests/test_fp8.py
    loss, products                    all bits eagerly; compiled, a logsumexp is added up in another order
    a recorded step                   all bits of the same kernels unrecorded   tests/test_step.py
"""

from .graph import record
from .layers import fuse

__all__ = ["fuse", "record"]
