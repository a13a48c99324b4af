"""Command lines made from dataclasses: a program's settings are the fields of one class, its flags their
names."""

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import os
import signal
import sys
import threading
import traceback
import types
from dataclasses import field
from functools import partial
from pathlib import Path

import torch

from . import parallel
from .memory import is_shortage, wanted

MANY = 2**20  # more of anything is a slip of the finger, or of another program
AUTO = -1  # the value of a number for which "auto" was given
OWN = ("group", "least", "below", "most", "positional", "auto")  # metadata that is not argparse's


def option(group, default, text, metavar=None, **more):
    """A field that is also a flag. `more`: argparse's choices, nargs; `least`, `below` and `most` limit a
    number, for which `auto` allows that word too."""
    more |= {"metavar": metavar} if metavar else {}
    return field(default=default, metadata={"group": group, "help": text, **more})


def groups(*names):
    """For each group of flags a function that makes its options: `option` without its first argument."""
    return [partial(option, name) for name in names]


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} ({self.prog} --help lists the flags)")


def parse(kind, argv, text):
    """The settings (a `kind`) that the arguments `argv` ask for. Raises ValueError naming the flag."""
    parser = OneLineParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups = {}
    for setting in dataclasses.fields(kind):
        more = {key: value for key, value in setting.metadata.items() if key not in OWN}
        group, default = setting.metadata["group"], setting.default
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if setting.metadata.get("positional"):
            groups[group].add_argument(setting.name, nargs="*", **more)
            continue
        if setting.type is bool:
            more["action"] = argparse.BooleanOptionalAction
        elif setting.type is list:
            more["action"] = "append"
        else:
            more["type"] = number_or_auto if setting.metadata.get("auto") else setting.type
            if default is not None and not Path(str(default)).is_absolute():
                more["help"] += f" (default: {default})"
        groups[group].add_argument(spellings(setting.name)[0], default=default, **more)
    chosen = vars(parser.parse_args(argv))
    settings = kind(**chosen)
    check(settings)
    settings.given = {name for name in chosen if any(word.split("=")[0] in spellings(name) for word in argv)}
    return settings


def number_or_auto(word):
    """A whole number, or `AUTO`."""
    if word == "auto":
        return AUTO
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {word}")
    return int(word)


def spellings(name):
    """The flags of a field: `--the-name`, and `--no-the-name` for what may be switched off."""
    return "--" + name.replace("_", "-"), "--no-" + name.replace("_", "-")


def given(settings):
    """Names of the settings that somebody chose: on the command line, or else those that differ from the
    default."""
    defaults = {setting.name: setting.default for setting in dataclasses.fields(settings)}
    return getattr(
        settings, "given", {name for name in defaults if getattr(settings, name) != defaults[name]}
    )


def check(settings):
    """Raise ValueError for a number out of its range or a word that is no choice, naming the flag."""
    for setting in dataclasses.fields(settings):
        value, choices = getattr(settings, setting.name), setting.metadata.get("choices")
        if value == AUTO and setting.metadata.get("auto"):
            continue
        least, below = setting.metadata.get("least", -math.inf), setting.metadata.get("below", math.inf)
        if isinstance(value, (int, float)) and not least <= value < below:
            limit = f"at least {least}" + (f" and below {below}" if below < math.inf else "")
            limit += ", and finite" if value == math.inf else ""
            raise ValueError(f"{spellings(setting.name)[0]} must be {limit}, got {value}")
        most = setting.metadata.get("most", math.inf)
        if isinstance(value, (int, float)) and value > most:
            raise ValueError(f"{spellings(setting.name)[0]} must be at most {most:,}, got {value}")
        if (
            choices
            and value is not None
            and not set([value] if isinstance(value, str) else value) <= set(choices)
        ):
            raise ValueError(f"{spellings(setting.name)[0]} must be one of {', '.join(choices)}, got {value}")


def choose_device(name):
    """A device that can hold a tensor; ValueError says why another cannot."""
    device = parallel.own_device(name) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used ({reason}); --device cpu always can") from None


def compiles(device):
    """Whether to compile when nobody has said: on CUDA, if there is Triton (Windows has none)."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def compiler_failures_named():
    """ValueError, one line, where the compiler fails; most often it finds no C or C++ compiler."""
    try:
        yield
    except RuntimeError as error:
        kind = type(error)
        if not kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = str(error).splitlines()
        why = next((line for line in lines if line and not line.startswith("backend=")), kind.__name__)
        raise ValueError(f"torch.compile failed: {why}; --no-compile does without it") from None


# How what would steer a terminal is shown instead: names and texts come from other people's files.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t\r"}


class Console:
    """A stream that never ends a program: what its encoding lacks is replaced, and when nobody reads any more
    (`| head`) or the disk is full, what is written is dropped. Control characters are shown, not sent."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text):
        return self._whatever(self.stream.write, text.translate(CONTROLS))

    def flush(self):
        self._whatever(self.stream.flush)

    def _whatever(self, function, *values):
        try:
            return function(*values)
        except OSError:  # what is left in the stream's buffer would fail again, at the latest at the end
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def stopping():
    """While a loop runs: SIGTERM or Ctrl-C only sets `stop.signal`, and the loop ends where it likes to. The
    second one ends the program at once; but not one of several processes, which torchrun sends it as well."""
    stop, before = types.SimpleNamespace(signal=None), {}

    def first(number, _):
        if stop.signal:
            return
        stop.signal = number
        if parallel.ranks() > 1:
            print("note    stopping after this step", flush=True)
            return
        for one, old in before.items():
            signal.signal(one, old)
        print("note    stopping after this step; a second signal ends at once", flush=True)

    if threading.current_thread() is threading.main_thread():  # only there can signals be caught
        before = {one: signal.signal(one, first) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except BaseException:
        if parallel.ranks() > 1:  # torchrun ends those who have lost one, and they still say why
            before.pop(signal.SIGTERM, None)
        raise
    finally:
        for one, old in before.items():
            signal.signal(one, old)


def explained(error):
    """(a line, the exit status) for what is not a mistake of this program; None for what is."""
    where = f"process {os.environ['RANK']}: " if parallel.launched() > 1 else ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, (ValueError, OSError)):
        return f"error: {where}{error}", 2
    if is_shortage(error):  # in no phase of `memory.py`
        size = wanted(error)
        return f"error: {where}memory is not enough" + (f": {size} more were asked for" if size else ""), 2
    if parallel.lost(error):
        why = str(error).splitlines()[0]
        return f"error: {where}another process has ended ({why}); --resume goes on from what is saved", 2
    if type(error).__name__ == "PanicException":  # of the tokenizer's Rust, which is no Exception
        return f"error: {where}the tokenizer failed: {error}", 2
    return None


def run(main, kind, text):
    """The frame of a program: parse, run `main`, and turn a user's mistake into one line and status 2; of
    several processes the first one with a mistake tells it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Console, before)
    try:
        main(parse(kind, sys.argv[1:], text))
        parallel.close()
        parallel.leave()
    except SystemExit as end:
        parallel.leave(end.code or 0)
        raise
    except BaseException as error:
        known = explained(error)
        if parallel.launched() == 1 and not known:
            raise
        line, status = known or (traceback.format_exc(), 1)
        if not known or parallel.first_to_fail():
            print(line, file=sys.stderr, flush=True)
        parallel.leave(status)
        sys.exit(status)
    finally:
        sys.stdout.flush()  # here a reader who has gone is still no matter
        sys.stdout, sys.stderr = before
