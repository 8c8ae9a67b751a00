#!/usr/bin/env bash
# Measures a guest under load in four settings, in turn: no backup, forerun (ahead of schedule, then when it is due),
# virtnbdbackup's increment and qmpbackup's; each with the backup's target free and held to a speed.
#
#   scripts/bench-guest.sh [-n RUNS] [-t SECONDS] [-w SECONDS] [-s MIB] [-c MIB] [-l MIB] [-S SETTING,...] [-i RATES]
#                          [-b BINARY] [-q DIR] [-d DIRECTORY] [-o TSV]
#   scripts/bench-guest.sh -r TSV
#
#   -n   runs, beside those that the table has; each is all settings with both targets (10)
#   -t   seconds of load before the backup is due (45)
#   -w   seconds of load from then on, at least (10)
#   -s   size of the first disk, MiB, all of it random; the second has half of it (1024)
#   -c   what the guest writes between the base and the load, MiB (128)
#   -l   the target's speed when it is held, MiB/s (50)
#   -S   settings (none,forerun,virtnbdbackup,qmpbackup)
#   -i   I/Os a second of the mix, the log and the pages, for comparable runs (half of what the guest does when it is let)
#   -b   the forerun to measure (this tree's, built)
#   -q   a checkout of qmpbackup; without one it is not measured
#   -d   where all is put but the target's mount (a directory under /var/tmp)
#   -o   the table: a line for each measurement, so that what was cut off still counts (target/bench-guest.tsv). One that is
#        there goes on with its next run at the same load; give the same options. Beside it: TSV.log, what the tools said
#   -r   only tells what is in such a table
#
# `-n 2 -t 5 -w 5 -s 128 -c 16` is a short try of minutes. A word on what is measured:
#
# The guest is one libvirt domain under a libvirtd of its own: Debian's cloud kernel in TCG, one CPU, two
# qcow2 disks in iothreads, booted fresh for each measurement with the same disks and the same seeds. In it runs Debian's fio:
# on the first disk 70 % reads and 30 % writes of 4 to 16 KiB, O_DIRECT, four at a time, four of five of them in a twentieth
# of the disk; on the second what a database does: 8 KiB at the end of a log, each durable before the next (O_DSYNC), and
# 8 KiB pages, nine of ten in a twentieth. It is not PostgreSQL, which under emulation would measure the emulation. The guest
# never uses KVM: ratios tell something, the figures themselves little.
#
# The target is ext4 on a loop device on a file that qemu-storage-daemon serves (FUSE) through its throttle, for every
# tool. The file is in memory where that has room, as another device than the guest's disks would be. While it is held, at
# most 4 MiB of it are cached unwritten, or else the first hundreds of MiB would go to memory at any speed (Linux 6.2 and
# later; before it there is only a share of the memory, and a held target is felt late).
#
# qmpbackup gets the domain's own QEMU command line without libvirt: it makes names of nodes from names of nodes, and libvirt's
# become too long for QEMU. A tool that fails under the load is tried twice more; all failures are told.
#
# Needs root. Peers: virtnbdbackup is the distribution's package; qmpbackup's Python modules come from the machine's packages or
# are put under target/ by pip.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/packages.sh source-path=SCRIPTDIR/..
. scripts/lib/packages.sh

runs=10 seconds=45 after=10 size=1024 changes=128 hold=50 settings=none,forerun,virtnbdbackup,qmpbackup
rates="" binary="" qmpbackup="" place="" table=target/bench-guest.tsv tell=""
while getopts n:t:w:s:c:l:S:i:b:q:d:o:r: option; do
	case $option in
	n) runs=$OPTARG ;;
	t) seconds=$OPTARG ;;
	w) after=$OPTARG ;;
	s) size=$OPTARG ;;
	c) changes=$OPTARG ;;
	l) hold=$OPTARG ;;
	S) settings=$OPTARG ;;
	i) rates=$OPTARG ;;
	b) binary=$(realpath "$OPTARG") ;;
	q) qmpbackup=$(realpath "$OPTARG") ;;
	d) place=$OPTARG ;;
	o) table=$OPTARG ;;
	r) tell=$OPTARG ;;
	*) exit 2 ;;
	esac
done
if [ -n "$tell" ]; then exec /usr/bin/python3 rig/bench/summary.py "$tell"; fi
say() { printf '%s\n' "$*" >&2; }
if [ "$(id -u)" != 0 ]; then
	say "root is needed: for a libvirtd of its own and to mount the target"
	exit 2
fi
need_packages qemu guest test libvirt bench peers
if [ -z "$binary" ]; then
	need_packages rust-check
	cargo build --quiet --release --bin forerun
	binary="$PWD/target/release/forerun"
fi
cargo build --quiet -p forerun-rig --bin rig
rig="$PWD/target/debug/rig"
fetch_guest_fio target/guest/fio

# A short path: sockets are in it.
work=$(mktemp -d "${place:-/var/tmp}/fbg.XXXXXX")
chmod 755 "$work"
target=$work/target store="" run="" loop="" daemon="" domain="" measuring=""
# Ends in the reverse order of the beginning; each part may be missing.
cleanup() {
	if [ -n "$measuring" ]; then kill "$measuring" 2>/dev/null || true; wait "$measuring" || true; fi
	exec {to_domain}>&- || true
	if [ -n "$domain" ]; then wait "$domain" 2>/dev/null || true; fi
	if mountpoint -q "$target"; then umount "$target" || umount -l "$target" || true; fi
	if [ -n "$loop" ]; then losetup -d "$loop" || true; fi
	if [ -n "$daemon" ]; then kill "$daemon" 2>/dev/null || true; wait "$daemon" || true; fi
	rm -rf --one-file-system "$work" "$store" "$run"
}
exec {to_domain}>/dev/null
trap cleanup EXIT
trap 'exit 130' INT TERM

# --- the target ---

# All of base and increments, plain.
mib=$((size * 3 + 1024))
store=$work
if [ "$(df --output=avail -m /dev/shm | tail -1)" -gt $((mib * 2)) ]; then
	store=$(mktemp -d /dev/shm/fbg.XXXXXX)
fi
truncate -s "${mib}M" "$store/store"
: >"$work/served"
qemu-storage-daemon --object throttle-group,id=limit \
	--blockdev "driver=file,node-name=file,filename=$store/store" \
	--blockdev driver=throttle,node-name=held,throttle-group=limit,file=file \
	--export "type=fuse,id=served,node-name=held,mountpoint=$work/served,writable=on,allow-other=off" \
	--chardev "socket,id=monitor,path=$work/monitor.sock,server=on,wait=off" --monitor chardev=monitor \
	>"$work/daemon.log" 2>&1 &
daemon=$!
for _ in $(seq 200); do
	if [ -s "$work/served" ]; then break; fi
	sleep 0.05
done
loop=$(losetup --find --show "$work/served")
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 -O ^has_journal "$loop"
mkdir "$target"
mount "$loop" "$target"
chmod 777 "$target"

# --- qmpbackup ---

# It makes files that QEMU opens, so it runs as QEMU's user, from a place where that one may read.
user=root
if id -u libvirt-qemu >/dev/null 2>&1; then user="libvirt-qemu"; fi
if [ -n "$qmpbackup" ]; then
	cp -r "$qmpbackup" "$work/qmpbackup"
	if ! /usr/bin/python3 -c 'import colorlog, qemu.qmp' 2>/dev/null; then
		if ! [ -e target/bench-peers/qemu ]; then
			/usr/bin/python3 -m pip -q install --target target/bench-peers qemu.qmp colorlog >&2
		fi
		cp -r target/bench-peers/. "$work/qmpbackup/"
	fi
	qmpbackup=$work/qmpbackup
fi

# --- the guest ---

say "making disks of $size and $((size / 2)) MiB"
mkdir "$work/template" "$work/vm"
for disk in vda vdb; do
	if [ $disk = vda ]; then mib=$size; else mib=$((size / 2)); fi
	openssl enc -aes-256-ctr -nosalt -pbkdf2 -pass "pass:$disk" </dev/zero 2>/dev/null | head -c "${mib}M" >"$work/raw" || true
	qemu-img convert -f raw -O qcow2 "$work/raw" "$work/template/$disk.qcow2"
done
rm "$work/raw"

# As on every host /run/libvirt is in memory: at each command libvirt writes and syncs a domain's state there.
run=$(mktemp -d /dev/shm/fbg.XXXXXX)
chmod 755 "$run"
mkdir "$work/vm/lv"
ln -s "$run" "$work/vm/lv/run"

mkfifo "$work/hold"
"$rig" bench-domain --dir "$work/vm" --tree target/guest/fio/root --disk-mib "$size" <"$work/hold" >"$work/places" 2>"$work/rig.log" &
domain=$!
exec {to_domain}>"$work/hold"
until [ -s "$work/places" ]; do
	if ! kill -0 "$domain" 2>/dev/null; then
		say "the domain could not be defined: $(cat "$work/places" "$work/rig.log")"
		exit 1
	fi
	sleep 0.1
done

# --- measuring ---

version() { dpkg-query -W -f='${Package} ${Version}\n' "$1" 2>/dev/null || true; }
{
	printf '%s\n' "$("$binary" --version)" "$(version qemu-system-x86)" "$(version libvirt-daemon)" "$(version virtnbdbackup)"
	if [ -n "$qmpbackup" ]; then
		printf 'qmpbackup %s\n' "$(sed -n 's/^VERSION = "\(.*\)"/\1/p' "$qmpbackup/libqmpbackup/version.py")"
	fi
	printf '%s CPUs, Linux %s, load %s; runs of %s + %s s, disks %s + %s MiB, changes %s MiB, held to %s MiB/s, target in %s\n' \
		"$(nproc)" "$(uname -r)" "$(cut -d' ' -f1-3 /proc/loadavg)" "$seconds" "$after" "$size" $((size / 2)) "$changes" "$hold" "$(dirname "$store")"
} | sed 's/^/# /' | tee "$table.about" >&2
status=0
/usr/bin/python3 rig/bench/guest.py --dir "$work" --target "$target" --monitor "$work/monitor.sock" --loop "$loop" \
	--template "$work/template" --table "$table" --log "$table.log" --forerun "$binary" --qmpbackup "$qmpbackup" \
	--user "$user" --settings "$settings" --rates "$rates" --runs "$runs" --seconds "$seconds" --after "$after" \
	--changes "$changes" --hold "$hold" <"$work/places" >&2 &
measuring=$!
# In the background, so that a signal is heard at once.
wait "$measuring" || status=$?
measuring=""
cat "$table.about"
/usr/bin/python3 rig/bench/summary.py "$table"
[ $status -eq 0 ]
