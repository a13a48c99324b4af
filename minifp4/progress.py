"""`for item in watched(items, "loading")`: a line on the terminal when nothing has been said for a while."""

import sys
import time

QUIET = 2.0  # seconds without a word, then a line each so many


def watched(items, what):
    """The `items` (a list) one after the other; to stderr, now and then, how far this is."""
    last = start = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if now - last > QUIET:
            line = f"        {what}: {number:,} of {len(items):,}"
            if number >= len(items) / 20:  # the first ones say little about the others
                line += f", {duration((now - start) / number * (len(items) - number))} left"
            print(line, file=sys.stderr, flush=True)
            last = now
        yield item


def duration(seconds):
    """45 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
