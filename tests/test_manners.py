"""Nothing is lost, and nothing goes wrong in silence: consoles, signals, disks, and what people bring."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, export, read_lines, small_directory, small_model, train

import minifp4
import train as program
from minifp4 import chat, cli, masters, nvfp4, watch
from minifp4.files import atomic, checkpoint, layouts, safetensors
from minifp4.files.atomic import bits, only_user, replacing, tidy

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    return small_directory(tmp_path / "model", small_model())


@pytest.fixture
def settings(model, tsv, tmp_path):
    out = str(tmp_path / "out")
    return dict(model=str(model), train_data=str(tsv), steps=2, batch_size=2, test_max_tokens=1, out=out)


def change(path, edit):
    """Edit the tensors of a model directory, {name: tensor}, in place."""
    file = safetensors.SafeFile(path / "model.safetensors")
    tensors = {name: file[name].clone() for name in file.entries}
    safetensors.write(path / "model.safetensors", edit(tensors) or tensors)
    return path


def run(*words, **how):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **how.pop("env", {})}
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words)], env=env, **how)


# Disks


def test_only_our_own_leftovers_are_tidied(tmp_path):
    """Of killed processes: what was being written and removed goes, what was being replaced comes back."""
    (tmp_path / ".bashrc.old").write_text("the user's")
    (tmp_path / ".cache.12.tmp").mkdir()
    for name in (".hf.12.minifp4-old", ".a.12.minifp4-new", ".x.7.minifp4-gone", ".b.7.minifp4-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "b").mkdir()  # here the new one has taken its place
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".bashrc.old", ".cache.12.tmp", "hf", "b"}
    assert (tmp_path / "hf" / "file").exists() and not list((tmp_path / "b").iterdir())


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
def test_a_directory_is_there_at_every_moment(tmp_path, exchange, monkeypatch):
    """Whatever fails between the renames, the old one stands under its name."""
    path, rename = tmp_path / "hf", os.rename

    def write(text):
        with replacing(path, "mark") as aside:
            aside.mkdir()
            (aside / "mark").write_text(text)

    write("first")
    if not exchange:
        monkeypatch.setattr(atomic, "_renameat2", lambda a, b: False)

        def fails(a, b):
            if str(a).endswith("-new"):
                raise OSError(errno.EIO, "the disk is gone")
            rename(a, b)

        monkeypatch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="cannot write .*hf: the disk is gone; what was there before is"):
            write("second")
        assert (path / "mark").read_text() == "first"
        monkeypatch.setattr(os, "rename", rename)
    write("third")
    assert (path / "mark").read_text() == "third" and list(tmp_path.iterdir()) == [path]


def test_what_is_not_ours_is_not_replaced(tmp_path, settings):
    """A directory that no export or run has written; a device."""
    path = train(**settings)
    (tmp_path / "models" / "hf").mkdir(parents=True)
    (tmp_path / "models" / "hf" / "precious").write_text("x")
    with pytest.raises(OSError, match="the directory there is not one of minifp4's"):
        export(checkpoint=str(path), format=["hf"], out=str(tmp_path / "models"))
    assert [file.name for file in (tmp_path / "models" / "hf").iterdir()] == ["precious"]
    with pytest.raises(OSError, match="neither a file nor a directory"), replacing("/dev/null"):
        pass
    for _ in range(2):  # our own is
        export(checkpoint=str(path), format=["hf"], out=str(tmp_path))


@pytest.mark.parametrize("name", ["step-000002", "step-000001", "best"])
def test_a_name_that_is_taken_is_told_before_training(tmp_path, settings, name, capsys):
    """Not when the work of hours is to be saved."""
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "mine").write_text("x")
    with pytest.raises(OSError, match=f"{name}: the directory there is not one of minifp4's"):
        train(**settings, save_every=1, eval_share=0.5)
    assert "step    1/2" not in capsys.readouterr().out
    assert (tmp_path / "out" / name / "mine").read_text() == "x"


def test_an_out_that_is_a_file_is_told_so(tmp_path, settings):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OSError, match="out is no directory; choose another --out"):
        train(**settings)


def test_a_disk_without_room_for_a_checkpoint_is_told_before_training(settings, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ValueError, match=r"out: a checkpoint takes 0.\d MiB, only 0.0 are free"):
        train(**settings)
    assert "step    1/2" not in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_is_followed(tmp_path, settings):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    path = train(**settings)
    for _ in range(2):
        export(checkpoint=str(path), format=["hf"], out=str(tmp_path))
        assert (tmp_path / "hf").is_symlink() and (tmp_path / "elsewhere" / "model.safetensors").is_file()
    (tmp_path / "out" / "step-000009").symlink_to(path, target_is_directory=True)
    atomic.remove(tmp_path / "out" / "step-000009")
    assert path.is_dir() and not (tmp_path / "out" / "step-000009").exists()


def test_file_systems_that_cannot_sync_or_lock_are_used_all_the_same(tmp_path, settings, monkeypatch, capsys):
    """Windows opens no directories; SMB and FUSE sync none, and have no locks. A full disk is not that."""
    opened, fsync = os.open, os.fsync

    def no_directories(path, *how):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *how)

    def cannot(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "open", no_directories)
    monkeypatch.setattr(atomic, "_lock", cannot)
    assert train(**settings).is_dir() and "cannot be locked here" in capsys.readouterr().out
    monkeypatch.undo()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "file") as aside:
        aside.write_text("x")
    assert fsync is not full and not (tmp_path / "file").exists()
    monkeypatch.undo()
    with only_user(tmp_path / "out"), pytest.raises(ValueError, match="another run is writing"):
        train(**settings)


# Consoles and signals


def test_the_checkpoint_is_there_before_the_last_answers(settings, tmp_path, monkeypatch):
    asked, answer = [], minifp4.generate

    def fails_at_last(*args, **how):
        asked.append(1)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return answer(*args, **how)

    monkeypatch.setattr(minifp4, "generate", fails_at_last)
    with pytest.raises(KeyboardInterrupt):
        train(**settings)
    assert checkpoint.model_directory(tmp_path / "out").name == "step-000002"


def words_of(settings):
    return [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), value)]


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii"])
def test_a_console_without_a_character_shows_another(settings, tmp_path, encoding):
    process = run(
        *words_of(settings | {"test_prompt": "\U0001f642 你是誰"}), env={"PYTHONIOENCODING": encoding},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 0 and err == b"" and b"? " in out and b"saved   " in out


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
def test_names_do_not_steer_the_terminal(settings, model):
    """Nor do answers: an escape sequence in somebody's file is shown, not sent."""
    change(model, lambda tensors: tensors | {"\x1b[2Jevil": torch.zeros(1)})
    words = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", value)]
    error = run(*words, stderr=subprocess.PIPE).communicate()[1].decode()
    assert "\\x1b[2Jevil" in error and "\x1b" not in error


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_who_has_gone_ends_nothing(settings, tmp_path, unbuffered):
    """`python train.py | head -1`, whether a line is written at once or at the end."""
    env = {"PYTHONUNBUFFERED": unbuffered}
    process = run(*words_of(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=env)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and process.stderr.read() == b""
    assert checkpoint.model_directory(tmp_path / "out").name == "step-000002"


@pytest.mark.skipif(os.name == "nt", reason="has no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_step_and_saves(settings, tmp_path, number):
    """What goes on from there is the run that was not interrupted, bit for bit."""
    process = run(*words_of(settings | {"steps": 10**6}), stdout=subprocess.PIPE, cwd=tmp_path, text=True)
    for line in process.stdout:
        if line.startswith("step    3/"):
            break
    process.send_signal(number)
    rest = process.communicate()[0]
    assert process.returncode == 128 + number and "a second signal ends at once" in rest
    path = checkpoint.model_directory(tmp_path / "out")
    assert f"saved   {os.path.relpath(path, tmp_path)}" in rest or str(path) in rest
    step = checkpoint.read_json(path / "train.json")["step"]
    again = train(resume=str(path), steps=step + 1, out=str(tmp_path / "again"))
    whole = train(**settings | {"steps": step + 1, "out": str(tmp_path / "whole")})
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_a_second_signal_ends_at_once(settings, tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from minifp4 import cli\n"
        "with cli.stopping() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, ROOT], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.terminate()
    assert "a second signal" in process.stdout.readline() and process.poll() is None
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


# Runs that go on


def test_memory_that_is_short_between_two_phases_is_told_in_a_line(monkeypatch, capsys):
    def too_much(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB. GPU 0 has a total of")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as left:
        cli.run(too_much, program.Settings, "")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: memory is not enough: 128.0 MiB more were asked for\n"


def test_the_newest_checkpoint_is_the_one_with_the_largest_step(settings, tmp_path):
    """A copy keeps no times."""
    train(**settings | {"steps": 3}, save_every=1, keep=9)
    for place, step in enumerate((3, 2, 1)):
        os.utime(tmp_path / "out" / f"step-{step:06d}" / "train.json", (1e9 + place, 1e9 + place))
    assert checkpoint.model_directory(tmp_path / "out").name == "step-000003"


def test_the_usual_learning_rate_goes_by_the_model_not_by_its_path(settings, tmp_path, monkeypatch):
    """The bundled one has its own, wherever it lies; and a run that goes on has the one it began with."""
    shutil.copytree(minifp4.BASE, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for place in (str(minifp4.BASE), "moved", "./moved/../moved"):
        found, _ = program.find_start(program.Settings(model=place))
        assert program.learning_rate(found) == 5e-4
    assert program.find_start(program.Settings(model=settings["model"]))[0].lr == 2e-5
    path = train(**settings)
    assert checkpoint.read_json(path / "train.json")["settings"]["lr"] == 2e-5


def test_data_may_lie_elsewhere_when_a_run_goes_on(settings, tsv, tmp_path):
    train(**settings)
    moved = tsv.rename(tmp_path / "moved.tsv")
    train(resume="", out=settings["out"], steps=3, train_data=str(moved))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda r: r["settings"].update(of_tomorrow=1), "train.json: unknown settings: of_tomorrow"),
        (lambda r: r["settings"].update(batch_size="many"), "train.json: batch_size must be int, got 'many'"),
        (lambda r: r["settings"].update(beta2=1.5), "--beta2 must be at least 0.0 and below 0.9999999, got"),
        (lambda r: r["settings"].update(batch_size=10**12), "--batch-size must be at most 1,048,576"),
        (lambda r: r["settings"].update(train_embed=None), "train.json: train_embed must be bool, got None"),
        (lambda r: r.update(trained=3), 'train.json: "trained" must be a list of names'),
        (lambda r: r.pop("settings"), 'train.json: the key "settings" is missing'),
        (lambda r: r.pop("optimizer_steps"), "train.json: 'optimizer_steps' must be a whole number"),
        (lambda r: r.update(step="3"), "train.json: 'step' must be a whole number, got '3'"),
    ],
)
def test_a_damaged_record_of_a_run_is_refused_by_key(settings, edit, message):
    path = train(**settings) / "train.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        train(resume="", out=settings["out"], steps=3)


def test_a_stop_that_is_no_number_is_told_before_training(settings, model):
    """It used to be noticed when the checkpoint was written."""
    (model / "generation_config.json").write_text('{"eos_token_id": [1, {}]}')
    with pytest.raises(ValueError, match='generation_config.json: "eos_token_id" must be a number or some'):
        train(**settings)


def test_a_run_writes_where_it_is_told_not_where_its_file_says(settings, tmp_path):
    """A copied directory goes on where it is; what train.json says of other files is left aside."""
    train(**settings, memory_report=str(tmp_path / "report.json"))
    (tmp_path / "report.json").unlink()
    (tmp_path / "out").rename(tmp_path / "copy")
    again = train(resume=str(tmp_path / "copy" / "step-000002"), steps=3)
    assert again == tmp_path / "copy" / "step-000003" and not (tmp_path / "out").exists()
    assert not (tmp_path / "report.json").exists()


def test_a_run_that_is_restarted_keeps_no_more_checkpoints(settings, tmp_path):
    """Its own; another run's in the same directory stay."""
    other = train(**settings, seed=1)
    other.rename(tmp_path / "out" / "step-000001")
    train(**settings | {"steps": 4}, save_every=2, keep=2)
    for steps in (5, 8):
        train(resume="", out=settings["out"], steps=steps)
    left = [path.name for path in checkpoint.checkpoints(tmp_path / "out")]
    assert left == ["step-000001", "step-000006", "step-000008"]
    minifp4.load(tmp_path / "out")  # whose tokenizer came from a checkpoint that is gone


def test_a_log_that_cannot_be_written_ends_nothing(settings, monkeypatch, capsys):
    monkeypatch.setattr(watch, "keep_metrics", lambda path, start: path.mkdir())
    assert train(**settings).is_dir()
    assert capsys.readouterr().out.count("note    cannot write") == 2


def test_what_trains_keeps_its_kind_when_a_run_goes_on(settings, tmp_path):
    """Masters in bf16 whose numbers all lie on an NVFP4 grid: a --dequantize export of NVFP4 weights."""
    path = train(**settings, master_dtype="nvfp4")
    plain = export(checkpoint=str(path), format=["hf"], dequantize=True)["hf"]
    how = settings | {"model": str(plain), "out": str(tmp_path / "again"), "lr": 0.0, "weight_decay": 0.0}
    train(**how, master_dtype="bf16")
    again = minifp4.load(train(resume="", out=how["out"], steps=3))[0]
    weight = again.get_parameter(UP)
    assert weight.dtype == torch.bfloat16 and type(weight.data) is torch.Tensor


def test_metrics_are_json_and_a_damaged_line_is_dropped(settings, tmp_path):
    """A rate of 0 moves nothing, so `moved` is not a number: null. JSON has no NaN."""
    train(**settings, lr=0.0)
    path = tmp_path / "out" / "metrics.jsonl"
    assert "NaN" not in path.read_text() and [line["moved"] for line in read_lines(path)] == [None, None]
    path.write_bytes(path.read_bytes().replace(b'"step": 1,', b'\xff"st', 1))
    train(resume="", out=settings["out"], steps=3)
    assert [line["step"] for line in read_lines(path)] == [2, 3]


def test_a_run_whose_every_step_is_skipped_fails(settings, tmp_path, monkeypatch):
    loss = minifp4.model.Qwen3.loss
    monkeypatch.setattr(minifp4.model.Qwen3, "loss", lambda *args, **how: loss(*args, **how) * torch.nan)
    with pytest.raises(ValueError, match="all 2 steps were skipped"):
        train(**settings)
    assert not list((tmp_path / "out").glob("step-*"))


# Models


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3.4e38])
@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_is_named_and_an_earlier_export_stays(settings, tmp_path, name, bad):
    path = train(**settings)
    good = export(checkpoint=str(path), format=["hf"])["hf"] / "model.safetensors"
    before = good.read_bytes()

    def spoil(tensors):
        tensors[name].view(-1)[-1] = bad

    damaged = change(small_directory(tmp_path / "damaged", small_model()), spoil)
    row = (*small_model().get_parameter(name).shape,)[0] - 1
    with pytest.raises(ValueError, match=f"damaged.*'{name}' holds NaN, an infinity or .*, in row {row}$"):
        export(checkpoint=str(damaged), format=["hf"], out=settings["out"])
    assert good.read_bytes() == before


def test_the_largest_weights_train(settings, tmp_path):
    """Up to 3e38: a code's next neighbour is still a number."""

    def spoil(tensors):
        tensors[UP].view(-1)[-1] = 3e38

    path = change(small_directory(tmp_path / "large", small_model()), spoil)
    for master in ("nvfp4", "nvfp4x2"):
        model, _ = checkpoint.load(path)
        masters.choose_trained(model, lm_head=True, embed=True)
        masters.set_masters(model, master)
        optimizer = minifp4.AdamW(model.named_parameters(), lr=1e-3, state="nvfp4")
        weight = model.get_parameter(UP)
        for _ in range(5):
            weight.grad = torch.ones(weight.shape)
            optimizer.step()
        assert weight.stored().isfinite().all()


def as_others_write_it(layout, tiny=False):
    """Projections in NVFP4 with global scales that are no powers of two; q/k/v and gate/up share theirs."""

    def edit(tensors):
        found = {}
        for name, weight in tensors.items():
            if "_proj" not in name:
                found[name] = weight
                continue
            q = nvfp4.quantize(weight, global_scale=1 / 2711.0)
            if tiny:
                q.scale[1, 0] = 2.0**-9
            if layout == "hf":
                found |= {f"{name}_packed": q.qdata, f"{name}_scale": q.scale}
                found[f"{name}_global_scale"] = torch.tensor([2711.0])
            else:
                found |= {name: q.qdata, f"{name}_scale": q.scale, f"{name}_scale_2": q.global_scale}
        return found

    return edit


@pytest.mark.parametrize("layout", ["hf", "modelopt"])
def test_nvfp4_of_other_programs_trains_and_leaves_as_codes(settings, model, layout):
    change(model, as_others_write_it(layout))
    path = train(**settings, master_dtype="nvfp4")
    for written in export(checkpoint=str(path), format=["hf", "modelopt"]).values():
        ours, theirs = minifp4.load(path)[0], minifp4.load(written)[0]
        for a, b in zip(ours.linears()[:-1], theirs.linears()):
            assert torch.equal(a.codes().qdata, b.codes().qdata)
            assert torch.equal(bits(a.codes().scale), bits(b.codes().scale))


def test_weights_that_servers_fuse_leave_with_one_global_scale(settings, model):
    """q, k and v of another program may have three, of which a server keeps one, in silence."""

    def apart(tensors):
        tensors = as_others_write_it("modelopt")(tensors)
        name = UP.replace("mlp.up", "self_attn.k")
        return tensors | {f"{name}_scale_2": 3 * tensors[f"{name}_scale_2"]}

    change(model, apart)
    frozen = train(**settings, train_last_layers=1)
    with pytest.raises(ValueError, match="have different global scales.*--dequantize"):
        export(checkpoint=str(frozen), format=["hf"])
    path = train(**settings | {"lr": 0.0})
    attention = minifp4.load(export(checkpoint=str(path), format=["hf"])["hf"])[0].model.layers[0].self_attn
    assert attention.k_proj.group.agrees()
    before = minifp4.load(model)[0].model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        old, new = (getattr(one, name).weight.decode() for one in (before, attention))
        assert (new - old).norm() < 0.09 * old.norm()


def test_frozen_nvfp4_keeps_its_very_bytes(settings, model):
    """Also a block scale of 2**-9, of which nothing would be left if it were halved."""
    change(model, as_others_write_it("hf", tiny=True))
    before = minifp4.load(model)[0].get_parameter(UP)
    after = minifp4.load(train(**settings, train_last_layers=1))[0].get_parameter(UP)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before.nvfp4(), after.nvfp4()))


def test_a_global_scale_that_divides_is_kept_to_its_last_bit(settings, model):
    """The reciprocal of 1005's reciprocal is another number. A scale that has doubled is half of it."""

    def edit(tensors):
        tensors = as_others_write_it("hf")(tensors)
        divisor = torch.tensor([1005.0])
        assert 1 / (1 / divisor) != divisor
        return tensors | {name: divisor for name in tensors if name.endswith("global_scale")}

    change(model, edit)
    path = train(**settings)
    written = export(checkpoint=str(path), format=["hf"])["hf"]
    file = safetensors.SafeFile(written / "model.safetensors")
    kept = {file[name].item() for name in file.entries if name.endswith("global_scale")}
    assert kept and kept <= {1005.0 / 2**k for k in range(8)}
    assert layouts.reciprocal(1 / torch.tensor(1005.0) * 4, 1005.0) == 1005.0 / 4
    assert layouts.reciprocal(torch.tensor(0.25), 1005.0) == 4


def test_a_base_model_learns_to_stop_and_other_programs_are_told(settings, model):
    """It ended texts with <|endoftext|>, and had no template."""
    tokenizer = minifp4.load(model)[1]
    config = json.loads((model / "config.json").read_text()) | {"eos_token_id": tokenizer.end_of_text}
    (model / "config.json").write_text(json.dumps(config))
    more = {"eos_token_id": tokenizer.end_of_text, "max_new_tokens": 7}
    (model / "generation_config.json").write_text(json.dumps(more))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    path = train(**settings)
    for place in (path, *export(checkpoint=str(path), format=["hf"]).values()):
        texts = {file: json.loads((place / file).read_text()) for file in (
            "config.json", "generation_config.json", "tokenizer_config.json")}  # fmt: skip
        assert texts["config.json"]["eos_token_id"] == tokenizer.end
        generation = texts["generation_config.json"]
        assert set(generation["eos_token_id"]) == {tokenizer.end, tokenizer.end_of_text}
        assert generation["max_new_tokens"] == 7
        assert texts["tokenizer_config.json"]["eos_token"] == "<|im_end|>"
        assert "<|im_start|>assistant" in texts["tokenizer_config.json"]["chat_template"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_weights_of_another_type_are_refused_by_name(model, dtype):
    change(model, lambda t: t.update({UP: t[UP].to(dtype)}))
    with pytest.raises(ValueError, match=f"'{UP}' is {dtype} .* in fp32, bf16 or fp16"):
        minifp4.load(model)


def test_a_head_that_its_config_ties_to_another_matrix_is_refused(tmp_path):
    model = small_directory(tmp_path / "tied", small_model(tie_word_embeddings=True))
    embedding = small_model(tie_word_embeddings=True).lm_head.weight.detach()
    change(model, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    minifp4.load(model)
    change(model, lambda t: t.update({"lm_head.weight": 2 * embedding}))
    with pytest.raises(ValueError, match="'lm_head.weight' and 'model.embed_tokens.weight' differ"):
        minifp4.load(model)


def test_weights_beside_an_index_that_does_not_name_them_are_refused(model):
    shutil.copy(model / "model.safetensors", model / "model-00001-of-00001.safetensors")
    names = safetensors.SafeFile(model / "model.safetensors").entries
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds model.safetensors.index.json and also model.safetensors"):
        minifp4.load(model)


def test_an_index_of_nothing_is_refused(model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="index.json: weight_map must map tensor names to file names"):
        minifp4.load(model)


def test_the_licence_of_a_model_goes_with_what_is_made_of_it(settings, model):
    (model / "LICENSE").write_text("Apache 2.0")
    path = export(checkpoint=str(train(**settings)), out=settings["out"], format=["hf"])["hf"]
    assert (path / "LICENSE").read_text() == "Apache 2.0"


def rename(change_name):
    return lambda tensors: {change_name(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "edit, method, message",
    [
        (rename(lambda n: n.replace("proj.weight", "proj.qweight")), "gptq", "by 'gptq'.*bf16 original"),
        (lambda t: t | {f"{UP}_scale_inv": torch.ones(1)}, "fp8", "quantized by 'fp8'"),
        (lambda t: t | {f"{UP}.absmax": torch.ones(1)}, None, "quantized in a way that is not read here"),
        (rename(lambda n: n.removeprefix("model.")), None, "an embedding model or a part of one"),
    ],
    ids=["gptq", "fp8", "bitsandbytes", "embedding"],
)
def test_weights_of_another_kind_are_told_what_they_are(model, edit, method, message):
    config = json.loads((model / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": method}} if method else {}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        minifp4.load(change(model, edit))


def test_what_is_no_directory_is_told_so(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"):
        minifp4.load("Qwen/Qwen3-0.6B")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read, no .bin files"):
        minifp4.load(model)


# Texts


def test_what_a_tokenizer_brings_for_other_uses_is_left_aside(tmp_path):
    """Truncation and padding, which transformers writes into tokenizer.json."""
    core = json.loads((minifp4.BASE / "tokenizer.json").read_text(encoding="utf-8"))
    core["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    core["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
                       "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(core), encoding="utf-8")
    text = "one two three four five"
    found = chat.Tokenizer(tmp_path / "tokenizer.json").encode(text)
    assert found == chat.Tokenizer(minifp4.BASE / "tokenizer.json").encode(text)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "line, message",
    [
        ({"messages": [USER, ANSWER | {"weight": 0}]}, 'every answer has "weight" 0'),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, '"weight" must be 0 or 1, got 0.5'),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, '"tool_calls" must be a list of'),
        ({"messages": [USER | {"reasoning_content": "c"}, ANSWER]}, "are the assistant's"),
        ({"messages": [USER, ANSWER], "tools": "ls"}, '"tools" must be a list of objects'),
        ({"messages": [USER, ANSWER], "tools": [{}]}, "the chat template of this model knows none"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "c"}]}, "template of this model has no thoughts"),
        ({"messages": [USER | {"content": "half \ud83d"}, ANSWER]}, "not a text that can be written as"),
        ({"messages": [USER | {"content": None}, ANSWER]}, "that is a text and not empty"),
        ({"messages": [USER | {"content": [{}]}, ANSWER]}, '"content" in parts must be of texts alone'),
        ('{"messages": ' + "[" * 10**5, "not JSON"),
        ({"conversations": []}, "another layout.*jq -c"),
        ({"instruction": "a", "output": "b"}, "another layout.*jq -c"),
        ({"text": " "}, "expected"),
    ],
    ids=["weight 0", "weight", "tool_calls", "reasoning_content", "tools", "template", "thoughts",
         "surrogate", "null", "parts", "nested", "ShareGPT", "Alpaca", "empty"],
)  # fmt: skip
def test_lines_that_are_not_understood_are_refused(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER | {"weight": 1}]}) + "\n"
                    + (line if isinstance(line, str) else json.dumps(line)))  # fmt: skip
    with pytest.raises(ValueError, match=f"data.jsonl, line 2: .*{message}"):
        chat.read_examples(path, minifp4.load()[1], 64)


def test_conversations_without_a_question_train(settings, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"messages": [ANSWER]}))
    assert train(**settings | {"train_data": str(path)}).is_dir()


def test_a_vocabulary_that_is_too_small_is_refused(settings, tmp_path):
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "new").mkdir()
    how = settings | {"model": str(tmp_path / "new"), "init_random": True}
    (tmp_path / "new" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="a vocab_size of 100 is too small: .* take 259"):
        train(**how)
    (tmp_path / "new" / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    shutil.copy(minifp4.BASE / "tokenizer.json", tmp_path / "new")
    with pytest.raises(ValueError, match="vocab_size of only 500"):
        train(**how)


def test_the_order_of_a_large_file_is_drawn_once_an_epoch():
    """And it is the order that it always was."""
    examples, begin = range(300_000), time.perf_counter()
    found = [chat.sample(examples, step, batch_size=32, seed=5) for step in range(20)]
    assert time.perf_counter() - begin < 2  # 20 permutations a batch took 4
    order = np.random.default_rng((5, 0)).permutation(300_000)
    assert [number for batch in found for number in batch] == order[: 20 * 32].tolist()
