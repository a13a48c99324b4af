"""Command lines made from dataclasses: a program's settings are the fields of one class, its flags their
names."""

import argparse
import dataclasses
import math
import sys
from dataclasses import field
from pathlib import Path


def option(default, group, text, **more):
    """A field that is also a flag. `more`: argparse's choices and metavar; `least` and `below` limit a
    number."""
    return field(default=default, metadata={"group": group, "help": text, **more})


def flag(setting):
    return "--" + setting.name.replace("_", "-")


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
        more = {
            key: value for key, value in setting.metadata.items() if key not in ("group", "least", "below")
        }
        group, default = setting.metadata["group"], setting.default
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if setting.type is bool:
            more["action"] = argparse.BooleanOptionalAction
        elif setting.type is list:
            more["action"] = "append"
        else:
            more["type"] = setting.type
            if default is not None and not Path(str(default)).is_absolute():
                more["help"] += f" (default: {default})"
        groups[group].add_argument(flag(setting), default=default, **more)
    settings = kind(**vars(parser.parse_args(argv)))
    check(settings)
    return settings


def check(settings):
    """Raise ValueError for a number out of its range or a word that is no choice, naming the flag."""
    for setting in dataclasses.fields(settings):
        value, choices = getattr(settings, setting.name), setting.metadata.get("choices")
        least, below = setting.metadata.get("least", -math.inf), setting.metadata.get("below", math.inf)
        if isinstance(value, (int, float)) and not least <= value < below:
            limit = f"at least {least}" + (f" and below {below}" if below < math.inf else "")
            raise ValueError(f"{flag(setting)} must be {limit}, got {value}")
        if (
            choices
            and value is not None
            and not set([value] if isinstance(value, str) else value) <= set(choices)
        ):
            raise ValueError(f"{flag(setting)} must be one of {', '.join(choices)}, got {value}")


def run(main, kind, text):
    """The frame of a program: parse, run `main`, and turn a user's mistake into one line and status 2."""
    try:
        main(parse(kind, sys.argv[1:], text))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
