"""Tells what is in the table of scripts/bench-guest.sh: figures, ratios within the same run, and the goals.

A ratio is of two measurements of one run with the target alike. Of the ratios of all runs the median is told with the
quartiles (of fewer than four runs, with the least and the most, and nothing is decided). Where these have what they are
compared with between them, the noise is larger than the difference: undecided.
"""

import csv
import statistics
import sys

SETTINGS = ["none", "forerun", "virtnbdbackup", "qmpbackup"]
PEERS = SETTINGS[2:]
# With fewer runs nothing is decided.
FEWEST = 4
FIGURES = [
    ("ahead_iops", "ahead: I/Os a second"),
    ("ahead_mibs", "ahead: MiB/s"),
    ("ahead_write_p50", "ahead: write p50, ms"),
    ("ahead_write_p99", "ahead: write p99, ms"),
    ("ahead_write_p999", "ahead: write p99.9, ms"),
    ("ahead_commit_p50", "ahead: commit p50, ms"),
    ("ahead_commit_p99", "ahead: commit p99, ms"),
    ("ahead_commit_p999", "ahead: commit p99.9, ms"),
    ("ahead_stall", "ahead: longest stall, ms"),
    ("window_iops", "due: I/Os a second"),
    ("window_mibs", "due: MiB/s"),
    ("window_write_p50", "due: write p50, ms"),
    ("window_write_p99", "due: write p99, ms"),
    ("window_write_p999", "due: write p99.9, ms"),
    ("window_commit_p50", "due: commit p50, ms"),
    ("window_commit_p99", "due: commit p99, ms"),
    ("window_commit_p999", "due: commit p99.9, ms"),
    ("window_stall", "due: longest stall, ms"),
    ("window_ms", "window: due to released, ms"),
    ("held_ms", "held by a job, ms"),
    ("done_ms", "due to the tool's end, ms"),
    ("copied_mib", "to the target from due on, MiB"),
    ("written_mib", "to the target in all, MiB"),
    ("read_mib", "read from the images for it, MiB"),
    ("freeze_ms", "freeze, in the tool's words, ms"),
    ("precopied_mib", "copied ahead, MiB"),
    ("superseded_mib", "of it for nothing, MiB"),
    ("residual_mib", "left for the window, MiB"),
    ("stolen", "of the CPUs' time, to other machines"),
]


def spread(values):
    """The median and what is called the noise around it."""
    values = sorted(values)
    middle = statistics.median(values)
    if len(values) < FEWEST:
        return middle, values[0], values[-1]
    low, _, high = statistics.quantiles(values, method="inclusive")
    return middle, low, high


def short(value):
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Table:
    def __init__(self, path):
        with open(path) as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        self.failed = [row for row in rows if row["status"] != "ok"]
        self.rows = {}
        # Of a run that was made again, the last.
        for row in rows:
            if row["status"] == "ok":
                self.rows[row["setting"], row["target"], row["run"]] = row
        self.targets = sorted({target for _, target, _ in self.rows})
        self.loads = [float(row["load"]) for row in rows if row["load"]]

    def values(self, setting, target, figure):
        """By run."""
        of = {key[2]: row.get(figure) for key, row in self.rows.items() if key[:2] == (setting, target)}
        return {run: float(value) for run, value in of.items() if value}

    def ratios(self, figure, above, below, target):
        above, below = (self.values(setting, target, figure) for setting in (above, below))
        return [above[run] / below[run] for run in above if below.get(run)]


def verdict(ratios, bound, below):
    middle, low, high = spread(ratios)
    if len(ratios) < FEWEST:
        word = "undecided, too few runs"
    elif (high if below else -low) <= (bound if below else -bound):
        word = "met"
    elif (low if below else -high) > (bound if below else -bound):
        word = "missed"
    else:
        word = "undecided"
    return f"{short(middle)} ({short(low)} - {short(high)}), {len(ratios)} runs: {word}"


def tell_figures(table, target):
    print(f"\ntarget {target}: median (least - most)")
    print(f"  {'':34}" + "".join(f"{setting:>26}" for setting in SETTINGS))
    for figure, name in FIGURES:
        cells = []
        for setting in SETTINGS:
            values = list(table.values(setting, target, figure).values())
            told = f"{short(statistics.median(values))} ({short(min(values))} - {short(max(values))})" if values else "-"
            cells.append(f"{told:>26}")
        if any(cell.strip() != "-" for cell in cells):
            print(f"  {name:34}" + "".join(cells))


def tell_ratios(table, target):
    print(f"\ntarget {target}: ratio to no backup, median (quartiles); undecided where they have 1 between them")
    for figure, name in FIGURES[:18]:
        for setting in SETTINGS[1:]:
            if ratios := table.ratios(figure, setting, "none", target):
                middle, low, high = spread(ratios)
                word = "undecided" if len(ratios) < FEWEST or low <= 1 <= high else "more" if middle > 1 else "less"
                print(f"  {name:34}{setting:>16}  {short(middle)} ({short(low)} - {short(high)}) {word}")


def tell_noise(table):
    """No backup twice in a run: what differs there is noise."""
    if len(table.targets) < 2:
        return
    print("\nno backup beside no backup in the same run, median (quartiles)")
    for figure, name in FIGURES[:18]:
        one, other = (table.values("none", target, figure) for target in table.targets[:2])
        ratios = [one[run] / other[run] for run in one if other.get(run)]
        if ratios:
            middle, low, high = spread(ratios)
            print(f"  {name:34}{short(middle)} ({short(low)} - {short(high)})")


def tell_goals(table):
    print("\ngoals")
    for target in table.targets:
        for figure, words, bound in (
            ("ahead_write_p99", "p99 of writes ahead of schedule at most 1.10 of no backup's", 1.10),
            ("ahead_write_p999", "p99.9 of writes ahead of schedule at most 1.5 of no backup's", 1.5),
            ("ahead_stall", "longest stall ahead of schedule at most no backup's", 1.0),
            ("window_stall", "longest stall from due on at most no backup's", 1.0),
        ):
            if ratios := table.ratios(figure, "forerun", "none", target):
                print(f"  {target}: {words}: {verdict(ratios, bound, True)}")
        copied, wasted = (table.values("forerun", target, f"{name}_mib") for name in ("precopied", "superseded"))
        residual = table.values("forerun", target, "residual_mib")
        shares = [wasted.get(run, 0) / (copied[run] + residual.get(run, 0)) for run in copied if copied[run]]
        if shares:
            print(f"  {target}: superseded at most 0.10 of the bytes copied: {verdict(shares, 0.1, True)}")
        if target == "free":
            continue
        for peer in PEERS:
            if ratios := table.ratios("window_ms", peer, "forerun", target):
                print(f"  {target}: a window of at most a tenth of {peer}'s (times as long): {verdict(ratios, 10, False)}")
            else:
                print(f"  {target}: a window of at most a tenth of {peer}'s: not measured")


def main():
    table = Table(sys.argv[1])
    print(f"{len(table.rows)} measurements and {len(table.failed)} tries that failed; load before them {min(table.loads, default=0):.1f} - "
          f"{max(table.loads, default=0):.1f}")
    # After a tool whose writers wait for a held target it is high for a while by itself.
    if statistics.median(table.loads or [0]) > 3:
        print("THE MACHINE WAS BUSY WITH SOMETHING ELSE: none of these figures is to be trusted or told")
    fewest = min((float(row["ahead_writes"]) for row in table.rows.values()), default=0)
    if fewest < 1000:
        print(f"p99.9 IS THE SLOWEST OF FEW: {fewest:.0f} writes ahead of schedule in one measurement; more seconds (-t) are needed")
    for setting in SETTINGS:
        failures = [row for row in table.failed if row["setting"] == setting]
        if failures:
            made = sum(key[0] == setting for key in table.rows)
            print(f"{setting} failed {len(failures)} of {len(failures) + made} times" + ("" if made else ": NOT MEASURED") + "; of its reasons:")
            for reason in sorted({row["reason"] for row in failures})[:5]:
                print(f"  {reason}")
    for target in table.targets:
        tell_figures(table, target)
    for target in table.targets:
        tell_ratios(table, target)
    tell_noise(table)
    tell_goals(table)


if __name__ == "__main__":
    main()
