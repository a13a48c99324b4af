"""`python -m minifp4`: answers, conversations, the same text from all sources of some weights."""

import shutil
import subprocess
import sys

import pytest

import minifp4
import minifp4.__main__ as program
from minifp4 import cli
from minifp4.files import layouts
from minifp4.files.checkpoint import write_dat, write_model


def ask(*words, capsys):
    """The answers' lines and what went to stderr."""
    program.main(cli.parse(program.Settings, list(words), ""))
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_prompts_as_arguments(capsys):
    """Characters that take several tokens are printed whole; the speed is told on stderr."""
    out, err = ask("你是誰", "Thank you", capsys=capsys)
    assert out == ["我是 minifp4 附帶的小模型。", "You are welcome!"]
    assert err.count("tokens/s") == 2


def test_the_same_text_from_every_source(tmp_path, capsys):
    """The bundled NVFP4 directory, plain bf16, ModelOpt's names, a .dat of one level."""
    model, tokenizer = minifp4.load()
    expected, _ = ask("談談UFO", "說說貓吧", capsys=capsys)
    for layout in ("bf16", "modelopt"):
        (tmp_path / layout).mkdir()
        write_model(tmp_path / layout, model.config, tokenizer, layouts.tensors_of(model, layout))
        assert ask("--model", str(tmp_path / layout), "談談UFO", "說說貓吧", capsys=capsys)[0] == expected
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(minifp4.BASE / name, tmp_path)
    write_dat(tmp_path / "model.dat", model)
    assert ask("--model", str(tmp_path / "model.dat"), "談談UFO", "說說貓吧", capsys=capsys)[0] == expected


def test_the_function_and_where_the_program_of_its_name_has_gone():
    model, tokenizer = minifp4.load()
    assert minifp4.generate(model, tokenizer, "Thank you") == "You are welcome!"
    command = [sys.executable, "-W", "ignore", "-m", "minifp4.generate", "hi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "error: the conversation has moved: python -m minifp4\n"


def test_a_conversation_has_a_history(monkeypatch, capsys):
    """What was said stands in the next prompt, until /new."""
    asked, lines = [], iter(["你好", "謝謝", "/new", "再見", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    prompt = minifp4.chat.Tokenizer.prompt
    monkeypatch.setattr(
        minifp4.chat.Tokenizer,
        "prompt",
        lambda self, messages, **how: asked.append(list(messages)) or prompt(self, messages, **how),
    )
    out, _ = ask("--system", "Be kind.", capsys=capsys)
    contents = [[message["content"] for message in messages] for messages in asked]
    assert contents == [["Be kind.", "你好"], ["Be kind.", "你好", out[0], "謝謝"], ["Be kind.", "再見"]]


def test_a_hybrid_model_may_be_asked_not_to_think(monkeypatch, capsys):
    prompts, prompt = [], minifp4.chat.Tokenizer.prompt
    monkeypatch.setattr(
        minifp4.chat.Tokenizer, "prompt",
        lambda self, *given, **how: prompts.append(how["thinking"]) or prompt(self, *given, **how),
    )  # fmt: skip
    ask("--no-thinking", "你好", capsys=capsys)
    ask("你好", capsys=capsys)
    assert prompts == [False, True]


def test_draws_can_be_repeated(capsys):
    words = ("--temperature", "3", "--top-k", "50", "--top-p", "0.99", "--max-new-tokens", "20", "你好")
    texts = [ask("--seed", str(seed), *words, capsys=capsys)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert ask("--max-new-tokens", "1", "你好", capsys=capsys)[0] != ask("你好", capsys=capsys)[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model", "nowhere", "hi"], "nowhere does not exist"),
        (["--top-p", "2", "hi"], "0 < top_p <= 1"),
        (["--device", "toaster", "hi"], "--device toaster"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, message):
    command = [sys.executable, "-m", "minifp4", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and message in done.stderr
    )
