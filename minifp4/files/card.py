"""The README.md of an export: what it is, and where it comes from, as model hubs read it."""

import re
from pathlib import Path

from .. import __version__

LICENCES = {"Apache License": "apache-2.0", "MIT License": "mit"}  # first words of a LICENSE, and its name
OF_QWEN = re.compile(r"Qwen3-\d+(\.\d+)?B(-Base|-Instruct-\d+|-Thinking-\d+)?")
WEIGHTS = {
    "hf": "NVFP4 (compressed-tensors, weights only)", "modelopt": "NVFP4 (ModelOpt, weights only)",
    "mlx": "NVFP4 (MLX)", "bf16": "bf16, the values that were trained in NVFP4",
}  # fmt: skip


def write(path, layout, record, tokenizer):
    """Write the card `path` of an export in `layout`; record: the train.json of its checkpoint, or {}."""
    base = Path(str(record.get("settings", {}).get("model", ""))).name
    base = f"Qwen/{base}" if OF_QWEN.fullmatch(base) else base
    text = tokenizer.companions.get("LICENSE", b"").decode(errors="replace")
    found = [name for words, name in LICENCES.items() if words in text[:300]]
    head = {"base_model": base, "license": found[0] if found else "", "library_name": "transformers"}
    if layout == "mlx":
        head["library_name"] = "mlx"
    lines = [f"{key}: {value}" for key, value in head.items() if value]
    lines += ["pipeline_tag: text-generation", "tags: [minifp4, nvfp4]"]
    title = f"{base or 'A Qwen3'}, fine-tuned"
    body = [f"Weights: {WEIGHTS[layout]}. Written by minifp4 {__version__}."]
    if record.get("command"):
        body += ["", f"Trained to step {record['step']} by", "", "```sh", record["command"], "```"]
    path.write_text("\n".join(["---", *lines, "---", "", f"# {title}", "", *body, ""]), encoding="utf-8")
