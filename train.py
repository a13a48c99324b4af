"""Train every weight of a Qwen3 in NVFP4.

    python train.py --steps 6 --train-lm-head --train-embed      the bundled model learns a new name
    python train.py --model DIR --train-data FILE --steps 200    your Qwen3, your data
    torchrun --standalone --nproc-per-node 4 train.py ...        the same on four GPUs
    python export.py                                             then: checkpoints that other programs load

Each step: read a batch, run the model forward and backward through its 4-bit weights, update the weights
with AdamW. `python train.py --help` lists the settings; they are the fields of `Settings` below.
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

import minifp4
from minifp4 import data as reading
from minifp4 import fp8, heldout, masters, needs, parallel, rows, vocabulary
from minifp4.cli import (
    AUTO, MANY, check, choose_device, compiler_failures_named, compiles, given, groups, run, spellings,
    stopping,
)  # fmt: skip
from minifp4.files import checkpoint
from minifp4.files.atomic import check_replaceable, only_user, remove
from minifp4.keep import Keeper
from minifp4.memory import Memory, one_growing_segment
from minifp4.packed import bytes_of, tensors_of
from minifp4.step import Step
from minifp4.storage import FLOATS, KINDS, MASTERS
from minifp4.watch import Watch, matrix_rate, report_memory, warned

ROW = 4096  # tokens in a packed row, if nobody has said
HOPELESS = 10  # steps; if all of the first ones are skipped, so will be the others
BUNDLED_DATA = minifp4.BASE.parent / "mix.tsv"
what, which, how, kept, cost, output = groups(
    "what", "which weights", "how", "precision", "memory and speed", "output"
)


@dataclass
class Settings:
    model: str = what(None, "directory of a Qwen3; default: the bundled, or that of --input-dat", "DIR")
    input_dat: str = what(None, "take the weights from this TorchSharp .dat, the rest from --model", "FILE")
    init_random: bool = what(False, "start from random weights; the tokenizer may come from the data")
    train_data: str = what(str(BUNDLED_DATA), "TSV: prompt<TAB>target; JSONL; or plain text", "FILE")
    eval_data: str = what(None, "held out: never trains, is asked how well it is foretold", "FILE")
    eval_share: float = what(0.0, "hold out so much of --train-data instead", least=0.0, below=1.0)
    sample_mode: str = what("random", "order of the conversations", choices=("random", "sequential"))
    seq_len: int = what(256, "tokens of a conversation at most; longer answers are cut", least=2, most=MANY)
    drop_long: bool = what(False, "leave longer conversations out instead")
    seed: int = what(0, "of the sampling and the stochastic rounding", least=0)

    train_lm_head: bool = which(False, "train the head too")
    train_embed: bool = which(False, "train the embedding too")
    train_last_layers: int = which(0, "only the last N layers; 0: all, and the final norm", "N", least=0)
    untie: bool = which(False, "give a tied head a tensor of its own")

    steps: int = how(6, "optimizer steps", least=1, most=10**9)
    epochs: float = how(None, "passes through the data, instead of --steps", least=1e-9, most=1e4)
    batch_size: int = how(None, "conversations in a forward pass; 16, not on CUDA", least=1, most=MANY)
    batch_tokens: int = how(None, "or all that fit into so many tokens; 4096 on CUDA", least=2, most=MANY)
    grad_accum: int = how(
        None, "such passes in one step; 1, with --batch-tokens one a process", least=1, most=MANY
    )
    lr: float = how(None, "default: 5e-4 for the bundled model, 2e-5 for yours", least=0.0, below=1e3)
    warmup: int = how(0, "steps over which the learning rate rises to --lr", least=0)
    schedule: str = how("constant", "of the rate after the warm-up", choices=("constant", "cosine"))
    weight_decay: float = how(0.01, "decoupled; norms have none", least=0.0)
    beta1: float = how(0.9, "memory of the mean gradient", least=0.0, below=1 - 1e-7)  # 1 - it, in fp32
    beta2: float = how(0.95, "memory of the mean square", least=0.0, below=1 - 1e-7)
    grad_clip: float = how(None, "largest norm of the gradient; 0, and in the backward pass: any", least=0.0)
    loss: str = how("ce", "cross entropy, or |hidden - embedding| to debug with", choices=("ce", "scalar"))

    master_dtype: str = kept("nvfp4x2", "in which the weights are stored", choices=MASTERS)
    finer_ends: bool = kept(False, "with nvfp4 masters: head, embedding and last layer as nvfp4x2")
    optimizer_state: str = kept("nvfp4", "in which AdamW's moments are stored", choices=tuple(KINDS))
    product: str = kept("full", "products in training: in --compute-dtype, or fp8", choices=("full", "fp8"))
    compute_dtype: str = kept(None, "default: bf16 on GPUs that have it", choices=tuple(FLOATS))
    rounding: str = kept("stochastic", "nearest does not learn", choices=("stochastic", "nearest"))
    quantize: bool = kept(True, "read the weights through NVFP4; else as they are stored")

    step_chunk_rows: int = cost(0, "rows updated at once, with the same result; 0: the fastest", "N", least=0)
    step_in_backward: bool = cost(False, "update each weight when its gradient is there, drop that")
    activation_checkpointing: bool = cost(False, "keep one activation a layer, compute the others again")
    keep_activations: int = cost(
        0, "with the flag above: keep all of the last N layers'; auto: as fit", "N", least=0, auto=True
    )
    compile: bool = cost(None, "join small operations (torch.compile); default: on CUDA, with Triton")
    cuda_graph: bool = cost(None, "record the steps of small batches and replay them; default: on CUDA")
    memory_limit_gb: float = cost(
        None, "end with a message instead of using more (GiB)", "N", least=0.1, most=MANY
    )
    memory_report: str = cost(None, "write memory by phase and role to this JSON, and print it", "FILE")
    device: str = cost(None, "cpu, cuda, cuda:1, ...; default: cuda if there is one")

    out: str = output("out", "directory of the checkpoint and metrics.jsonl", "DIR")
    output_dat: str = output(None, "also write a .dat: --input-dat with the trained entries replaced", "FILE")
    save_every: int = output(0, "steps between checkpoints; 0: only at the end", "N", least=0)
    keep: int = output(2, "checkpoints of this run to keep", "N", least=1)
    resume: str = output(None, "go on from the newest in --out, or from DIR", "DIR", nargs="?", const="")
    log_every: int = output(1, "steps between lines", "N", least=1)
    eval_every: int = output(0, "steps between evaluations; 0: a tenth of all", "N", least=0)
    patience: int = output(0, "end when so many evaluations were not better; 0: never", "N", least=0)
    tensorboard: bool = output(False, "write the same numbers for TensorBoard, into --out")
    test_prompt: list = output(None, "asked before and after (repeatable); default: from the data", "TEXT")
    test_max_tokens: int = output(48, "tokens of an answer at most", "N", least=1, most=MANY)


# What may differ when a run goes on: nothing here changes what is computed (data is known by its content).
FREE = {
    "steps", "step_chunk_rows", "activation_checkpointing", "keep_activations", "compile", "cuda_graph",
    "memory_limit_gb", "memory_report", "device", "train_data", "eval_data", "out", "output_dat",
    "save_every", "keep", "resume", "log_every", "eval_every", "patience", "tensorboard", "test_prompt",
    "test_max_tokens", "epochs",
}  # fmt: skip


def main(settings):
    """Train as `settings` say; returns the path of the last checkpoint."""
    one_growing_segment()  # nothing is on a GPU yet
    parallel.start(settings.device)
    if parallel.rank():  # the first process speaks, and writes
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end
    asked, source, device = settle(settings)
    settings = replace_unset(asked, device)
    memory = Memory(device, settings.memory_limit_gb, in_use(settings))
    with memory.phase("load"):
        check_memory(settings, source, device)
        rate = matrix_rate(device)
        model, tokenizer = prepare_model(settings, source, device)
        counts = choose_weights(model, settings, source, device)
        data, held = heldout.split(settings, tokenizer)
        batches = make_rows(data, settings, tokenizer)
        mark = digest(settings)
        if parallel.ranks() > 1:  # it reads all weights
            held_tokens = held and held.tokens()
            parallel.check_same(weights=fingerprint(model), data=mark, held=held_tokens)
        optimizer = make_optimizer(model, settings)
        before = checkpoint.read_moments(source, optimizer) if source else {}
        start = checkpoint.number_in(before, "step", source / "train.json") if source else 0
        settings = replace(settings, steps=steps_of(settings, batches, start, source))
        step = make_step(model, optimizer, settings, memory)
        if held:
            size = settings.batch_tokens or ROW
            held = heldout.HeldOut(model, held, tokenizer.end_of_text, size, settings.loss)
    describe(settings, model, counts, optimizer, tokenizer, data, batches, held)
    record = {"trained": list(optimizer.parameters), "settings": asdict(replace(asked, steps=settings.steps)),
              "data": mark, "run": before.get("run") or secrets.token_hex(8),
              "command": shlex.join(["python", *sys.argv])}  # fmt: skip
    best = heldout.best_so_far(settings.out, record["run"], before)
    save = Saver(settings, step, tokenizer, record, memory, best)
    alone = only_user(Path(settings.out)) if parallel.rank() == 0 else contextlib.nullcontext()
    with alone, compiler_failures_named():
        prompts = test_prompts(settings, tokenizer, data)
        with memory.phase("answer"):
            answers = ask("before", model, tokenizer, prompts, settings, data)
        if parallel.rank() == 0:
            save.check(start, settings.steps, held)
        watch = Watch(settings, step, memory, start, rate)
        end = train(step, batches, held, settings, start, save, watch)
        step.close()
        path = save(end)  # before anything else can go wrong
        with memory.phase("answer"):
            ask("after", model, tokenizer, prompts, settings, data, answers)
        if parallel.rank() == 0:
            finish(settings, step, memory, path, best if best.step != end else None)
    return path


def settle(settings):
    """(what is asked for, the checkpoint to resume from or None, the device), before anything is loaded."""
    check(settings)
    for one, other in (("epochs", "steps"), ("batch_tokens", "batch_size"), ("eval_data", "eval_share")):
        if {one, other} <= given(settings):
            raise ValueError(f"{spellings(one)[0]} and {spellings(other)[0]} exclude each other")
    settings, source = find_start(settings)
    device = choose_device(settings.device)
    settings = replace(settings, **batch_of(settings, device))
    check_together(settings, device)
    parallel.check_same(version=minifp4.__version__, torch=torch.__version__, **numbers_of(settings))
    return settings, source, device


def finish(settings, step, memory, path, best):
    """Write what else is asked for, and say what there is now; best: `heldout.Best` of another step, or
    None."""
    print(f"saved   {path} ({directory_size(path) / 2**20:.1f} MiB)")
    if settings.output_dat:
        trained = step.optimizer.parameters
        checkpoint.write_dat(Path(settings.output_dat), step.model, settings.input_dat, trained)
        print(f"saved   {settings.output_dat}")
    if settings.memory_report:
        report_memory(Path(settings.memory_report), memory, step)
    if best and best.step:
        where = Path(settings.out) / checkpoint.BEST
        print(f"best    {where}: step {best.step}, held-out loss {best.loss:.4f}; export.py --best")
    usual = settings.out == "out" and checkpoint.model_directory("out") == path
    print("next    python export.py" + ("" if usual else f" --checkpoint {shlex.quote(str(path))}"))


def check_memory(settings, source, device):
    """Raise a Shortage, before anything is loaded, if the model cannot fit."""
    directory = source or Path(settings.model)
    config = checkpoint.read_config(checkpoint.model_directory(directory))
    config.tie_word_embeddings &= not settings.untie
    there = needs.available(device, settings.memory_limit_gb)
    gradient = FLOATS.get(settings.compute_dtype, masters.default_compute_dtype(device)).itemsize
    needs.check(config, needs.PACKED, gradient, there, **asdict(settings))


def in_use(settings):
    """What `memory.ADVICE` need not say, because it is done already."""
    done = {
        "--master-dtype nvfp4": settings.master_dtype == "nvfp4",
        "--optimizer-state nvfp4": settings.optimizer_state == "nvfp4",
        "--activation-checkpointing": settings.activation_checkpointing and settings.keep_activations <= 0,
        "--step-in-backward": settings.step_in_backward,
        "--step-chunk-rows": settings.step_chunk_rows,
        "a smaller --batch-size": settings.batch_size in (1, None),
        "a smaller --batch-tokens": settings.batch_tokens is None,
        "--no-cuda-graph": settings.cuda_graph is not True,
    }
    return {what for what, is_so in done.items() if is_so}


def batch_of(settings, device):
    """What nobody has said of a step's batch: what is faster, and of packed rows one for each process."""
    size, tokens, parts = settings.batch_size, settings.batch_tokens, settings.grad_accum
    if not size and not tokens and device.type == "cuda":
        tokens = max(ROW, settings.seq_len)
    elif not tokens:
        size = size or 16
    parts = parts or (parallel.ranks() if tokens else 1)
    return {"batch_size": size, "batch_tokens": tokens, "grad_accum": parts}


def make_rows(data, settings, tokenizer):
    """The `rows.Rows` that train."""
    size = settings.batch_tokens
    if size:  # a row is never longer than all there is
        all_of_it = data.tokens()
        size = min(size, all_of_it + -all_of_it % 64)
    try:
        return rows.Rows(
            data.examples, tokenizer.end_of_text, size=size, count=settings.batch_size,
            mode=settings.sample_mode, seed=settings.seed, multiple=64 if settings.cuda_graph else 1,
        )  # fmt: skip
    except ValueError as error:
        advice = "give a larger --batch-tokens or a smaller --seq-len"
        raise ValueError(f"{settings.train_data}: {error}; {advice}") from None


def steps_of(settings, batches, start, source):
    """The last step: --steps, or what --epochs makes of it."""
    steps = settings.steps
    if settings.epochs is not None:
        steps = math.ceil(batches.until(settings.epochs) / settings.grad_accum)
    if steps <= start:
        raise ValueError(f"{source} is at step {start} already; give a larger --steps, not {steps}")
    return steps


class Saver:
    """`path = save(step)`: the checkpoint of a step of this run, written once; older ones of it are removed.

    record: what train.json says beside the step. best: `heldout.Best`. name: of another directory than
    step-N.
    """

    def __init__(self, settings, step, tokenizer, record, memory, best):
        self.settings, self.step, self.tokenizer, self.record = settings, step, tokenizer, record
        self.memory, self.written, self.best = memory, {}, best

    def __call__(self, number, name=None):
        if (number, name) not in self.written:
            with self.memory.phase("save"):
                state = {"step": number, **self.record, "best": asdict(self.best)}
                parts = (self.step.model, self.tokenizer, self.step.optimizer, state)
                self.written[number, name] = checkpoint.save(self.settings.out, *parts, name)
            for old in self._own()[: -self.settings.keep] if parallel.rank() == 0 else ():
                with warned(f"cannot remove {old}"):
                    remove(old)
        return self.written[number, name]

    def check(self, start, steps, held):
        """Raise an error now, not after hours, if something of the user's has a name that will be needed, or
        the disk is full."""
        every = self.settings.save_every
        numbers = {steps, *(range(start + every - start % every, steps, every) if every else ())}
        names = [checkpoint.name_of(number) for number in sorted(numbers)] + [checkpoint.BEST] * bool(held)
        for name in names:
            check_replaceable(Path(self.settings.out) / name, mark="train.json")
        size = sum(bytes_of(p) for p in self.step.model.parameters())
        size += self.step.optimizer.nbytes() * parallel.ranks()
        free = shutil.disk_usage(self.settings.out).free
        if size > free:
            sizes = f"a checkpoint takes {size / 2**20:,.1f} MiB, only {free / 2**20:,.1f} are free"
            raise ValueError(f"{self.settings.out}: {sizes}; choose another --out")

    def _own(self):
        """The checkpoints of this run, also those that it wrote before it was resumed, oldest first."""
        found, mine = checkpoint.checkpoints(self.settings.out), self.record["run"]
        return [path for path in found if checkpoint.read_json(path / "train.json").get("run") == mine]


def find_start(settings):
    """(settings with defaults filled in, the checkpoint to resume from or None)."""
    if settings.resume is None:
        folder = Path(settings.input_dat).parent if settings.input_dat else minifp4.BASE
        settings = replace(settings, model=settings.model or str(folder))
        return replace(settings, lr=default_rate(settings.lr, settings.model)), None
    source = checkpoint.model_directory(settings.resume or settings.out)
    record = checkpoint.read_json(source / "train.json")
    old = settings_of(record, source / "train.json")
    for name in sorted(given(settings) - FREE) + ["steps", "epochs"] * (old.schedule != "constant"):
        if getattr(settings, name) != getattr(old, name) and name in given(settings):
            raise ValueError(
                f"{spellings(name)[0]} {getattr(settings, name)}: {source} has "
                f"{getattr(old, name) or 'the default'}; that cannot change when a run resumes"
            )
    old = replace(old, lr=default_rate(old.lr, source))
    print(f"resume  {source}, from step {record.get('step')}")
    # A file does not say where this run writes: it may be a copy, or somebody else's.
    here = {"out": settings.out if "out" in given(settings) or not settings.resume else str(source.parent)}
    here |= {name: None for name in ("output_dat", "memory_report")}
    here |= {"epochs": None} if "steps" in given(settings) else {}
    new = replace(old, **here | {name: getattr(settings, name) for name in given(settings) & FREE})
    if digest(new) != record.get("data"):
        raise ValueError(f"--train-data {new.train_data} has changed since {source} was made")
    return new, source


def settings_of(record, path):
    """The `Settings` that a train.json keeps; ValueError for any that this version does not have."""
    kept = record.get("settings")
    known = {field.name: field for field in fields(Settings)}
    if not isinstance(kept, dict):
        raise ValueError(f"{path}: the key \"settings\" is missing")
    if unknown := sorted(kept.keys() - known.keys()):
        raise ValueError(f"{path}: unknown settings: {', '.join(unknown)}; was it made by a newer version?")
    for name, value in kept.items():
        right = (int, float) if known[name].type is float else known[name].type
        missing = value is None and known[name].default is not None
        if missing or value is not None and not isinstance(value, right):
            raise ValueError(f"{path}: {name} must be {known[name].type.__name__}, got {value!r}")
    settings = Settings(**kept)
    check(settings)
    return settings


def check_together(settings, device):
    """Raise ValueError for settings that exclude each other, before anything is loaded."""
    for name in ("output_dat", "memory_report"):
        path = getattr(settings, name) and Path(getattr(settings, name))
        if path and not path.parent.is_dir():
            raise FileNotFoundError(f"{spellings(name)[0]} {path}: there is no directory {path.parent}")
        if path and path.is_dir():
            raise IsADirectoryError(f"{spellings(name)[0]} {path} is a directory, not a file")
    for name in ("eval_every", "patience"):
        if getattr(settings, name) and not (settings.eval_data or settings.eval_share):
            raise ValueError(f"{spellings(name)[0]} needs --eval-data or --eval-share")
    if settings.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if settings.finer_ends and settings.master_dtype != "nvfp4":
        raise ValueError(f"--finer-ends is for --master-dtype nvfp4, not {settings.master_dtype}")
    parts, size = settings.grad_accum, settings.batch_size
    if parts % parallel.ranks() and (not size or size % parallel.ranks()):
        one = f"--batch-size {size}" if size else f"--batch-tokens {settings.batch_tokens}"
        raise ValueError(
            f"--grad-accum {parts} x {one} cannot be divided among {parallel.ranks()} processes: make "
            f"{'one of them' if size else 'the first'} a multiple of {parallel.ranks()}"
        )
    if settings.step_in_backward and settings.grad_clip:
        raise ValueError(
            f"--grad-clip {settings.grad_clip:g} needs the norm of all gradients, and with "
            "--step-in-backward they never exist at once; leave it out (each update is limited to 10 times "
            "--lr anyway)"
        )
    kept = "auto" if settings.keep_activations == AUTO else settings.keep_activations
    if kept and not settings.activation_checkpointing:
        raise ValueError(
            f"--keep-activations {kept} is for --activation-checkpointing: without it "
            "all layers keep theirs"
        )
    if kept == "auto" and device.type != "cuda":
        raise ValueError(
            f"--keep-activations auto: the device is {device}, and only CUDA says what memory is left; give "
            "a number"
        )
    if settings.compile and device.type == "cuda" and not compiles(device):
        raise ValueError("--compile: on a GPU torch.compile needs the package triton, which is not installed")
    if settings.product == "fp8" and (reason := fp8.why_not(device)):
        raise ValueError(f"--product fp8: {reason}")
    if settings.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda-graph: the device is {device}, and only CUDA has graphs")


def replace_unset(settings, device):
    """Compile and record where that is usual on this device, if nobody has said."""
    compile = compiles(device) if settings.compile is None else settings.compile
    dtype = FLOATS.get(settings.compute_dtype) or masters.default_compute_dtype(device)
    recordable = rows.in_one_kernel(device, dtype)
    graph = recordable if settings.cuda_graph is None else settings.cuda_graph
    if graph and device.type == "cuda" and not recordable:
        raise ValueError("--cuda-graph: attention in packed rows is recorded on GPUs from 8.0 on, in 16 bits")
    return replace(settings, compile=compile, cuda_graph=graph)


def numbers_of(settings):
    """{flag: value} of what all processes must have alike, whatever a directory is called on each machine."""
    kinds = {field.name: field.type for field in fields(settings)}
    return {spellings(name)[0]: value for name, value in asdict(settings).items() if kinds[name] is not str}


def fingerprint(model):
    """Differs where the weights of two processes do."""
    sums = []
    for p in model.parameters():
        for part in tensors_of(p):
            sums.append(part.flatten().view(torch.uint8).sum(dtype=torch.int64))
    return hashlib.sha256(torch.stack(sums).cpu().numpy().tobytes()).hexdigest()[:16]


def digest(settings):
    """What tells one --train-data from another."""
    path, found = Path(settings.train_data), hashlib.sha256()
    for file in sorted(path.glob("*.txt")) if path.is_dir() else [checkpoint.existing(path)]:
        found.update(file.read_bytes())
    return found.hexdigest()


def prepare_model(settings, source, device):
    """The model and tokenizer to start from: on `device`, but a new model, which `set_masters` brings there
    packed, on the CPU."""
    directory = source or Path(settings.model)
    how = {"quantize": settings.quantize, "device": device if source else "cpu"}
    if settings.init_random and not source:
        config = checkpoint.read_config(directory)
        if not (directory / "tokenizer.json").is_file():
            tokenizer = new_tokenizer(settings, config.vocab_size)
        else:
            tokenizer = checkpoint.read_tokenizer(directory)
        checkpoint.check_vocabulary(directory, config, tokenizer)
        config.source |= {"eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end_of_text}
        model = masters.initialize(config, settings.seed, **how)
    else:
        input_dat = None if source else settings.input_dat
        model, tokenizer = checkpoint.load(directory, input_dat=input_dat, **how)
    dtype = settings.compute_dtype and FLOATS[settings.compute_dtype]
    model.set_compute_dtype(dtype or masters.default_compute_dtype(device))
    if settings.product == "fp8":
        fp8.use(model)
    model.model.activation_checkpointing = settings.activation_checkpointing
    model.model.keep_activations = max(0, settings.keep_activations)  # if AUTO: those that `Keeper` finds
    return model, tokenizer


def new_tokenizer(settings, size):
    """A tokenizer for the texts of --train-data; it is written with the first checkpoint."""
    texts = []
    for _, record in reading.read_records(settings.train_data):
        texts += [message["content"] for message in record.get("messages", ())]
        texts += [record[key] for key in ("prompt", "completion", "text") if key in record]
    with tempfile.TemporaryDirectory() as directory:
        vocabulary.train_tokenizer(texts, size, Path(directory))
        return checkpoint.read_tokenizer(Path(directory))


def choose_weights(model, settings, source, device):
    """Choose what trains, and store it in --master-dtype on `device`; returns the counts by kind."""
    tied = model.config.tie_word_embeddings
    if settings.untie and not tied and not source:
        raise ValueError("--untie: the head and the embedding of this model are not tied")
    if settings.untie and tied:
        model.untie()
    elif tied and (settings.train_lm_head or settings.train_embed):
        print("note    the head and the embedding are one tensor here, and it trains; --untie would split it")
    counts = masters.choose_trained(
        model,
        lm_head=settings.train_lm_head,
        embed=settings.train_embed,
        last_layers=settings.train_last_layers,
    )
    if not source:
        masters.set_masters(model, settings.master_dtype, device, settings.finer_ends)
    return counts


def make_optimizer(model, settings):
    optimizer = minifp4.AdamW(
        model.named_parameters(),
        learning_rate(settings),
        (settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        state=settings.optimizer_state,
        rounding=settings.rounding,
        seed=settings.seed,
    )
    optimizer.chunk_rows = settings.step_chunk_rows
    return optimizer


def make_step(model, optimizer, settings, memory):
    """The `Step` of this run, fused and recorded if that is asked for."""
    clip = settings.grad_clip
    if settings.compile:
        from minifp4.fused import fuse

        fuse(model, optimizer)
    step = Step(
        model, optimizer, kind=settings.loss, in_backward=settings.step_in_backward, memory=memory,
        grad_clip=(0.0 if settings.step_in_backward else 1.0) if clip is None else clip,
    )  # fmt: skip
    if settings.cuda_graph or parallel.ranks() > 1 and model.device.type == "cuda":
        from minifp4.fused import record

        record(step, recorded=settings.cuda_graph)
    if settings.keep_activations == AUTO:
        Keeper(step, memory)
    return step


def default_rate(lr, directory):
    """`lr`, or if that is None the usual rate for the model in `directory`: the bundled one, known by its
    shape wherever it lies, or a larger one."""
    if lr is not None or not (Path(directory) / "config.json").is_file():
        return lr
    found, bundled = (checkpoint.read_config(Path(place)) for place in (directory, minifp4.BASE))
    return 5e-4 if replace(found, source={}) == replace(bundled, source={}) else 2e-5


def learning_rate(settings, step=None):
    """The rate of `step` (0, 1, ...); the highest of all if None."""
    top = 2e-5 if settings.lr is None else settings.lr
    if step is None:
        return top
    if step < settings.warmup:
        return top * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return top
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)  # of the way down
    return top * 0.5 * (1 + math.cos(math.pi * share))


def train(step, batches, held, settings, start, save, watch):
    """The steps after `start`, with an evaluation now and then; returns the step at which it ended."""
    best, device = save.best, step.model.device
    every = settings.eval_every or max(1, settings.steps // 10)
    if settings.compile:
        print("note    the first step compiles, a minute or so; --no-compile does without", flush=True)
    if held and not start:
        with save.memory.phase("evaluate"):
            watch.held_out(0, held.loss(), False)
    with stopping() as stop:
        for number in range(start, settings.steps):
            parts = range(number * settings.grad_accum, (number + 1) * settings.grad_accum)
            step.optimizer.lr = learning_rate(settings, number)
            result = step(batches.mine(parts, device, joined=settings.step_in_backward))
            done, tokens = number + 1, sum(map(batches.tokens, parts))
            stopped = parallel.largest(stop.signal or 0)  # a signal may reach them in different steps
            skipped = watch.after(done, result, tokens, batches.passed(parts.stop), now=stopped)
            if skipped == done - start and (skipped >= HOPELESS or done == settings.steps):
                raise ValueError(f"all {skipped} steps were skipped: the loss or the gradient is not finite")
            if stopped and done < settings.steps:
                print(f"saved   {save(done)}; --resume goes on from there")
                step.close()
                parallel.close()
                sys.exit(128 + stopped)
            if held and (done % every == 0 or done == settings.steps):
                with watch.paused():
                    with save.memory.phase("evaluate"):
                        loss = held.loss()
                    better = best.take(loss, done)
                    watch.held_out(done, loss, better)
                    if better:
                        save(done, checkpoint.BEST)
                if settings.patience and best.since >= settings.patience:
                    print(f"note    no better for {best.since} evaluations: this ends at step {done}")
                    return done
            if settings.save_every and done % settings.save_every == 0:
                with watch.paused():
                    save(done)
    return settings.steps


def describe(settings, model, counts, optimizer, tokenizer, data, batches, held):
    """What is about to happen: the machine, the model, what trains, what a weight costs, the data."""
    config, device = model.config, model.device
    place = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    place += f", {parallel.ranks()} processes" if parallel.ranks() > 1 else ""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in optimizer.parameters.values())
    masters = sum(bytes_of(p) for p in optimizer.parameters.values())
    moments = optimizer.nbytes()
    tied = "tied" if config.tie_word_embeddings else "untied"
    dtype = str(model.model.compute_dtype).removeprefix("torch.")
    kinds = " ".join(f"{kind}={count}" for kind, count in counts.items())
    read = "NVFP4" if model.quantized else "stored"
    print(f"minifp4 {minifp4.__version__}, torch {torch.__version__}, {place}, {dtype}")
    print(
        f"model   {settings.model}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"vocabulary {config.vocab_size}, {tied}, {total / 1e6:.2f} M weights"
    )
    print(f"trains  {kinds} total={sum(counts.values())} ({trained / 1e6:.2f} M weights)")
    print(
        f"bytes   a weight: {masters / trained:.2f} master ({settings.master_dtype}) + "
        f"{moments / trained:.2f} moments ({settings.optimizer_state}) = "
        f"{(masters + moments) / trained:.2f}; read as {read}"
    )
    if settings.product == "fp8":
        slow = "" if device.type == "cuda" else ", here only emulated: the same numbers, slower"
        print(f"note    products of training are in FP8{slow}")
    describe_data(settings, tokenizer, data, batches, held)


def describe_data(settings, tokenizer, data, batches, held):
    """The last part of that."""
    if data.first:
        print(f"format  {tokenizer.template}")
    kind = ("conversation" if data.first else "text") + "s" * (data.records > 1)
    size = f"{settings.batch_size} x {settings.grad_accum} a step"
    if batches.size:
        size = f"{settings.grad_accum} x {batches.size:,} tokens a step, {batches.full():.0%} full"
    print(
        f"data    {settings.train_data}: {data.records:,} {kind}, {data.tokens():,} tokens; {size}, "
        f"{settings.sample_mode}"
    )
    joined = settings.grad_accum // parallel.ranks() if settings.step_in_backward else 1
    if joined > 1:
        print(f"note    --step-in-backward computes {joined} of --grad-accum's parts at once, as one row")
    if data.cut:
        print(f"note    {data.cut} longer than --seq-len were cut: {data.lost:,} tokens are lost")
    if data.dropped:
        print(f"note    {data.dropped} longer than --seq-len are left out")
    if held:
        print(f"held    {held.data.records:,} {kind} are held out, {held.data.tokens():,} tokens")


def test_prompts(settings, tokenizer, data):
    """[(what is printed, what is asked)]: messages, the data's system message among them; or tokens to go on
    from, if the data is texts."""
    system = [message for message in (data.first or ([], None))[0][:1] if message["role"] == "system"]
    texts = settings.test_prompt
    if texts is None and settings.train_data == str(BUNDLED_DATA):
        texts = ["你是誰", "談談UFO"]
    if texts is None:
        messages = data.first[0] if data.first else []
        return [(messages[-1]["content"], messages)] if messages else []
    if not data.first:
        return [(text, tokenizer.encode(text)) for text in texts]
    return [(text, [*system, {"role": "user", "content": text}]) for text in texts]


def ask(when, model, tokenizer, prompts, settings, data, before=None):
    """Print and return the answers to `prompts`; `before`: earlier ones, to say which are the same."""
    how = {"max_new_tokens": settings.test_max_tokens, "thinking": data.thinks}
    how["tools"] = data.first[1] if data.first else None
    with torch.compiler.set_stance("force_eager"):  # else every length of text would be compiled for itself
        answers = [minifp4.generate(model, tokenizer, asked, **how) for _, asked in prompts]
    for (prompt, _), answer, old in zip(prompts, answers, before or [None] * len(prompts)):
        prompt, shown = prompt.replace("\n", "\\n"), answer.replace("\n", "\\n")
        print(f"{when:8}{prompt} → {shown}" + ("   (as before)" if answer == old else ""), flush=True)
    return answers


def directory_size(path):
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


if __name__ == "__main__":
    run(main, Settings, __doc__)
