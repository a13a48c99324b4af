"""Stop, go on, and get the same bits; be killed at any moment, and lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_lines, small_directory, small_model, train

import minifp4
from minifp4 import packed
from minifp4.files import checkpoint, safetensors
from minifp4.files.atomic import bits, only_user


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small_directory(tmp_path_factory.mktemp("small") / "model", small_model()))


@pytest.fixture
def settings(model, tsv, tmp_path):
    return dict(
        model=model,
        train_data=str(tsv),
        batch_size=2,
        lr=1e-2,
        test_max_tokens=1,
        train_lm_head=True,
        train_embed=True,
        out=str(tmp_path / "out"),
        device="cpu",
    )


def all_tensors(directory):
    found = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        file = safetensors.SafeFile(directory / name)
        found |= {f"{name}: {key}": bits(file[key]) for key in file.entries}
    return found


def test_a_checkpoint_of_format_1_reads_as_the_same_numbers(settings, tmp_path):
    """Then sqrt(v) had the upper 8 of today's 16 codes, as 0 to 7; and nvfp4x2 read the middle between two
    codes as the higher one in odd columns too, so `more` was 8 more than the place, not 7."""
    how = {"master_dtype": "nvfp4x2", "optimizer_state": "nvfp4", "steps": 1}
    path = train(**settings | how)
    model, _ = minifp4.load(path)
    file = safetensors.SafeFile(path / "model.safetensors")
    codes = {name: file[name].clone() for name in file.entries}
    for name in codes:
        if not name.endswith("_more"):
            continue
        qdata, more = codes[name.removesuffix("_scale_more")], codes[name]
        place = (qdata >> 4 & 7).int() * 16 + (more >> 4).int() + 1
        qdata.copy_(qdata & 0x8F | (place // 16 << 4).byte())
        more.copy_(more & 0x0F | (place % 16 << 4).byte())
    moments = safetensors.SafeFile(path / "optimizer.safetensors")
    moments = {name: moments[name].clone() for name in moments.entries}
    roots = {name: tensor for name, tensor in moments.items() if name.endswith("sqrt_exp_avg_sq.qdata")}
    for tensor in roots.values():
        if tensor.dtype == torch.uint8:
            tensor.bitwise_and_(0x77)
    record = checkpoint.read_json(path / "train.json")
    assert record.pop("format") == 2
    (path / "train.json").write_text(json.dumps(record))
    safetensors.write(path / "model.safetensors", codes)
    safetensors.write(path / "optimizer.safetensors", moments)
    again, _ = minifp4.load(path)
    for old, new in zip(model.parameters(), again.parameters()):
        assert torch.equal(packed.stored_values(old), packed.stored_values(new))
    optimizer = minifp4.AdamW(
        [(name, p.requires_grad_()) for name, p in again.named_parameters()], state="nvfp4"
    )
    checkpoint.read_moments(path, optimizer)
    for name, tensor in roots.items():
        if tensor.dtype == torch.uint8:
            assert torch.equal(optimizer.tensors()[name], tensor | 0x88)
    (path / "train.json").write_text(json.dumps(record | {"format": 3}))
    with pytest.raises(ValueError, match="train.json: format 3; this version reads 1 to 2"):
        minifp4.load(path)


@pytest.mark.parametrize(
    "precisions, how",
    [
        ("fp32 fp32", {}),
        ("bf16 bf16", {"grad_accum": 2}),
        ("fp16 int8", {}),
        ("nvfp4x2 nvfp4", {"warmup": 4, "schedule": "cosine", "seed": 3}),
        ("nvfp4 nvfp4", {"grad_accum": 2}),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(settings, tmp_path, precisions, how):
    """Weights, moments, rounding and data order: every bit, even with another chunk size after the stop."""
    how = how | dict(zip(("master_dtype", "optimizer_state"), precisions.split()))
    whole = train(**settings | how | {"out": str(tmp_path / "whole")}, steps=5)
    train(**settings | how, steps=5, save_every=2, keep=9)
    middle = tmp_path / "out" / "step-000002"
    resumed = train(resume=str(middle), out=str(tmp_path / "again"), step_chunk_rows=3)
    expected, found = all_tensors(whole), all_tensors(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in read_lines(tmp_path / "again" / "metrics.jsonl")] == [3, 4, 5]


def test_resume_goes_on_from_the_newest_and_keeps_the_metrics(settings, tmp_path):
    train(**settings, steps=2)
    path = train(resume="", out=settings["out"], steps=4)
    assert path.name == "step-000004"
    assert [line["step"] for line in read_lines(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_last_checkpoints_are_kept(settings, tmp_path):
    train(**settings, steps=5, save_every=1, keep=2)
    assert sorted(path.name for path in checkpoint.checkpoints(tmp_path / "out")) == [
        "step-000004",
        "step-000005",
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 0.5}, "--lr 0.5: .* has 0.01; that cannot change"),
        ({"optimizer_state": "int8"}, "--optimizer-state int8: .* has nvfp4"),
        ({"model": "another"}, "--model another"),
        ({"batch_size": 3}, "--batch-size 3"),
        ({"train_last_layers": 1}, "--train-last-layers 1"),
        ({"steps": 2}, "is at step 2 already; give a larger --steps"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_change_that_breaks_a_resumption_is_refused_by_name(settings, change, message):
    train(**settings, steps=2)
    with pytest.raises(ValueError, match=message):
        train(**{"resume": "", "out": settings["out"], "steps": 4} | change)


def test_resuming_with_other_data_or_moments_is_refused(settings, tsv):
    path = train(**settings, steps=2)
    again = {"resume": "", "out": settings["out"], "steps": 4}
    text = tsv.read_text()
    tsv.write_text(text + "one\tmore\n")
    with pytest.raises(ValueError, match="--train-data .* has changed"):
        train(**again)
    tsv.write_text(text)
    moments = safetensors.SafeFile(path / "optimizer.safetensors")
    tensors = {name: moments[name].clone() for name in moments.entries}
    tensors.popitem()
    safetensors.write(path / "optimizer.safetensors", tensors)
    with pytest.raises(ValueError, match="other moments than this run's: 1"):
        train(**again)


def test_two_runs_cannot_write_to_one_directory(settings, tmp_path):
    with only_user(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing to .*--out"):
        train(**settings, steps=1)
    train(**settings, steps=1)


def newest_step(out):
    """The step of the newest checkpoint, while another process writes new ones and removes old ones."""
    while True:
        try:
            return checkpoint.read_json(checkpoint.model_directory(out) / "train.json")["step"]
        except FileNotFoundError:
            continue


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import train
settings = {settings!r}
for round in range({kills}):
    child = os.fork()
    if child == 0:
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        resume = {{"resume": "", "out": settings["out"], "steps": 10**6, "save_every": 1}}
        train.main(train.Settings(**resume))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="starts its runs with fork, which this system does not have"
)
def test_kill_minus_nine_never_loses_a_checkpoint(settings, tmp_path, long):
    """Five runs (or twenty), each killed at another moment, most of them while they write: the newest always
    loads, and goes on."""
    out, kills = tmp_path / "out", 20 if long else 5
    train(**settings, steps=1)
    code = KILLED.format(root=str(ROOT), settings=settings, kills=kills)
    steps = [1]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as server:
        try:
            for moment in range(kills):
                child, deadline = int(server.stdout.readline()), time.monotonic() + 30
                while newest_step(out) == steps[-1] and time.monotonic() < deadline:  # until it has gone on
                    time.sleep(0.01)
                time.sleep(0.14 * moment / kills)
                os.kill(child, signal.SIGKILL)
                assert int(server.stdout.readline()) == signal.SIGKILL
                steps.append(newest_step(out))
                assert all(tensor.numel() for tensor in all_tensors(checkpoint.model_directory(out)).values())
        finally:
            server.kill()  # after a failure too, or leaving the `with` would wait for it
    assert all(before < after for before, after in zip(steps, steps[1:]))  # each went on from what was left
    path = train(resume="", out=str(out), steps=steps[-1] + 1)
    left = {entry.name for entry in out.iterdir() if not entry.name.startswith("step-")}
    assert left == {".lock", "metrics.jsonl"} and path.is_dir()


FULL = """
import resource, sys
sys.path.insert(0, {root!r})
import train
from minifp4 import cli
sys.argv = ["train.py", "--resume", "--out", {out!r}, "--steps", "3"]
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
cli.run(train.main, train.Settings, "")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(settings, tmp_path):
    """A limit on the size of files stands for the disk: 20 kB, in the middle of the weights."""
    path = train(**settings, steps=2)
    before = all_tensors(path)
    code = FULL.format(root=str(ROOT), out=settings["out"], limit=20_000)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot write" in done.stderr and "what was there before is unchanged" in done.stderr
    assert checkpoint.model_directory(settings["out"]) == path
    assert all(torch.equal(before[name], tensor) for name, tensor in all_tensors(path).items())
    assert not list(path.parent.glob(".*.tmp"))


def test_a_directory_that_cannot_be_written_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(**settings | {"out": str(tmp_path / "file" / "out")}, steps=1)
