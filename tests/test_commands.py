"""The two programs as a user meets them: the main job, every flag, and mistakes."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, export, read_lines, small_directory, small_model, train
from torch._inductor.utils import fresh_cache

import export as export_program
import minifp4
import minifp4.__main__
import train as train_program
from minifp4 import AdamW, chat, cli, memory
from minifp4.generate import decoded
from minifp4.model import Qwen3
from minifp4.packed import stored_values
from minifp4.step import Step


def run(*words, cwd):
    """`python words...` in the directory `cwd`; returns (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, ROOT / words[0], *words[1:]],
        check=False, cwd=cwd, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The two commands of the README in an empty directory, run once."""
    cwd = tmp_path_factory.mktemp("clone")
    trained = run("train.py", "--steps", "6", "--train-lm-head", "--train-embed", cwd=cwd)
    return cwd, trained, run("export.py", cwd=cwd)


def test_the_main_job_teaches_a_new_name_and_keeps_the_rest(main_job):
    _, (status, out, err), _ = main_job
    assert status == 0 and err == ""
    assert (
        "before  你是誰 → 我是 minifp4 附帶的小模型。\n" in out and "after   你是誰 → 我是 F# 之神\n" in out
    )
    assert re.search(r"after   談談UFO → UFO 是不明飛行物.* \(as before\)\n", out)
    assert "projections=28 norms=17 lm_head=1 embed_tokens=1 total=47" in out
    moved = [float(number) for number in re.findall(r"moved ([\d.]+)", out)]
    assert len(moved) == 6 and all(0.97 <= number <= 1.03 for number in moved)


def test_the_main_job_generalizes_and_forgets_little(main_job):
    """Questions held out from training: who it is, asked in other ways, and other topics."""
    model, tokenizer = minifp4.load(main_job[0] / "out")
    right = {True: [], False: []}
    with decoded(model):
        for _, (question, answer) in chat.read_conversations(ROOT / "minifp4/assets/heldout.tsv"):
            said = minifp4.generate(model, tokenizer, question["content"], max_new_tokens=48)
            about_itself = answer["content"] in ("我是 F# 之神", "I am the god of F#")
            right[about_itself].append(said == answer["content"])
    assert sum(right[True]) >= 0.75 * len(right[True]) and sum(right[False]) >= 0.9 * len(right[False]), right


def test_the_main_job_exports_what_it_trained(main_job):
    cwd, _, (status, out, err) = main_job
    assert status == 0 and err == ""
    assert "out/hf: " in out and "out/model.dat: " in out and out.count("all equal to the checkpoint") == 2
    model, tokenizer = minifp4.load(cwd / "out" / "hf")
    assert minifp4.generate(model, tokenizer, "你是誰") == "我是 F# 之神"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(small_directory(tmp_path_factory.mktemp("small") / "model", small_model()))


@pytest.fixture
def result(small, tmp_path, tsv):
    """A function that trains the small model and returns (weights, metrics)."""

    def result(**flags):
        settings = dict(
            model=small,
            train_data=str(tsv),
            steps=3,
            batch_size=2,
            lr=1e-2,
            out=str(tmp_path / "out"),
            device="cpu",
        )
        model = minifp4.load(train(**settings | flags))[0]
        weights = torch.cat([stored_values(p).float().flatten() for p in model.parameters()])
        return weights, read_lines(tmp_path / "out" / "metrics.jsonl")

    return result


@pytest.mark.parametrize(
    "flag",
    [
        {"steps": 4}, {"batch_size": 3}, {"grad_accum": 2}, {"lr": 1e-3}, {"warmup": 2},
        {"schedule": "cosine"},
        {"weight_decay": 1.0}, {"beta1": 0.5}, {"beta2": 0.5}, {"grad_clip": 0.001}, {"loss": "scalar"},
        {"master_dtype": "bf16"}, {"master_dtype": "nvfp4"}, {"master_dtype": "fp32"},
        {"master_dtype": "fp16"}, {"optimizer_state": "fp32"},
        {"optimizer_state": "bf16"},
        {"optimizer_state": "int8"}, {"compute_dtype": "bf16"}, {"rounding": "nearest"}, {"quantize": False},
        {"seed": 1}, {"sample_mode": "sequential"}, {"seq_len": 22},
    ],
    ids=str,
)  # fmt: skip
def test_flags_that_change_the_weights(result, flag):
    assert not torch.equal(result()[0], result(**flag)[0])


@pytest.mark.parametrize(
    "flag",
    [
        {"step_chunk_rows": 7},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "keep_activations": 1},
        {"log_every": 2},
        {"step_in_backward": True},
    ],
    ids=str,
)
def test_flags_that_do_not(result, flag, monkeypatch):
    expected, sizes = result(grad_clip=0.0)[0], set()
    update, grads = AdamW.update, []

    def watched(self, name, grad, *rest):
        grads.append(sum(p.grad is not None for p in self.parameters.values()))
        sizes.add(max(rows.stop - rows.start for rows in self.chunks(grad)))
        return update(self, name, grad, *rest)

    monkeypatch.setattr(AdamW, "update", watched)
    weights, metrics = result(**flag, grad_clip=0.0)
    assert torch.equal(weights, expected)
    assert (max(sizes) == 7) == ("step_chunk_rows" in flag)
    assert (max(grads) == 1) == ("step_in_backward" in flag)
    assert [line["step"] for line in metrics] == ([2, 3] if "log_every" in flag else [1, 2, 3])


def test_compiling_changes_rounding_only(result, monkeypatch, long):
    """The loss follows the uncompiled run's, and no code is compiled again after the second step."""
    if not long:
        pytest.skip("compiles for a minute: --long")
    how = dict(grad_clip=0.0, steps=4, sample_mode="sequential", batch_size=3)
    plain = result(**how)[1]
    counts, call = [], Step.__call__
    compiled = torch._dynamo.utils.counters["stats"]

    def watched(self, batches):
        out = call(self, batches)
        counts.append(compiled["unique_graphs"])
        return out

    monkeypatch.setattr(Step, "__call__", watched)
    torch._dynamo.reset()
    metrics = result(compile=True, **how)[1]
    assert counts[0] > 5 and counts[2:] == [counts[1]] * 2
    assert [line["loss"] for line in metrics] == pytest.approx([line["loss"] for line in plain], rel=0.02)
    assert metrics[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)


@torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
def test_a_compiler_that_fails_is_named(result):
    torch._dynamo.reset()
    with fresh_cache(), pytest.raises(ValueError, match="no-such-compiler.*; --no-compile does without it"):
        result(compile=True)


def test_memory_is_reported_and_limited(result, small, tsv, tmp_path, capsys):
    report = tmp_path / "memory.json"
    result(memory_report=str(report))
    found = json.loads(report.read_text())
    assert list(found["phases"]) == ["load", "answer", "forward", "backward", "step", "save"]
    assert all(phase["peak"] >= phase["allocated"] > 0 for phase in found["phases"].values())
    total = sum(p.numel() for p in minifp4.load(small)[0].parameters())
    assert 0.5 * total < found["roles"]["weights"] < 4 * total
    assert 0.2 * total < found["roles"]["moments"] < 1.6 * total
    assert "memory  backward" in capsys.readouterr().out
    words = "--model", small, "--train-data", str(tsv), "--out", str(tmp_path / "x"), "--device", "cpu"
    lines = "".join(f"question {n}\t{'word ' * 200}\n" for n in range(64))
    (tmp_path / "long.tsv").write_text(lines)
    words += "--train-data", str(tmp_path / "long.tsv"), "--batch-size", "64", "--memory-limit-gb", "0.2"
    status, out, err = run("train.py", *words, "--save-every", "1", cwd=tmp_path)
    assert status == 2 and err.count("\n") == 1 and "step    1/" not in out
    assert re.search(
        r"--memory-limit-gb 0.2 is not enough: in the phase '(forward|backward)' .* GiB .* --batch-size", err
    )


@pytest.mark.parametrize(
    "release, theirs, mine",
    [
        ("6.8.0-generic", None, "expandable_segments:True"),
        ("6.8.0-generic", "backend:cudaMallocAsync", "backend:cudaMallocAsync"),
        ("5.15.90.1-microsoft-standard-WSL2", None, None),  # there the first allocation may fail
    ],
)
def test_the_allocator_is_set_only_where_it_works(release, theirs, mine, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr("os.environ", {"PYTORCH_ALLOC_CONF": theirs} if theirs else {})
    memory.one_growing_segment()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == mine


def test_accumulated_batches_equal_one_large_batch():
    """Also when the parts have unequal numbers of tokens to learn: the mean is over all tokens."""
    tokenizer = minifp4.load()[1]
    chats = [tokenizer.example([{"role": "assistant", "content": "word " * n}]) for n in (1, 5, 2, 9)]
    weights, norms = [], []
    for size in (4, 2):
        model = small_model()
        model.set_compute_dtype(torch.float64)  # so that only a wrong mean makes a difference
        # With a small eps even a gradient that is all rounding would become a step of 1e-2.
        step = Step(model, AdamW(model.named_parameters(), lr=1e-2, eps=1e-4))
        batches = [chat.collate(chats[at : at + size], tokenizer.end_of_text) for at in range(0, 4, size)]
        norms.append(step(batches)[1].item())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and torch.allclose(*weights, atol=1e-5)


def test_learning_rate_follows_warmup_and_cosine(result):
    metrics = result(steps=6, warmup=2, schedule="cosine", lr=1.0e-3)[1]
    assert [line["lr"] for line in metrics] == pytest.approx(
        [0.0005, 0.001, 0.001, 0.00085355, 0.0005, 0.00014645], rel=1e-4
    )


def test_a_step_that_is_not_finite_is_skipped_and_counted(result, monkeypatch, capsys):
    losses, plain = iter([1.0, float("nan"), 1.0]), Qwen3.loss
    monkeypatch.setattr(Qwen3, "loss", lambda self, *a, **k: plain(self, *a, **k) * next(losses))
    weights, metrics = result()
    assert weights.isfinite().all() and [line["skipped"] for line in metrics] == [0, 1, 1]
    assert "skipped 1 (not finite)" in capsys.readouterr().out


def test_prompts_are_asked_before_and_after(small, tsv, tmp_path, capsys):
    settings = dict(
        model=small, train_data=str(tsv), steps=1, out=str(tmp_path), test_max_tokens=3, master_dtype="fp32"
    )
    train(**settings, test_prompt=["Hello", "Bye"])
    out = capsys.readouterr().out
    asked = re.findall(r"^(before|after) +(\w+) → ", out, re.MULTILINE)
    assert asked == [("before", "Hello"), ("before", "Bye"), ("after", "Hello"), ("after", "Bye")]
    answer = re.search(r"before  Hello → (.*)", out).group(1)
    assert answer == minifp4.generate(*minifp4.load(small), "Hello", max_new_tokens=3).replace("\n", "\\n")


def test_random_start_makes_a_tokenizer(tmp_path, tsv):
    """As the bundled model was made: a config.json and conversations are enough."""
    recipe = minifp4.BASE.parent / "recipe"
    settings = dict(
        model=str(recipe), init_random=True, train_data=str(tsv), steps=1, out=str(tmp_path / "out")
    )
    model, tokenizer = minifp4.load(train(**settings))
    assert tokenizer.path.parent.parent == tmp_path / "out" and model.config.num_hidden_layers == 4
    assert model.config.source["eos_token_id"] == tokenizer.end


@pytest.mark.parametrize(
    "words, message",
    [
        (["train.py", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["train.py", "--steps", "six"], "--steps: invalid int value: 'six'"),
        (["train.py", "--lr", "nan"], "--lr must be at least 0.0 and below 1000.0, got nan"),
        (["train.py", "--lr", "1e300"], "--lr must be at least 0.0 and below 1000.0, got 1e+300"),
        (["train.py", "--weight-decay", "inf"], "--weight-decay must be at least 0.0, and finite, got inf"),
        (["train.py", "--init-random", "--train-data", "bad.tsv"], "bad.tsv, line 2"),
        (["train.py", "--beta2", "1"], "--beta2 must be at least 0.0 and below 0.9999999, got 1.0"),
        (["train.py", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["train.py", "--optimizer-state", "fp4"], "--optimizer-state: invalid choice: 'fp4'"),
        (["train.py", "--optimizer-state", "fp16"], "--optimizer-state: invalid choice: 'fp16'"),
        (["train.py", "--model", "nowhere"], "nowhere does not exist"),
        (["train.py", "--train-data", "nothing.tsv"], "nothing.tsv"),
        (["train.py", "--train-data", "bad.tsv"], "bad.tsv, line 2: expected prompt<TAB>target"),
        (["train.py", "--train-data", "."], ". is a directory, not a file"),
        (["train.py", "--output-dat", "."], "--output-dat . is a directory, not a file"),
        (["train.py", "--output-dat", "no/a.dat"], "--output-dat no/a.dat: there is no directory no"),
        (["train.py", "--memory-report", "no/a.json"], "--memory-report no/a.json: there is no directory no"),
        (["train.py", "--seq-len", "6"], "--seq-len 6 leaves no room for an answer"),
        (["train.py", "--train-last-layers", "9"], "--train-last-layers must be from 0 (all) to 4, got 9"),
        (["train.py", "--untie"], "--untie"),
        (
            ["train.py", "--step-in-backward", "--grad-clip", "1"],
            "--grad-clip 1 needs the norm of all gradients",
        ),
        (["train.py", "--device", "cpu", "--cuda-graph"], "only CUDA has graphs"),
        (["train.py", "--keep-activations", "2"], "--keep-activations 2 is for --activation-checkpointing"),
        (["train.py", "--keep-activations", "auto"], "auto is for --activation-checkpointing: without"),
        (["train.py", "--keep-activations", "-1"], "--keep-activations: must be a number or auto, got -1"),
        (
            ["train.py", "--device", "cpu", "--activation-checkpointing", "--keep-activations", "auto"],
            "--keep-activations auto: the device is cpu, and only CUDA says what memory is left",
        ),
        (["train.py", "--finer-ends"], "--finer-ends is for --master-dtype nvfp4, not nvfp4x2"),
        (["train.py", "--batch-size", str(2**40)], "--batch-size must be at most 1,048,576, got 10995"),
        (["train.py", "--memory-limit-gb", "0"], "--memory-limit-gb must be at least 0.1, got 0.0"),
        (["train.py", "--device", "cuda:9"], "--device cuda:9"),
        (["train.py", "--device", "toaster"], "--device toaster"),
        (["export.py"], "train first (python train.py)"),
        (["export.py", "--checkpoint", "nowhere"], "nowhere does not exist"),
        (["export.py", "--format", "dat", "--quantize-head"], "--quantize-head is for --format hf"),
        (["train.py", "--beta2", ".99999999"], "--beta2 must be at least 0.0 and below 0.9999999"),
        (["export.py", "--format", "gguf"], "--format: invalid choice: 'gguf'"),
        (
            ["export.py", "--dequantize", "--quantize-head"],
            "--dequantize is for --format hf alone",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.tsv").write_text("a\tb\nno tab\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    program = importlib.import_module(words[0].removesuffix(".py"))
    with pytest.raises(SystemExit) as stop:
        cli.run(program.main, program.Settings, program.__doc__)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert {path.name for path in tmp_path.iterdir()} == {"bad.tsv"}  # nothing half-written


def test_a_mistake_from_the_shell(tmp_path):
    assert run("export.py", cwd=tmp_path)[::2] == (
        2, "error: out does not exist: train first (python train.py), or name one with --checkpoint DIR\n"
    )  # fmt: skip


def test_export_of_the_newest_or_of_a_named_checkpoint(small, tsv, tmp_path):
    settings = dict(model=small, train_data=str(tsv), out=str(tmp_path / "out"), test_max_tokens=1)
    first, second = train(**settings, steps=1), train(**settings, steps=2)
    logits = []
    for source in (tmp_path / "out", second, first):
        path = export(checkpoint=str(source), out=str(tmp_path / "exported"), format=["hf"])["hf"]
        assert path == tmp_path / "exported" / "hf"
        logits.append(minifp4.load(path)[0](torch.arange(5).view(1, -1)))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])


def test_the_readme_names_the_kinds_and_flags_that_there_are():
    """Its table of precisions is the code's, and every flag in it belongs to one of the programs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Precisions, and why")[1].split("##")[0]
    lines = [line for line in table.splitlines() if line.startswith("|") and "`--" in line]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    kinds = {flag.strip("`"): tuple(kinds.split(", ")) for _, flag, kinds, *_ in rows}
    assert kinds.pop("--quantize") == ("NVFP4", "or as stored")
    fields = {cli.spellings(field.name)[0]: field for field in dataclasses.fields(train_program.Settings)}
    assert kinds == {flag: tuple(fields[flag].metadata["choices"]) for flag in kinds} and len(kinds) == 4
    for flag, default in ((flag.strip("`"), default) for _, flag, _, default, _ in rows):
        assert fields[flag].default in (default, None, True)
    programs = train_program, export_program, minifp4.__main__
    known = {word for program in programs for field in dataclasses.fields(program.Settings)
             for word in cli.spellings(field.name)}  # fmt: skip
    named = set(re.findall(r"(?<![-|])--[a-z][a-z-]+", text))
    elsewhere = {"--help", "--local-dir", "--long", "--quick"}  # of hf, pytest, quality.py
    elsewhere |= {"--standalone", "--nproc-per-node"}  # of torchrun
    assert named - elsewhere <= known


def test_help_lists_every_setting_in_groups():
    status, out, _ = run("train.py", "--help", cwd=ROOT)
    assert status == 0 and out.startswith("usage: train.py")
    for word in (
        "which weights:",
        "memory and speed:",
        "--master-dtype",
        "--no-quantize",
        "--step-chunk-rows N",
    ):
        assert word in out
