#!/usr/bin/env bash
# The main job on a real VM, from nothing: a Linux guest that writes to two disks all the time is copied ahead, backed up
# twice, restored, and each restored pair is proved to be the guest's disks at one instant.
#
#   scripts/demo.sh          a few minutes after the build; --keep leaves the directory for a look
#
# Installs what is missing (Debian 12 or 13, Ubuntu; as root or with sudo). KVM is not needed. Everything is in one
# temporary directory, and only processes that were started here are ended. Exits 0 only when all of it was right.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"

# shellcheck source=scripts/lib/packages.sh
. scripts/lib/packages.sh

KEEP=no
[ "${1:-}" != --keep ] || KEEP=yes
DIR=""
RIG_PID=""

bold() { if [ -t 1 ]; then printf '\n\033[1m%s\033[0m\n' "$*"; else printf '\n%s\n' "$*"; fi; }
note() { printf '%s\n' "$*" | fold -s -w 100 | sed "s, *\$,,"; }
fail() {
	printf '\nFAILED: %s\n' "$*" >&2
	exit 1
}

# Ends the guest that is running: its QEMU is the one child of the rig, and the rig is a child of this script.
stop_guest() {
	[ -n "$RIG_PID" ] || return 0
	local child
	for child in $(cat "/proc/$RIG_PID/task/$RIG_PID/children" 2>/dev/null || true); do
		kill "$child" 2>/dev/null || true
	done
	# The rig ends with its QEMU; before it has one it is ended itself.
	[ -n "${child:-}" ] || kill "$RIG_PID" 2>/dev/null || true
	wait "$RIG_PID" 2>/dev/null || true
	RIG_PID=""
}

clean_up() {
	local status=$?
	trap - EXIT INT TERM HUP
	stop_guest
	if [ -n "$DIR" ]; then
		if [ "$KEEP" = yes ]; then printf '\nkept: %s\n' "$DIR"; else rm -rf "$DIR"; fi
	fi
	exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# start_guest DIRECTORY WORDS...: boots the demo's guest and waits until its program writes.
start_guest() {
	local dir=$1 deadline=$((SECONDS + 1200)) booting=no
	shift
	mkdir -p "$dir"
	"$RIG" demo-guest --dir "$PWD/$dir" --uuid 3f2c8a54-8f0e-4f2b-9a53-6d1c7e0b4d01 "$@" >"$dir/rig.log" 2>&1 &
	RIG_PID=$!
	until grep -qs '^stamp: seq' "$dir/serial-1.log"; do
		kill -0 "$RIG_PID" 2>/dev/null || fail "the guest did not start: $(cat "$dir/rig.log")"
		# What comes before the boot, the fetching of a kernel and a build, takes its time.
		if [ $booting = no ] && [ -e "$dir/serial-1.log" ]; then
			booting=yes deadline=$((SECONDS + 240))
		fi
		[ $SECONDS -lt $deadline ] || fail "the guest does not write: $(tail -n 5 "$dir"/*.log)"
		sleep 0.2
	done
}

# The number of the newest write that the guest has told of on its console.
writes() { sed -n 's/^stamp: seq \([0-9]*\).*/\1/p' "$1/serial-1.log" | tail -n 1; }

# Shows a command as one would type it, and runs it.
show() {
	printf '\n$ %s\n' "$*"
	"$@"
}
forerun() { "$FORERUN" "$@"; }
# Runs a backup, keeps its report, and shows it as people see it.
backup() {
	local report=$1
	shift
	printf '\n$ forerun backup %s\n' "$*"
	forerun backup "$@" --json >"$report" || {
		cat "$report"
		fail "the backup"
	}
	jq -r '.targets[0].point | "point \(.id) of \(.instant)\n  the VM was held for \(.freeze_ms) ms to take the snapshot, and was free of it \(.released_ms) ms later; \(.disks|length) disks, one instant"' "$report"
}
mib() { awk -v bytes="$1" 'BEGIN { printf "%.1f MiB", bytes / 1048576 }'; }

bold "0. What is needed: packages, the program, a guest"
need_packages rust-check qemu guest demo libvirt || fail "packages are missing"
# DEMO_BINARIES names a directory with programs that are built already.
BINARIES=${DEMO_BINARIES:-$ROOT/target/release}
[ -n "${DEMO_BINARIES:-}" ] || cargo build --quiet --locked --release --workspace --bins
FORERUN=$BINARIES/forerun
RIG=$BINARIES/rig
DIR=$(mktemp -d "${TMPDIR:-/tmp}/forerun-demo.XXXXXX")
cd "$DIR"
export FORERUN_STATE_DIR=$DIR/state FORERUN_REPO=repo
# A guest without KVM keeps the CPUs busy by itself: nobody would be spared by waiting for it.
export FORERUN_NO_LOAD_CONTROL=1
note "$("$FORERUN" --version), $(qemu-system-x86_64 --version | head -n 1)"
begun=$SECONDS

bold "1. A VM"
start_guest vm --fill 6000 --rate 40
note "A Linux guest runs with two disks, vda (qcow2) and vdb (raw), and writes 4 KiB at random places of them, one write after the other, each with its number: write $(writes vm) by now. It goes on writing to the end of this demo. So an image of the pair is good if and only if it holds exactly the writes 1 to N, for one N."

bold "2. A repository, and a look at the VM"
show forerun init repo
show forerun inspect qmp:vm/qmp.sock

bold "3. Copying ahead, hours before the backup is due"
note "No snapshot, no job: blocks are read live, and what the guest changes meanwhile is marked by QEMU's dirty bitmaps and copied again later. Between two batches nothing of forerun's is in the VM but a bitmap on each disk. (The raw disk has no place to keep one: it is followed while this QEMU runs.)"
show forerun precopy qmp:vm/qmp.sock
show forerun status qmp:vm/qmp.sock

bold "4. The backup is due: a fleecing snapshot"
note "What is left is what the guest wrote since. All disks are snapped in one QEMU transaction; the residual is spooled from the snapshot; the guest is let go; only then is it hashed, stored and published."
backup point1.json qmp:vm/qmp.sock --freeze fleece
first=$(jq -r '.targets[0].point.id' point1.json)

bold "5. The guest goes on, and so does copying ahead"
before=$(writes vm)
sleep 8
note "The guest is at write $(writes vm), $(($(writes vm) - before)) more. Only what these changed is copied:"
show forerun precopy qmp:vm/qmp.sock --once
sleep 3

bold "6. The next backup, with an external snapshot this time"
note "An overlay takes the guest's writes for a moment, and is committed back before the command ends."
backup point2.json qmp:vm/qmp.sock --freeze snapshot
second=$(jq -r '.targets[0].point.id' point2.json)
show forerun list

bold "7. Restore both, and check: is each pair the disks at one instant?"
for point in "$first" "$second"; do
	show forerun restore "$point" --output "restored-$point"
	printf '\n$ rig check-stamp restored-%s/vda.raw restored-%s/vdb.raw\n' "$point" "$point"
	"$RIG" check-stamp "restored-$point/vda.raw" "restored-$point/vdb.raw" | tee "check-$point" ||
		fail "point $point is not one instant"
	grep -q '^exact: after write [1-9]' "check-$point" || fail "point $point"
done
n1=$(sed 's/[^0-9]*//' "check-$first") n2=$(sed 's/[^0-9]*//' "check-$second")
[ "$n1" -lt "$n2" ] || fail "the second point is not newer than the first"
note "
The first point holds the writes 1 to $n1 and none of write $((n1 + 1)); the second 1 to $n2."

bold "8. Read and hash everything that is stored"
show forerun verify

bold "9. The VM is lost; boot what was restored"
stop_guest
show forerun restore "$second" --disk vda=vda.qcow2 --format qcow2
show forerun restore "$second" --disk vdb=vdb.raw
qemu-img check -q vda.qcow2 || fail "the restored qcow2 image"
start_guest again --vda "$PWD/vda.qcow2" --vdb "$PWD/vdb.raw" --rate 40
said=$(grep '^stamp: resume' again/serial-1.log | tr -d '\r')
note "
The guest's program looked at its disks and said: \"$said\"; it is at write $(writes again) already."
[ "$said" = "stamp: resume after seq $n2, repaired 0" ] || fail "the restored guest found other disks than the point's"
stop_guest

bold "10. What it cost"
printf '\n  %-10s %-10s %12s %12s %12s %12s %9s %12s %9s\n' point freeze "copied ahead" superseded residual stored "held" "free after" window
for report in point1.json point2.json; do
	jq -r '.targets[0].point | [.id[0:8], .freeze, .bytes.precopied, .bytes.superseded, .bytes.residual, .bytes.stored, .freeze_ms, .released_ms, .window_ms] | @tsv' "$report" |
		while IFS=$'\t' read -r id method ahead superseded residual stored freeze released window; do
			printf '  %-10s %-10s %12s %12s %12s %12s %6d ms %9d ms %7.1f s\n' "$id" "$method" "$(mib "$ahead")" "$(mib "$superseded")" \
				"$(mib "$residual")" "$(mib "$stored")" "$freeze" "$released" "$(awk -v ms="$window" 'BEGIN { print ms / 1000 }')"
		done
done
note "
copied ahead: read live, before the backup was due. superseded: of that, what the guest overwrote again. residual: read from the snapshot. held: the transaction. free after: from its start until nothing of the snapshot was in the VM. window: from when the backup was due until then."

bold "OK: two exact recovery points of a VM that never stopped writing ($((SECONDS - begun)) s)"
