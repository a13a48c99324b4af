"""Several processes train as one: the same bits as one that takes their parts in turn, one voice, one
checkpoint, and an end for all when one is gone."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, read_lines, small_directory, small_model
from ranks import CASES

from minifp4 import cli, parallel
from minifp4.files import atomic, safetensors

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def command(processes, *words):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else ()), *map(str, words)]


def run(processes, *words):
    how = {"cwd": ROOT, "env": ENVIRONMENT, "text": True}
    done = subprocess.run(command(processes, *words), capture_output=True, timeout=120, **how)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module", params=[2, 3])
def trained(request, tmp_path_factory):
    """(what one process has, with that many parts in each step; what each of several has), of `ranks.py`."""
    folder, count = tmp_path_factory.mktemp("ranks"), request.param
    only = ["--only", "torch.float32"] if count == 3 else []
    for processes in (1, count):
        status, _, said = run(processes, "tests/ranks.py", folder, "--parts", count, *only)
        assert status == 0, said
    read = [torch.load(folder / f"{count}-{rank}-{count}.pt") for rank in range(count)]
    return torch.load(folder / f"1-0-{count}.pt"), read


def test_they_are_one_with_as_many_parts(trained):
    """Every bit of weights and moments, tied or not, in all kinds of storage, in the plain step and in the
    backward pass; with a head in slices and rows that three cannot divide."""
    alone, several = trained
    cases = [str(case) for case in CASES if str(case) in several[0]]
    assert len(cases) == (24 if len(several) == 2 else 12)
    for case in cases:
        one = alone[case.replace("in backward", "plain")]
        for each in (found[case] for found in several):
            check_same(one, each, case)


def check_same(one, each, case):
    """What one process has, and one of several."""
    assert each["weights"].keys() == one["weights"].keys()
    for name, tensor in each["weights"].items():
        assert torch.equal(one["weights"][name], tensor), (case, name)
    whole = {name: (data, rows) for name, _, rows, data in one["moments"]}
    for name, first, rows, data in each["moments"]:
        all_of_it = whole[name][0].view(rows, -1)
        mine = data.view(-1, all_of_it.shape[1])
        assert torch.equal(all_of_it[first : first + len(mine)], mine), (case, name)
    assert each["losses"] == pytest.approx(one["losses"], rel=1e-6), case
    assert each["moved"] == pytest.approx(one["moved"], abs=1e-6), case
    assert each["floored"] == one["floored"], case


def test_moments_are_divided(trained):
    alone, several = trained
    case, count = str(CASES[0]), len(several)
    sizes = [found[case]["bytes"] for found in several]
    if count == 2:  # all matrices can be divided; norms are few
        assert max(sizes) < 0.51 * alone[case]["bytes"]
    else:
        assert max(sizes) < 0.9 * alone[case]["bytes"]


@pytest.mark.parametrize("how", ["plain", "in backward"])
def test_a_loss_that_is_no_number_in_one_stops_all(trained, how):
    """The step writes nothing anywhere, and all count it. What is left is that of a step less."""
    alone, several = trained
    before = alone[f"spoiled, {how}"]["weights"]
    for found in (found[f"spoiled, {how}"] for found in several):
        assert found["skipped"] == 1
        assert all(torch.equal(before[name], tensor) for name, tensor in found["weights"].items())


# train.py


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(directory, arguments of a run)"""
    folder = tmp_path_factory.mktemp("train")
    model = small_directory(folder / "model", small_model())
    data = folder / "data.tsv"
    data.write_text("".join(f"Hello {'very ' * (n % 5)}{n}\tHi {n + 1}!\n" for n in range(24)))
    words = ["train.py", "--model", model, "--train-data", data, "--lr", "1e-2", "--train-lm-head",
             "--train-embed", "--device", "cpu", "--test-max-tokens", "1", "--grad-clip", "0", "--steps", "4",
             "--keep", "9"]  # fmt: skip
    return folder, words


def checkpoint_files(path):
    return {name: (path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def test_a_run_goes_on_with_any_number(start):
    """Two processes, then one, then three: the bits of one that takes a step's two parts in turn, as long as
    these are added up in the same order. Three divide each part's conversations."""
    folder, words = start
    words = [*words, "--batch-size", "6", "--grad-accum", "2", "--eval-share", ".2", "--save-every", "1"]
    status, _, errors = run(1, *words, "--steps", 4, "--out", folder / "one")
    assert status == 0, errors
    for processes, steps in ((2, 2), (1, 3), (3, 4)):
        how = words if processes == 2 else ["train.py", "--resume", "--device", "cpu"]
        status, said, errors = run(processes, *how, "--steps", steps, "--out", folder / "many")
        assert status == 0, errors
        assert said.count("saved   ") == said.count("minifp4 0") == 1, said  # one of them speaks
        assert f", {processes} processes," in said or processes == 1
    for step in (1, 2, 3):
        one, many = (checkpoint_files(folder / out / f"step-{step:06d}") for out in ("one", "many"))
        assert one == many, step
    one, many = (read_lines(folder / out / "metrics.jsonl") for out in ("one", "many"))
    assert [line["step"] for line in one] == [line["step"] for line in many]
    for a, b in zip(one, many):
        name = "loss" if "loss" in a else "held_out_loss"
        assert a[name] == pytest.approx(b[name], rel=1e-6 if a["step"] < 4 or name == "loss" else 0.02)
    assert names(folder / "one") == names(folder / "many")


def test_an_abort_while_python_ends_is_no_failure(start, monkeypatch):
    """gloo's threads now and then abort a process that has done all its work; here each does at its end."""
    folder, words = start
    (folder / "sitecustomize.py").write_text(
        "import atexit, os\nif 'RANK' in os.environ:\n    atexit.register(os.abort)\n"
    )
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(folder))
    status, said, errors = run(2, *words, "--batch-size", "4", "--out", folder / "whole")
    assert status == 0, errors
    assert said.rstrip().splitlines()[-1].startswith("next ")


def names(directory):
    return {entry.name for entry in directory.iterdir()}


def started(words, out):
    """A run of two processes that would take long, once it has saved a checkpoint."""
    words = [*words, "--batch-size", "4", "--steps", "5000", "--save-every", "1", "--keep", "2", "--out", out]
    how = {"cwd": ROOT, "env": ENVIRONMENT, "text": True}
    process = subprocess.Popen(command(2, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
    until = time.monotonic() + 60
    while not list(out.glob("step-*/train.json")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.1)
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_when_one_is_killed_the_others_end(start):
    """Within a minute, with one line that says why; the last checkpoint is whole, nothing else is left."""
    folder, words = start
    process = started(words, folder / "killed")
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and errors.count("error: ") == 1, errors
    assert "another process has ended" in errors and "--resume goes on from what is saved" in errors
    *_, last = sorted(folder.glob("killed/step-*"))
    file = safetensors.SafeFile(last / "optimizer.safetensors")
    assert all(len(file[name]) for name in file.entries)
    assert not [name for name in names(folder / "killed") if atomic.OURS.fullmatch(name)]


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process itself")
def test_one_that_has_lost_another_says_so_though_torchrun_ends_it(monkeypatch):
    monkeypatch.setattr(parallel, "ranks", lambda: 2)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError), cli.stopping():
            raise RuntimeError("connection closed by peer")
        os.kill(os.getpid(), signal.SIGTERM)  # would end the tests
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_ends_all_with_a_checkpoint(start):
    """torchrun hands it on; all stop after the same step."""
    folder, words = start
    process = started(words, folder / "stopped")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode and said.count("note    stopping after this step") == 1, said
    assert said.rstrip().endswith("--resume goes on from there")


# What is wrong is said once, with the process that found it.


def one_error(errors):
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    return line


def test_a_batch_that_cannot_be_divided(start):
    folder, words = start
    status, _, errors = run(2, *words, "--batch-size", "3", "--out", folder / "odd")
    assert status and "--grad-accum 1 x --batch-size 3 cannot be divided among 2" in one_error(errors)
    assert not (folder / "odd").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_processes_that_see_different_data(start):
    folder, words = start
    (folder / "1.tsv").write_text("Hello\tHi!\n" * 24)
    (folder / "0.tsv").write_bytes((folder / "data.tsv").read_bytes())
    words[words.index("--train-data") + 1] = f"{folder}/$RANK.tsv"
    shell = f"{sys.executable} {' '.join(map(str, words))} --out {folder / 'other'}"
    status, _, errors = run(2, "--no-python", "sh", "-c", shell)
    words[words.index(f"{folder}/$RANK.tsv")] = folder / "data.tsv"
    assert status and "process 1 has another data than process 0" in one_error(errors)


def test_fewer_gpus_than_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="4 processes here, and there are 2 GPUs; give --nproc-per-node 2"):
        parallel.own_device(None)
    with pytest.raises(ValueError, match="--device cuda:1: 4 processes need a device each"):
        parallel.own_device("cuda:1")


def test_an_address_where_nobody_answers(monkeypatch):
    taken = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost"}
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        for name, value in {**taken, "MASTER_PORT": other.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match="the 2 processes cannot meet at localhost:.*--standalone"):
            parallel.start("cpu")
