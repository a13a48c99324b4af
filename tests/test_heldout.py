"""Held-out data, epochs, and what a run says of itself."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import export, read_lines, small_directory, small_model, train

import minifp4
from minifp4 import data, heldout, plot
from minifp4.files import checkpoint, safetensors
from minifp4.files.atomic import bits
from minifp4.loss import IGNORE


@pytest.fixture
def settings(tmp_path):
    """A run on thirty conversations."""
    model = small_directory(tmp_path / "model", small_model())
    lines = "".join(f"What is {n} + {n}?\t{2 * n}\n" for n in range(30))
    (tmp_path / "sums.tsv").write_text(lines)
    out = str(tmp_path / "out")
    return dict(model=str(model), train_data=str(tmp_path / "sums.tsv"), steps=6, batch_size=4, lr=1e-3,
                test_max_tokens=1, out=out)  # fmt: skip


def held_out(out):
    return [line for line in read_lines(out + "/metrics.jsonl") if "held_out_loss" in line]


def test_evaluation_changes_no_bit_of_training(settings, tmp_path):
    (tmp_path / "held.tsv").write_text("What is 77 + 1?\t78\n")
    paths = [
        train(**settings | {"out": str(tmp_path / name)}, **how)
        for name, how in (("a", {}), ("b", {"eval_data": str(tmp_path / "held.tsv"), "eval_every": 1}))
    ]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()
    found = held_out(str(tmp_path / "b"))
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4, 5, 6]
    assert found[0]["held_out_perplexity"] == pytest.approx(math.exp(found[0]["held_out_loss"]))


def test_the_held_out_loss_is_the_mean_over_all_tokens(settings):
    """Beside torch's cross entropy of each conversation alone."""
    model, tokenizer = minifp4.load(settings["model"])
    found = data.read(settings["train_data"], tokenizer, 256)
    loss = heldout.HeldOut(model, found, tokenizer.end_of_text, 128, "ce").loss()
    total, counted = 0.0, 0
    for ids, labels in found.examples:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, :-1]
        goals = torch.tensor(labels[1:])
        total += F.cross_entropy(logits, goals, ignore_index=IGNORE, reduction="sum").item()
        counted += sum(label != IGNORE for label in labels)
    assert loss == pytest.approx(total / counted, rel=1e-5)


def test_the_split_goes_by_content(settings, tmp_path):
    """In any order, and of two equal conversations both are on the same side."""
    from train import Settings

    tokenizer, path, sides = minifp4.load(settings["model"])[1], tmp_path / "again.tsv", []
    lines = (tmp_path / "sums.tsv").read_text().splitlines()
    for order in (lines, lines[::-1] + lines[:5]):
        path.write_text("\n".join(order))
        trains, held = heldout.split(Settings(train_data=str(path), eval_share=0.3), tokenizer)
        assert trains.records + held.records == len(order) and 4 < held.records < 16
        sides.append([{tuple(ids) for ids, _ in side.examples} for side in (trains, held)])
        assert not sides[-1][0] & sides[-1][1]
    assert sides[0] == sides[1]


def test_the_best_is_kept_and_exported(settings, tmp_path, capsys):
    """A rate so high that it soon gets worse: training ends, and the best is neither the newest nor lost."""
    how = settings | {"steps": 60, "lr": 0.3, "keep": 1}
    newest = train(**how, eval_share=0.3, eval_every=2, patience=3, save_every=2)
    said = capsys.readouterr().out
    found = held_out(settings["out"])
    best = min(found[1:], key=lambda line: line["held_out_loss"])
    assert len(found) < 31 and "note    no better for 3 evaluations: this ends at step" in said
    assert found[-1]["step"] == best["step"] + 6 == int(newest.name[5:])
    record = json.loads((tmp_path / "out" / "best" / "train.json").read_text())
    assert record["step"] == best["step"] and record["best"]["loss"] == best["held_out_loss"]
    assert f"best    {settings['out']}/best: step {best['step']}" in said
    for chosen, step in ((False, newest.name), (True, "best")):
        export(checkpoint=settings["out"], best=chosen, format=["hf"])
        assert f"reading {settings['out']}/{step}" in capsys.readouterr().out


def test_a_resumed_run_remembers_the_best(settings, tmp_path):
    how = settings | {"eval_share": 0.3, "eval_every": 1, "lr": 0.0, "weight_decay": 0.0}
    train(**how | {"steps": 2})
    again = train(resume="", out=settings["out"], steps=4, patience=4)
    record = json.loads((again / "train.json").read_text())
    assert record["best"]["step"] == 1 and record["best"]["since"] == 3  # all are equal


def test_the_best_of_an_earlier_run_is_not_taken(settings, tmp_path):
    train(**settings, eval_share=0.3)
    train(**settings | {"steps": 7})  # another run, into the same directory
    with pytest.raises(ValueError, match="best is of an earlier run than .*step-000007"):
        export(checkpoint=settings["out"], best=True)
    path = tmp_path / "out" / "best" / "train.json"
    record = json.loads(path.read_text()) | {"best": {"los": 1}}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match='train.json: "best" must have the loss and the step'):
        heldout.best_so_far(settings["out"], record["run"], {})
    assert heldout.best_so_far(settings["out"], "another", {}) == heldout.Best()
    best = heldout.Best()
    assert not best.take(float("nan"), 1) and best.take(2.0, 2) and not best.take(2.0, 3) and best.since == 1


@pytest.mark.parametrize(
    "more, message",
    [
        ({"eval_share": 1e-6}, "--eval-share 1e-06 of 30 leaves none"),
        ({"eval_share": 1 - 1e-6}, "--eval-share 0.999999 of 30 leaves nothing to learn"),
        ({"eval_data": "sums.tsv"}, "shares 30 of 30 with --train-data"),
        ({"patience": 3}, "--patience needs --eval-data or --eval-share"),
        ({"epochs": 2.0, "steps": 3}, "--epochs and --steps exclude each other"),
        ({"batch_tokens": 8, "batch_size": None}, "not fit into a row of 8; give a larger --batch-tokens"),
        ({"batch_tokens": 64}, "--batch-tokens and --batch-size exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_one_line(settings, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    without = {} if "steps" in more else {"steps": None}
    how = {key: value for key, value in (settings | without | more).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        train(**how)


def test_rows_of_a_number_of_tokens_train_and_resume(settings, tmp_path):
    """Bit for bit, across epochs; what was decided stands in train.json."""
    how = settings | {"batch_tokens": 128, "steps": 9}
    del how["batch_size"]
    whole = train(**how | {"out": str(tmp_path / "whole")})
    train(**how | {"steps": 3})
    again = train(resume="", out=settings["out"], steps=9)
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    epochs = [line["epoch"] for line in read_lines(settings["out"] + "/metrics.jsonl")]
    assert len(epochs) == 9 and epochs == sorted(epochs) and epochs[-1] > 1
    kept = json.loads((again / "train.json").read_text())["settings"]
    assert kept["batch_tokens"] == 128 and kept["batch_size"] is None


def test_epochs_are_passes_through_the_data(settings):
    del settings["steps"]
    assert train(**settings, epochs=2.0).name == "step-000015"  # 2 x 30 conversations, 4 a step
    lines = read_lines(settings["out"] + "/metrics.jsonl")
    assert lines[-1]["epoch"] == 2.0
    assert train(resume="", out=settings["out"], epochs=3.0).name == "step-000023"


def test_long_conversations_are_left_out_or_cut(settings, tmp_path, capsys):
    with open(settings["train_data"], "a") as file:
        file.write("Count\t" + "1 2 3 " * 100 + "\n")
    train(**settings, seq_len=64)
    assert "note    1 longer than --seq-len were cut: " in capsys.readouterr().out
    train(**settings | {"out": str(tmp_path / "b")}, seq_len=64, drop_long=True)
    said = capsys.readouterr().out
    assert "sums.tsv: 30 conversations" in said and "note    1 longer than --seq-len are left out" in said


def test_numbers_go_to_tensorboard_too(settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(**settings, tensorboard=True, eval_share=0.3)
    found = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    lines = [line for line in read_lines(settings["out"] + "/metrics.jsonl") if "loss" in line]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert len(found.Scalars("held_out_loss")) == 7


def test_runs_are_drawn(settings, tmp_path):
    pytest.importorskip("matplotlib")
    train(**settings, eval_share=0.3)
    with open(settings["out"] + "/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a killed run
    target = plot.main(plot.Settings(runs=[settings["out"]] * 2))
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 20_000
    with pytest.raises(FileNotFoundError, match="holds no metrics.jsonl"):
        plot.main(plot.Settings(runs=[str(tmp_path)]))


def test_the_best_is_a_whole_checkpoint(settings, tmp_path):
    train(**settings, eval_share=0.3)
    best = tmp_path / "out" / "best"
    before, after = (
        safetensors.SafeFile(place / "model.safetensors") for place in (tmp_path / "model", best)
    )
    assert torch.equal(bits(before["lm_head.weight"]), bits(after["lm_head.weight"]))
    assert minifp4.generate(*minifp4.load(best), "What is 1 + 1?", max_new_tokens=2) is not None
    assert checkpoint.model_directory(best) == best
