"""Measures one guest under load with no backup and with each tool, in turn; scripts/bench-guest.sh runs it.

A measurement is: a fresh guest; the tool's base (all of it, target free); the day's changes; then the load, at a fixed
rate. For so many seconds of it nothing is due, and only forerun may work. Then the backup is due, and the tool makes its
increment. What the guest has seen is taken from fio's log of every single I/O, whose clock is the guest's own; what holds
the guest, from QEMU's jobs, seen every 20 ms on a monitor of their own. One line of the TSV is one measurement.
"""

import argparse
import base64
import bisect
import csv
import gzip
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time

MIB = 1 << 20
SETTINGS = ["none", "forerun", "virtnbdbackup", "qmpbackup"]
# What the goals compare.
PAIR = SETTINGS[:2]
PHASES = ["ahead", "window"]
ATTEMPTS = 3
GUEST = ["iops", "mibs", "write_p50", "write_p99", "write_p999", "commit_p50", "commit_p99", "commit_p999", "stall", "writes"]
COLUMNS = (
    ["run", "setting", "target", "status"]
    + [f"{phase}_{figure}" for phase in PHASES for figure in GUEST]
    + ["window_ms", "held_ms", "done_ms", "copied_mib", "written_mib", "read_mib", "freeze_ms", "precopied_mib"]
    + ["superseded_mib", "residual_mib", "rate", "load", "stolen", "reason"]
)


class Failed(Exception):
    """A measurement that could not be made, in words for the table."""


class Qmp:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.lines = self.socket.makefile("r")
        self.events = []
        self.lines.readline()
        self.run("qmp_capabilities")

    def run(self, command, **arguments):
        request = {"execute": command, "arguments": arguments}
        self.socket.sendall((json.dumps(request) + "\n").encode())
        while line := self.lines.readline():
            answer = json.loads(line)
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise Failed(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]
        raise Failed("QEMU has ended")


class Watch(threading.Thread):
    """Sees from outside, alike for all tools, how long a job is in QEMU, and whether the VM is stopped."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.qmp = Qmp(path)
        self.first = self.last = self.error = None
        self.going = True

    def run(self):
        try:
            while self.going:
                if self.qmp.run("query-jobs"):
                    self.last = time.time()
                    self.first = self.first or self.last
                time.sleep(0.02)
        except (Failed, OSError) as error:
            self.error = error

    def stop(self):
        """Ends it and gives the longest time that the VM was stopped, in ms."""
        self.going = False
        self.join()
        longest, since = 0, None
        for event in self.qmp.events:
            at = event["timestamp"]["seconds"] * 1e3 + event["timestamp"]["microseconds"] / 1e3
            if event["event"] == "STOP":
                since = at
            elif event["event"] == "RESUME" and since:
                longest = max(longest, at - since)
        return longest

    def guest(self, figure):
        """What each of the guest's disks has done so far."""
        return [device["stats"][figure] for device in self.qmp.run("query-blockstats")]

    def wait_for_writes(self):
        """fio takes a while to start, which is no stall of the guest."""
        before = self.guest("wr_operations")
        for _ in range(600):
            if all(now > then + 10 for now, then in zip(self.guest("wr_operations"), before)):
                return
            time.sleep(0.1)
        raise Failed("fio does not write")


def stolen():
    """CPU time that this machine wanted and its own host did not give it, and all of its CPU time, in ticks."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    return ticks[7], sum(ticks)


class Shell:
    """The guest's shell on its port."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.count = 0

    def run(self, line, timeout=120):
        self.count += 1
        self.socket.sendall(f"{self.count} {line}\n".encode())
        self.socket.settimeout(timeout)
        said = b""
        end = re.compile(rb"RIG-END %d (\d+)\r?\n" % self.count)
        while not (found := end.search(said)):
            try:
                more = self.socket.recv(65536)
            except TimeoutError:
                more = b""
            if not more:
                raise Failed(f"the guest's shell did not finish {line[:60]!r}: {said[-200:]!r}")
            said += more
        text = said[: found.start()].decode(errors="replace")
        if found[1] != b"0":
            raise Failed(f"in the guest, {line[:60]!r}: {text[-300:]}")
        return text

    def put(self, path, text):
        # A line of a shell has an end.
        coded = base64.b64encode(text.encode()).decode()
        self.run(f": >{path}.b64")
        for at in range(0, len(coded), 1000):
            self.run(f"echo {coded[at:at + 1000]} >>{path}.b64")
        self.run(f"base64 -d {path}.b64 >{path}")


class Target:
    """Where backups go: a file system on a loop device on a file that a throttle serves. While it is held, next to nothing
    of it is cached unwritten, so that it is felt at once."""

    def __init__(self, directory, monitor, loop):
        self.directory, self.loop = directory, os.path.basename(loop)
        self.qmp = Qmp(monitor)
        with open(f"/sys/block/{self.loop}/dev") as device:
            self.cache = f"/sys/class/bdi/{device.read().strip()}"

    def limit(self, mib):
        # Linux 6.2 and later; before it there is only a share of the memory.
        strict = os.path.exists(f"{self.cache}/strict_limit")
        amounts = {"strict_limit": 1, "max_bytes": 4 * MIB} if mib else {"strict_limit": 0, "max_ratio": 100}
        for name, amount in (amounts if strict else {"max_ratio": 0 if mib else 100}).items():
            with open(f"{self.cache}/{name}", "w") as file:
                file.write(str(amount))
        self.qmp.run("qom-set", path="/objects/limit", property="limits", value={"bps-total": int(mib * MIB)})

    def flush(self):
        subprocess.run(["sync", "-f", self.directory], check=True)

    def written(self):
        with open(f"/sys/block/{self.loop}/stat") as stat:
            return int(stat.read().split()[6]) * 512

    def clear(self):
        for entry in os.scandir(self.directory):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        self.flush()


# --- the load ---


def fio_job(options, seed, parts, seconds):
    common = [
        "[global]", "direct=1", "norandommap=1", "refill_buffers=1", f"randseed={seed}", "clocksource=clock_gettime",
        "disable_clat=1", "disable_slat=1", "log_unix_epoch=1",
    ]
    if seconds:
        common += ["time_based=1", f"runtime={seconds}"]
    return "\n".join(common + [line for part in parts for line in part]) + "\n"


# Four of five I/Os go to a twentieth of the disk.
MIX = ["filename=/dev/vda", "ioengine=libaio", "bsrange=4k-16k", "random_distribution=zoned:80/5:20/95"]
# What a database does to its disk: a log, each write of it durable, and pages, nine of ten in a twentieth.
LOG = ["filename=/dev/vdb", "ioengine=psync", "rw=write", "bs=8k", "sync=dsync", "size=50%"]
PAGES = ["filename=/dev/vdb", "ioengine=psync", "rw=randwrite", "bs=8k", "offset=50%",
         "random_distribution=zoned:90/5:10/95"]


def load_job(options, seed, rates, seconds=36000):
    """Rates are I/Os a second of the mix, the log and the pages; none: as fast as it goes."""
    def paced(rate, mixed=False):
        if not rates:
            return []
        return [f"rate_iops={max(1, rate * 7 // 10)},{max(1, rate * 3 // 10)}" if mixed else f"rate_iops={max(1, rate)}"]

    mix, log, pages = rates or (0, 0, 0)
    return fio_job(options, seed, [
        ["[mix]", *MIX, "rw=randrw", "rwmixread=70", "iodepth=4", "write_lat_log=/run/fio/mix", *paced(mix, True)],
        ["[log]", *LOG, "write_lat_log=/run/fio/log", *paced(log)],
        ["[pages]", *PAGES, "write_lat_log=/run/fio/pages", *paced(pages)],
    ], seconds)


def day_job(options, seed):
    size = options.changes
    return fio_job(options, seed, [
        ["[day-mix]", *MIX, "rw=randwrite", "iodepth=4", f"io_size={size * 3 // 4}m"],
        ["[day-pages]", *PAGES, f"io_size={max(1, size // 4)}m"],
    ], None)


def read_logs(tar):
    """Of each job: its I/Os as (time in the guest, ms; latency, us; 1 for a write; bytes), in order of time."""
    logs = {}
    for member in tar.getmembers():
        found = re.search(r"(mix|log|pages)_lat\.\d+\.log$", member.name)
        if not found:
            continue
        rows = []
        for line in io.TextIOWrapper(tar.extractfile(member)):
            fields = line.split(",")
            if len(fields) >= 4:
                rows.append((int(fields[0]), int(fields[1]) / 1000, int(fields[2]), int(fields[3])))
        logs[found[1]] = sorted(rows)
    if set(logs) != {"mix", "log", "pages"}:
        raise Failed(f"fio left the logs of {sorted(logs)} only")
    return logs


def percentile(ordered, share):
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def guest_figures(logs, begin, end):
    """What the guest saw between two moments of its clock, ms."""
    rows = {}
    for job, log in logs.items():
        rows[job] = log[bisect.bisect_left(log, (begin,)):bisect.bisect_left(log, (end,))]
    ios = [row for job in rows.values() for row in job]
    writes = sorted(row[1] for row in ios if row[2])
    commits = sorted(row[1] for row in rows["log"])
    if not writes or not commits:
        raise Failed("the guest wrote nothing in a phase")
    seconds = (end - begin) / 1000
    # A stall is as long as the slowest I/O, or as the longest time without any that ended.
    ends = sorted(row[0] for row in ios)
    gap = max([later - earlier for earlier, later in zip(ends, ends[1:])] + [ends[0] - begin, end - ends[-1]])
    figures = {
        "iops": len(ios) / seconds, "mibs": sum(row[3] for row in ios) / MIB / seconds,
        "writes": len(writes), "stall": max(gap, max(row[1] for row in ios) / 1000),
    }
    for name, ordered in (("write", writes), ("commit", commits)):
        for label, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
            figures[f"{name}_{label}"] = percentile(ordered, share) / 1000
    return figures


# --- the tools ---


class Tool:
    """No backup: there is nothing to run."""

    libvirt = True

    def __init__(self, bench, name):
        self.bench, self.name = bench, name

    def base(self):
        pass

    def ahead(self, due):
        time.sleep(max(0, due - time.time()))

    def increment(self):
        return {}

    def run(self, words, environment=None, accept=(0,)):
        places, log = self.bench.places, self.bench.log
        words = ["nsenter", "--mount", "--target", str(places["namespace"]), "--", *words]
        log.write(f"$ {' '.join(words)}\n")
        log.flush()
        try:
            ended = subprocess.run(words, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=self.bench.options.patience)
        except subprocess.TimeoutExpired as late:
            raise Failed(f"{self.name} did not end in {self.bench.options.patience} s") from late
        log.write(ended.stdout + ended.stderr)
        log.flush()
        if ended.returncode not in accept:
            # Without colours; what it calls an error, else its last word.
            said = re.sub(r"\x1b\[[0-9;]*m", "", ended.stdout + ended.stderr).strip().splitlines() or [""]
            errors = [line for line in said if re.search(r"\b(error|critical|failed)\b", line, re.IGNORECASE)] or said
            # Without the time, so that the same is the same.
            words = re.sub(r"^\[[^]]*\] *", "", errors[-1])
            raise Failed(f"{self.name} ended with {ended.returncode}: {words[:300]}")
        return ended.stdout


class Forerun(Tool):
    def command(self, *words):
        options, places = self.bench.options, self.bench.places
        environment = {"FORERUN_REPO": f"{options.target}/repo", "FORERUN_STATE_DIR": f"{options.dir}/state"}
        # 3: done, with warnings. 4: more is left than asked for, which is what is measured here.
        said = self.run([options.forerun, "--json", "-q", *words], environment, (0, 3, 4))
        return json.loads(said)

    def of_domain(self, verb, *words):
        places = self.bench.places
        return self.command(verb, places["name"], "--connect", places["uri"], *words)

    def base(self):
        self.command("init", f"{self.bench.options.target}/repo")
        self.of_domain("backup", "--no-load-control")

    def ahead(self, due):
        """Copies ahead and makes the point when it is due, in one run as an operator starts it hours before."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(due))
        self.outcome = None

        def run():
            try:
                self.outcome = self.of_domain("run", "--at", at)["targets"][0]["point"]
            except Exception as error:
                self.outcome = error

        self.running = threading.Thread(target=run, daemon=True)
        self.running.start()
        super().ahead(due)

    def increment(self):
        self.running.join()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        point = self.outcome
        sizes = {f"{name}_mib": point["bytes"][name] / MIB for name in ("precopied", "superseded", "residual")}
        return {"freeze_ms": point["freeze_ms"], **sizes}


class Virtnbdbackup(Tool):
    def level(self, level):
        places, target = self.bench.places, self.bench.options.target
        # It asks for a password where a URI names a socket; in the namespace of this libvirtd this is the usual place.
        usual = f"{os.path.dirname(os.path.dirname(places['pid_file']))}/libvirt-sock"
        if not os.path.lexists(usual):
            os.symlink(places["uri"].split("socket=")[1], usual)
        self.run(["virtnbdbackup", "-U", "qemu:///system", "-d", places["name"], "-l", level, "-n", "-o", f"{target}/vnb"])

    def base(self):
        self.level("full")

    def increment(self):
        self.level("inc")
        return {}


class Qmpbackup(Tool):
    # It makes names of nodes from names of nodes, and those of libvirt's become too long for QEMU.
    libvirt = False

    def level(self, level):
        options = self.bench.options
        # QEMU opens what it makes: as the same user.
        words = ["runuser", "-u", options.user, "--", "/usr/bin/python3", f"{options.qmpbackup}/qmpbackup", "--socket"]
        words += [self.bench.places["peer"], "backup", "--level", level, "--target", f"{options.target}/qmpb"]
        self.run(words, {"PYTHONPATH": options.qmpbackup})

    def base(self):
        if not self.bench.options.qmpbackup:
            raise Failed("no checkout was given (-q)")
        self.level("full")

    def increment(self):
        self.level("inc")
        return {}


TOOLS = {"none": Tool, "forerun": Forerun, "virtnbdbackup": Virtnbdbackup, "qmpbackup": Qmpbackup}


class Bench:
    def __init__(self, options, places):
        self.options, self.places = options, places
        self.log = open(options.log, "a")
        self.target = Target(options.target, options.monitor, options.loop)
        self.rates = self.shell = self.bare = self.qemu = None

    def virsh(self, *words, check=True):
        ended = subprocess.run(["virsh", "--connect", self.places["uri"], *words], text=True, capture_output=True)
        if check and ended.returncode:
            raise Failed(f"virsh {words[0]}: {ended.stderr.strip()}")
        return ended.stdout

    def start_bare(self):
        """The domain's own command line without libvirt: with short names of nodes, running from the start."""
        words = shlex.split(self.virsh("domxml-to-native", "qemu-argv", "--domain", self.places["name"]).replace("\\\n", " "))
        command, skip = ["runuser", "-u", self.options.user, "--", "env"], False
        for word, after in zip(words, words[1:] + [""]):
            # Its key is libvirt's, and only libvirt would let it go on.
            if skip or word == "-S" or (word == "-object" and "masterKey0" in after):
                skip = not skip and word != "-S"
                continue
            if word.startswith("socket,id=charmonitor,"):
                word = f"socket,id=charmonitor,path={os.path.dirname(self.places['shell'])}/monitor.sock,server=on,wait=off"
            command.append(re.sub(r"libvirt-(\d+)-(format|storage)", r"disk\1-\2", word))
        for disk in ("vda", "vdb"):
            shutil.chown(self.places[disk], self.options.user)
        with open(self.places["console"], "w"):
            shutil.chown(self.places["console"], self.options.user)
        self.bare = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        for _ in range(600):
            if os.path.exists(self.places["shell"]) or self.bare.poll() is not None:
                break
            time.sleep(0.05)
        children = f"/proc/{self.bare.pid}/task/{self.bare.pid}/children"
        if self.bare.poll() is not None:
            raise Failed("QEMU without libvirt did not start: see the log")
        with open(children) as file:
            # runuser waits for its child.
            return int(file.read().split()[0])

    def start(self, libvirt=True):
        """A fresh guest on fresh disks."""
        self.stop()
        for name in ("shell", "peer", "watch"):
            if os.path.lexists(self.places[name]):
                os.unlink(self.places[name])
        for disk in ("vda", "vdb"):
            shutil.copyfile(f"{self.options.template}/{disk}.qcow2", self.places[disk])
        self.target.limit(0)
        self.target.clear()
        shutil.rmtree(f"{self.options.dir}/state", ignore_errors=True)
        if libvirt:
            self.virsh("start", self.places["name"])
            with open(self.places["pid_file"]) as file:
                self.qemu = int(file.read())
        else:
            self.qemu = self.start_bare()
        self.shell = Shell(self.places["shell"])
        self.shell.run("mkdir -p /run/fio", 240)

    def stop(self):
        if self.bare:
            if self.bare.poll() is None:
                os.kill(self.qemu, signal.SIGKILL)
            self.bare.wait()
            self.bare = None
        self.virsh("destroy", self.places["name"], check=False)
        for checkpoint in self.virsh("checkpoint-list", self.places["name"], "--name", check=False).split():
            self.virsh("checkpoint-delete", self.places["name"], checkpoint, "--metadata", check=False)

    def clock(self):
        """How many ms the guest's clock is ahead."""
        before = time.time()
        # busybox' `date` knows seconds only.
        said = self.shell.run("adjtimex")
        after = time.time()
        seconds, micros = (int(re.search(rf"tv_{part}:\s+(\d+)", said)[1]) for part in ("sec", "usec"))
        return seconds * 1e3 + micros / 1e3 - (before + after) * 500

    def begin_load(self, seed, rates, seconds=36000):
        self.shell.put("/run/fio/job", load_job(self.options, seed, rates, seconds))
        line = "cd /run/fio && (fio --output-format=json --output=/run/fio/result job >/run/fio/words 2>&1; touch ended) &"
        self.shell.run(line)

    def end_load(self):
        """Ends it and gives the files that it left."""
        # Asked again: on a machine that is short of CPUs a signal at the wrong moment was lost.
        asking = "[ $((i % 50)) -eq 0 ] && killall -TERM fio; i=$((i + 1)); [ $i -lt 900 ] || exit 1; sleep 0.1"
        self.shell.run(f"i=0; until [ -e /run/fio/ended ]; do {asking}; done", 240)
        self.shell.run("cd /run/fio && tar cf - result words *.log | gzip -1 >/run/all.gz && cat /run/all.gz >/dev/virtio-ports/rig.out", 240)
        size = int(self.shell.run("wc -c </run/all.gz"))
        for _ in range(200):
            if os.path.getsize(self.places["out"]) >= size:
                break
            time.sleep(0.05)
        with gzip.open(self.places["out"]) as packed:
            return tarfile.open(fileobj=io.BytesIO(packed.read()))

    def calibrate(self):
        """Half of what the guest does when nobody holds it back, of each of the three at the same time."""
        self.start()
        self.begin_load(1, None)
        watch = Watch(self.places["watch"])
        watch.wait_for_writes()
        watch.qmp.socket.close()
        time.sleep(1)
        offset = self.clock()
        begin = time.time()
        time.sleep(5)
        end = time.time()
        logs = read_logs(self.end_load())
        self.rates = []
        for job in ("mix", "log", "pages"):
            count = sum(begin * 1e3 + offset <= row[0] < end * 1e3 + offset for row in logs[job])
            self.rates.append(max(4, int(count / (end - begin) / 2)))

    def measure(self, run, setting, held):
        options = self.options
        tool = TOOLS[setting](self, setting)
        began = time.time()
        self.start(tool.libvirt)
        up = time.time()
        tool.base()
        based = time.time()
        self.shell.put("/run/fio/day", day_job(options, run))
        self.shell.run("fio --output=/run/fio/day.out /run/fio/day", options.patience)
        # The disks' copies, and what the guest has written so far: what the kernel still writes out would be felt later.
        os.sync()
        self.target.limit(options.hold if held else 0)
        self.begin_load(run + 1000, self.rates)
        self.log.write(f"s: boot {up - began:.1f}, base {based - up:.1f}, changes {time.time() - based:.1f}\n")
        watch = Watch(self.places["watch"])
        watch.wait_for_writes()
        time.sleep(1)
        offset, start = self.clock(), time.time()
        read = self.read_by_tool(watch)
        written = self.target.written()
        before_load = stolen()
        watch.start()
        due = start + options.seconds
        # A whole second, for tools that are told when.
        due = float(int(due + 1))
        tool.ahead(due)
        before = self.target.written()
        own = tool.increment()
        done = time.time()
        time.sleep(max(0, due + options.after - done))
        end = max(done, due + options.after)
        stopped = watch.stop()
        taken, all_of_it = (now - then for now, then in zip(stolen(), before_load))
        drift = abs(self.clock() - offset)
        row = {"stolen": taken / max(1, all_of_it), "window_ms": 0, "held_ms": 0, "done_ms": (done - due) * 1e3 if setting != "none" else 0, **own}
        if watch.error:
            raise Failed(f"QEMU's monitor: {watch.error}")
        if watch.last:
            row.update(window_ms=(watch.last - due) * 1e3, held_ms=(watch.last - watch.first) * 1e3)
        elif setting != "none":
            row["window_ms"] = row["done_ms"]
        self.target.flush()
        after = self.target.written()
        row.update(copied_mib=(after - before) / MIB, written_mib=(after - written) / MIB)
        row["read_mib"] = (self.read_by_tool(watch) - read) / MIB
        self.target.limit(0)
        logs = read_logs(self.end_load())
        for phase, begin, until in (("ahead", start, due), ("window", due, end)):
            figures = guest_figures(logs, begin * 1e3 + offset, until * 1e3 + offset)
            row.update({f"{phase}_{name}": value for name, value in figures.items()})
        # A guest that is stopped does not see it: its clock stands still.
        row["window_stall"] = max(row["window_stall"], stopped)
        if drift > 50:
            self.log.write(f"the guest's clock went {drift:.0f} ms apart\n")
        return row

    def read_by_tool(self, watch):
        """What QEMU has read from its images but not for the guest."""
        with open(f"/proc/{self.qemu}/io") as file:
            fields = dict(line.split(": ") for line in file.read().splitlines())
        return int(fields["rchar"]) - sum(watch.guest("rd_bytes"))


def append(path, row):
    fresh = not os.path.exists(path) or not os.path.getsize(path)
    with open(path, "a") as table:
        if fresh:
            table.write("\t".join(COLUMNS) + "\n")
        words = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in (row.get(name, "") for name in COLUMNS))
        table.write("\t".join(re.sub(r"\s+", " ", word) for word in words) + "\n")


def continued(path):
    """A table that was cut off, or is to have more runs, goes on with its next run and the load that it has."""
    if not os.path.exists(path):
        return 1, ""
    with open(path) as file:
        table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = list(table)
    if rows and table.fieldnames != COLUMNS:
        sys.exit(f"{path} has other columns than this version writes: name another table")
    return max([0] + [int(row["run"]) for row in rows]) + 1, rows[-1]["rate"] if rows else ""


def measure_all(bench, options):
    def say(words):
        print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)

    first, rates = continued(options.table)
    rates = options.rates or rates
    if rates:
        bench.rates = [int(rate) for rate in rates.split(",")]
    else:
        bench.calibrate()
    say("I/Os a second of mix, log, pages: " + ",".join(map(str, bench.rates)))
    # Beside each other is what is compared: the machine is not the same for long.
    settings = options.settings.split(",")
    pair = [setting for setting in settings if setting in PAIR]
    # Two that are measured next to each other, whoever begins.
    twos = [[(setting, held) for setting in pair] for held in (False, True)]
    twos += [[(setting, held) for held in (False, True)] for setting in settings if setting not in PAIR]
    for run in range(first, first + options.runs):
        # Each run begins with another one: what drifts over time hurts none more than the others.
        turn = (run - 1) % len(twos)
        order = [two if (at + run) % 2 else two[::-1] for at, two in enumerate(twos)]
        for setting, held in sum(order[turn:] + order[:turn], []):
            target = f"held to {options.hold}" if held else "free"
            # A tool that fails under the load is tried again; each failure is in the table.
            for _ in range(ATTEMPTS):
                if measured(bench, run, setting, held, target, say):
                    break


def measured(bench, run, setting, held, target, say):
    row = {"run": run, "setting": setting, "target": target, "status": "ok", "load": os.getloadavg()[0]}
    row["rate"], began = ",".join(map(str, bench.rates)), time.time()
    bench.log.write(f"--- run {run} {setting} {target}\n")
    try:
        row.update(bench.measure(run, setting, held))
        told = "window {:.0f} ms, copied {:.0f} MiB, p99 of writes {:.1f} ms ahead, {:.1f} when due".format(
            row["window_ms"], row["copied_mib"], row["ahead_write_p99"], row["window_write_p99"])
    except (Failed, OSError, ValueError, KeyError, IndexError, EOFError) as error:
        told = f"{type(error).__name__}: {error}"
        row.update(status="failed", reason=told)
    append(bench.options.table, row)
    say(f"run {run}, {setting}, target {target}, {time.time() - began:.0f} s: {told}")
    return row["status"] == "ok"


def main():
    parser = argparse.ArgumentParser()
    for name in ("dir", "target", "monitor", "loop", "template", "table", "log", "forerun"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--qmpbackup", default="")
    parser.add_argument("--user", default="root")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--rates", default="")
    for name, default in (("runs", 10), ("seconds", 45), ("after", 10), ("changes", 64), ("hold", 50), ("patience", 600)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    bench = Bench(options, json.loads(input()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        measure_all(bench, options)
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
