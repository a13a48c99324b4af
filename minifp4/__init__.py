"""minifp4: train every weight of a Qwen3 in NVFP4, in plain PyTorch. README.md says in which order to read
it."""

__version__ = "0.1.0"  # before what reads it

from .files.checkpoint import BASE, load
from .generate import generate
from .nvfp4 import NVFP4, dequantize, quantize
from .optim import AdamW

__all__ = ["BASE", "NVFP4", "AdamW", "dequantize", "generate", "load", "quantize"]
