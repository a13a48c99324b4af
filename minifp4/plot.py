"""Draw what runs have written to metrics.jsonl.

    python -m minifp4.plot out                 out/metrics.png
    python -m minifp4.plot a b --to both.png   two runs in one picture
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from .cli import check, groups, run
from .watch import METRICS, read_metrics

PANELS = (  # what is drawn, how it is called, whether on a logarithmic scale
    ("loss", "loss (dots: held out)", False),
    ("lr", "learning rate", False),
    ("moved", "moved", False),
    ("grad_norm", "norm of the gradient", True),
    ("tokens_per_second", "tokens a second", False),
    ("peak_memory_gib", "GiB at most", False),
)
what, output = groups("what", "output")


@dataclass
class Settings:
    runs: list = what(None, "directories of train.py's --out", positional=True)
    to: str = output(None, "the picture; default: metrics.png in the first", "FILE.png")


def main(settings):
    check(settings)
    try:
        import matplotlib
    except ImportError:
        raise ValueError("drawing needs the package matplotlib: pip install 'minifp4[plot]'") from None
    runs = {}
    for place in settings.runs or ["out"]:
        path = Path(place) / METRICS
        if not path.is_file():
            raise FileNotFoundError(f"{place} holds no {METRICS}: is it the --out of a run?")
        runs[place] = read_metrics(path)
        if not runs[place]:
            raise ValueError(f"{path} has no line that can be drawn")
    target = Path(settings.to or Path(next(iter(runs))) / "metrics.png")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--to {target}: there is no directory {target.parent}")
    matplotlib.use("Agg")
    draw(runs, target)
    print(f"wrote   {target}")
    return target


def draw(runs, path):
    """runs: {name: records}."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(13, 6.5), dpi=110, layout="constrained")
    for axes, (key, title, logarithmic) in zip(panels.flat, PANELS):
        for number, (name, records) in enumerate(runs.items()):
            line(axes, records, key, name, f"C{number}")
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(alpha=0.25)
        axes.set_yscale("log" if logarithmic else "linear")
        axes.spines[["top", "right"]].set_visible(False)
        top = max((one.get(key) or 0 for records in runs.values() for one in records), default=0)
        if not logarithmic and top:  # a held-out loss before the first step may be far above
            axes.set_ylim(0, 1.1 * top)
    for axes in panels[1]:
        axes.set_xlabel("step")
    if len(runs) > 1:
        panels[0][0].legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def line(axes, records, key, name, colour):
    found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    axes.plot(*zip(*found) if found else ((), ()), color=colour, linewidth=1.3, label=name)
    if key == "loss":
        key = "held_out_loss"
        held = [(one["step"], one[key]) for one in records if one.get(key) is not None]
        axes.plot(*zip(*held) if held else ((), ()), "o--", color=colour, markersize=4, linewidth=0.8)


if __name__ == "__main__":
    sys.exit(run(main, Settings, __doc__))
