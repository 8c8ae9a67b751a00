#!/usr/bin/env bash
# Measures the main job beside qemu-img and nbdcopy on the same disk, in the same run, in turn.
#
#   scripts/bench.sh [-s GIB] [-n RUNS] [-r MIB] [-d DIRECTORY] [-b BINARY]... [-k]
#
#   -s   size of the disk, GiB, half of it full (4)
#   -n   runs; every figure is the median of them, with the least and the most (5)
#   -r   the residual that the freeze is to find, MiB (256)
#   -d   where everything is put, all on one file system; removed at the end (a directory under /var/tmp)
#   -b   a forerun to measure instead of building this tree's; more than one are measured in turn, for before and after
#   -k   measure only forerun, not qemu-img and nbdcopy
#
# The disk is a qcow2 image with 64 KiB clusters in a QEMU without a guest (`-S`, tcg), virtio-blk, cache=writeback.
# Its content is made from this machine's files, in a fixed order: text (sources, documents), binaries (libraries, programs)
# and random bytes (a fixed key stream), a third each, in pieces of 32 MiB with as much of nothing between them. It is read
# once before the first run: the page cache is warm, as far as it holds.
#
# A run is, for each binary: first copy into a fresh repository; empty increment; restore to a raw file; 4 KiB written to each
# of 5 % of the disk's blocks, scattered over the full part, then an increment; a backup under writes, so that the freeze
# finds a residual of single blocks. forerun makes all that it writes durable. qemu-img does not, so its
# time is told twice: as it ends, and with its output made durable too.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/packages.sh source-path=SCRIPTDIR/..
. scripts/lib/packages.sh

size=4 runs=5 residual=256 place="" others=1 binaries=()
while getopts s:n:r:d:b:k option; do
	case $option in
	s) size=$OPTARG ;;
	n) runs=$OPTARG ;;
	r) residual=$OPTARG ;;
	d) place=$OPTARG ;;
	b) binaries+=("$(realpath "$OPTARG")") ;;
	k) others=0 ;;
	*) exit 2 ;;
	esac
done
need_packages qemu test bench libvirt
if [ ${#binaries[@]} -eq 0 ]; then
	need_packages rust-check
	cargo build --quiet --release --bin forerun
	binaries=("$PWD/target/release/forerun")
fi

work=$(mktemp -d "${place:-/var/tmp}/forerun-bench.XXXXXX")
qemu=""
cleanup() {
	if [ -n "$qemu" ]; then kill "$qemu" 2>/dev/null || true; fi
	wait 2>/dev/null || true
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
say() { printf '%s\n' "$*" >&2; }

# --- the disk ---

piece=$((32 << 20))
pieces=$((size * 1024 / 64))
full_blocks=$((pieces * piece / 65536))

# A stream of files of one kind, over and over: the second round is not aligned as the first, so no block comes twice.
stream() {
	local kind=$1
	case $kind in
	random) openssl enc -aes-256-ctr -nosalt -pbkdf2 -pass pass:forerun </dev/zero 2>/dev/null || true ;;
	text)
		while :; do
			{ find -L /usr/share /usr/include /usr/lib -type f -size +0 \( -name '*.[chms]' -o -name '*.py' -o -name '*.p[lm]' \
				-o -name '*.txt' -o -name '*.html' -o -name '*.xml' -o -name '*.js*' -o -name '*.md' -o -name '*.hpp' \
				-o -name '*.sh' -o -name '*.rs' -o -name '*.css' -o -name copyright \) -print0 2>/dev/null || true; } |
				sort -zu | xargs -0 cat 2>/dev/null || break
			echo again
		done
		;;
	binary)
		while :; do
			{ find /usr/lib /usr/bin -type f -size +16k \( -name '*.so*' -o -perm -100 \) -print0 2>/dev/null || true; } |
				sort -z | xargs -0 cat 2>/dev/null || break
			echo again
		done
		;;
	esac
}

say "making a disk of $size GiB"
truncate -s "${size}G" "$work/disk.raw"
first=0
for kind in text binary random; do
	# Every third of the full pieces.
	count=$(((pieces - first + 2) / 3))
	at=$first
	stream "$kind" 2>/dev/null | head -c $((count * piece)) |
		while [ "$at" -lt "$pieces" ]; do
			dd of="$work/disk.raw" bs=1M count=32 iflag=fullblock oflag=seek_bytes seek=$((at * 2 * piece)) conv=notrunc status=none
			at=$((at + 3))
		done || true
	first=$((first + 1))
done
qemu-img convert -f raw -O qcow2 "$work/disk.raw" "$work/disk.qcow2"
rm "$work/disk.raw"
sync -f "$work"

# --- the VM ---

mkfifo "$work/monitor"
qemu-system-x86_64 -accel tcg -M q35 -m 64 -S -nodefaults -no-user-config -display none -name bench \
	-uuid 6f1c0c43-3d1a-4f6e-9d3e-2f52a5f0be57 \
	-blockdev "driver=qcow2,node-name=disk,file.driver=file,file.filename=$work/disk.qcow2" \
	-device virtio-blk-pci,id=vda,drive=disk \
	-qmp "unix:$work/qmp.sock,server=on,wait=off" -monitor stdio <"$work/monitor" >"$work/monitor.out" 2>&1 &
qemu=$!
exec 9>"$work/monitor"
for _ in $(seq 200); do
	[ -S "$work/qmp.sock" ] && break
	sleep 0.05
done
target="qmp:$work/qmp.sock"

# Sends the lines of stdin to the monitor as commands of qemu-io, flushes, and waits until all is done.
marks=0
guest_io() {
	marks=$((marks + 1))
	{
		{ cat && echo flush; } | sed 's|.*|qemu-io -d /machine/peripheral/vda/virtio-backend "&"|'
		echo "info mark$marks"
	} >&9
	until grep -aq "mark$marks'" "$work/monitor.out"; do sleep 0.01; done
	if grep -aq 'failed\|rror:' "$work/monitor.out"; then
		say "a write of the guest failed"
		exit 1
	fi
	: >"$work/monitor.out"
}

# --- measuring ---

declare -A figures
note() { figures[$1]+="$2 "; }
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.3f", b - a }'; }

# forerun LABEL FIGURE ARGUMENT...: notes seconds and peak memory, leaves the JSON document in $work/json.
forerun() {
	local label=$1 figure=$2 status=0
	shift 2
	/usr/bin/time -o "$work/time" -f '%e %M' "$binary" --json -q "$@" >"$work/json" 2>"$work/err" || status=$?
	if [ $status -ne 0 ] && [ $status -ne 3 ]; then
		say "$label: forerun $* ended with $status: $(cat "$work/err" "$work/json")"
		exit 1
	fi
	if [ "$figure" = - ]; then return 0; fi
	note "$label|$figure" "$(awk 'END { print $1 }' "$work/time")"
	note "$label|peak memory, $figure, MiB" "$(awk 'END { printf "%.1f", $2 / 1024 }' "$work/time")"
}

# of_point FIELD: a field of the point in the last document.
of_point() { jq ".targets[0].point.$1" "$work/json"; }

# other FIGURE OUTPUT COMMAND...: notes seconds until it ends, and until its output is durable.
other() {
	local figure=$1 output=$2 begin took
	shift 2
	sync -f "$work"
	begin=$(now)
	"$@" >/dev/null
	took=$(since "$begin")
	note "others|$figure" "$took"
	if [ -n "$output" ]; then
		sync "$output"
		note "others|$figure, durable" "$(since "$begin")"
		rm -f "$output"
	fi
}

scattered() { # COUNT BYTES PATTERN: so many writes, one to a block, scattered over the full part
	local count=$1 bytes=$2 pattern=$(($3 % 250 + 1)) step i n
	step=$((full_blocks / count))
	for ((i = 0; i < count; i++)); do
		n=$((i * step + (i * 7 + pattern) % step))
		# A full piece, an empty piece, and so on.
		echo "write -P $pattern $(((n / 512 * 512 + n) * 65536)) $bytes"
	done
}

one_run() {
	local run=$1 label=$2 repo="$work/repo" begin
	export FORERUN_STATE_DIR="$work/state"
	"$binary" init -q "$repo" >/dev/null
	sync -f "$work"
	forerun "$label" "first copy" backup "$target" --repo "$repo"
	forerun "$label" "empty increment" backup "$target" --repo "$repo"
	note "$label|freeze, ms" "$(of_point freeze_ms)"
	note "$label|empty increment: freeze to released, ms" "$(of_point released_ms)"
	sync -f "$work"
	forerun "$label" "restore to raw" restore --repo "$repo" "$target@latest" --disk "vda=$work/restored.raw"
	if [ "$run" = 1 ] && ! qemu-img compare -q -U -f raw -F qcow2 "$work/restored.raw" "$work/disk.qcow2"; then
		say "$label: the restored disk differs"
		exit 1
	fi
	rm -f "$work/restored.raw"
	scattered $((size * 16384 / 20)) 4096 $((++round)) >"$work/writes"
	guest_io <"$work/writes"
	sync -f "$work"
	forerun "$label" "increment of 5 %" backup "$target" --repo "$repo"
	# A live pass whose blocks are all written again while it runs does not shrink what is left: the freeze finds them.
	scattered $((residual * 16)) 512 $((++round)) >"$work/writes"
	guest_io <"$work/writes"
	sync -f "$work"
	{
		sleep 0.7
		sed 's|.*|qemu-io -d /machine/peripheral/vda/virtio-backend "&"|' "$work/writes" >&9
	} &
	local writer=$!
	forerun "$label" - backup "$target" --repo "$repo" --rate $((residual / 4))MiB/s
	wait $writer
	note "$label|residual, MiB" "$(of_point bytes.residual | awk '{ printf "%.0f", $1 / 1048576 }')"
	note "$label|residual: freeze, ms" "$(of_point freeze_ms)"
	note "$label|residual: freeze to released, ms" "$(of_point released_ms)"
	note "$label|peak memory, residual, MiB" "$(awk 'END { printf "%.1f", $2 / 1024 }' "$work/time")"
	echo flush | guest_io
	forerun "$label" - untrack "$target" --repo "$repo"
	rm -rf "$repo"
}

round=0
others_run() {
	local image="driver=qcow2,force-share=on,file.driver=file,file.filename=$work/disk.qcow2,file.locking=off"
	other "convert to qcow2" "$work/plain.qcow2" qemu-img convert -U -f qcow2 -O qcow2 "$work/disk.qcow2" "$work/plain.qcow2"
	other "convert -c (zstd)" "$work/zstd.qcow2" qemu-img convert -U -c -f qcow2 -O qcow2 -o compression_type=zstd \
		"$work/disk.qcow2" "$work/zstd.qcow2"
	other "nbdcopy to null" "" nbdcopy -- '[' qemu-nbd -r --image-opts "$image" ']' null:
}

cat "$work/disk.qcow2" >/dev/null
for ((run = 1; run <= runs; run++)); do
	say "run $run of $runs"
	if [ $others = 1 ]; then others_run; fi
	for binary in "${binaries[@]}"; do one_run "$run" "$binary"; done
done

# --- telling ---

# The median, the least and the most of numbers.
spread() {
	tr ' ' '\n' | grep . | sort -g |
		awk '{ v[NR] = $1 } END { m = NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2; printf "%.6g %.6g %.6g\n", m, v[1], v[NR] }'
}
median() { spread <<<"${figures[$1]}" | cut -d' ' -f1; }

printf '%s GiB, half full, a third each text, binaries, random; %s runs; %s CPUs; %s; load %s\n' \
	"$size" "$runs" "$(nproc)" "$(stat -f -c %T "$work")" "$(cut -d' ' -f1-3 /proc/loadavg)"
printf '%s blocks of 64 KiB; page cache warm; median (least - most); seconds where nothing else is said\n' $((size * 16384))
shown=""
while IFS= read -r name; do
	if [ "$shown" != "${name%%|*}" ]; then printf '\n%s\n' "${name%%|*}"; fi
	shown=${name%%|*}
	read -r middle least most < <(spread <<<"${figures[$name]}")
	printf '  %-48s %10s  (%s - %s)\n' "${name#*|}" "$middle" "$least" "$most"
done < <(printf '%s\n' "${!figures[@]}" | sort)
if [ $others = 1 ]; then
	printf '\nratios of medians, the first copy\n'
	for binary in "${binaries[@]}"; do
		copy=$(median "$binary|first copy")
		for figure in "convert to qcow2" "convert to qcow2, durable" "convert -c (zstd)" "convert -c (zstd), durable" "nbdcopy to null"; do
			awk -v a="$(median "others|$figure")" -v b="$copy" -v n="$figure" -v l="${binary##*/}" \
				'BEGIN { printf "  %-12s takes %5.2f of the time of %s (%.2f times as fast)\n", l, b / a, n, a / b }'
		done
	done
fi
