#!/usr/bin/env bash
# Measures the repository at sizes that no test has, and says what that makes of 100 TiB. Ids are generated; there are no blocks.
# Then: how fast a prune marks, what increments and a second VM add, how fast it is verified and restored beside hashing and
# unpacking alone, and the codecs, plain and encrypted.
#
#   scripts/bench-repo.sh [-s ENTRIES[,ENTRIES...]] [-d DIRECTORY] [-o FILE] [FIGURE...]
#
#   -s   sizes of the index in entries, ascending (2000000,5000000,10000000); the disk needs 110 bytes for each of the largest
#   -d   where everything is put; removed at the end (a directory under /var/tmp)
#   -o   also keep the figures as lines of `entries <tab> figure <tab> value` in this file
#
# A figure is a test of src/image/speed.rs, each in a process of its own: build lookups publish sweep rewrite, or one of the
# measurements under tests/: gc_speed repo_growth repo_speed image_speed (all). The first makes the index that the next four use. The last column is 1.6 billion entries, which is 100 TiB in blocks of 64 KiB: what takes time or
# room for each entry, in proportion to the largest size; memory, along the line through the smallest and the largest size.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/packages.sh source-path=SCRIPTDIR/..
. scripts/lib/packages.sh

sizes=2000000,5000000,10000000 place="" keep=""
while getopts s:d:o: option; do
	case $option in
	s) sizes=$OPTARG ;;
	d) place=$OPTARG ;;
	o) keep=$OPTARG ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
if [ $# -eq 0 ]; then
	set -- build lookups publish sweep rewrite gc_speed repo_growth repo_speed image_speed
fi
figures=() others=()
for figure in "$@"; do
	case $figure in
	*_*) others+=("$figure") ;;
	*) figures+=("$figure") ;;
	esac
done

need_packages rust-check
say() { printf '%s\n' "$*" >&2; }
say "building"
# Its own words are told only when it fails.
cargo test --quiet --release --lib --no-run
program=$(cargo test --release --lib --no-run 2>&1 | sed -n 's/.*unittests src\/lib.rs (\(.*\))$/\1/p')

work=$(mktemp -d "${place:-/var/tmp}/forerun-bench-repo.XXXXXX")
cleanup() { rm -rf "$work"; }
trap cleanup EXIT
trap 'exit 130' INT TERM

IFS=, read -ra sizes <<<"$sizes"
if [ ${#figures[@]} -eq 0 ]; then sizes=(); fi
: >"$work/figures"
for entries in "${sizes[@]}"; do
	export FORERUN_BENCH_DIR="$work/$entries" FORERUN_BENCH_ENTRIES=$entries FORERUN_BENCH_OUT="$work/out"
	mkdir "$FORERUN_BENCH_DIR"
	for figure in "${figures[@]}"; do
		say "$figure of $entries entries"
		: >"$FORERUN_BENCH_OUT"
		if ! "$program" --ignored --exact "image::speed::$figure" >"$work/words" 2>&1 || ! [ -s "$FORERUN_BENCH_OUT" ]; then
			say "$figure failed: $(cat "$work/words")"
			exit 1
		fi
		sed "s/^/$entries\t/" "$FORERUN_BENCH_OUT" >>"$work/figures"
	done
	rm -rf "$FORERUN_BENCH_DIR"
done
if [ -n "$keep" ]; then cp "$work/figures" "$keep"; fi

printf '%s CPUs; %s; %s MiB of memory; load %s\n' "$(nproc)" "$(stat -f -c %T "$work")" \
	"$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)" "$(cut -d' ' -f1-3 /proc/loadavg)"
if [ -s "$work/figures" ]; then awk -F'\t' '
	!($1 in known) { known[$1]; size[++sizes] = $1 }
	!($2 in row) { row[$2]; name[++rows] = $2 }
	{ value[$1, $2] = $3 }
	function show(x) { return x >= 100 ? sprintf("%.0f", x) : x >= 10 ? sprintf("%.1f", x) : sprintf("%.2f", x) }
	END {
		goal = 1.6e9; least = size[1]; most = size[sizes]
		printf "%-34s", "entries"
		for (s = 1; s <= sizes; s++) printf "%14s", size[s]
		printf "%16s\n", "1600000000"
		for (r = 1; r <= rows; r++) {
			figure = name[r]; last = value[most, figure]; guess = "-"
			if (figure ~ /MiB$/ && sizes > 1) {
				slope = (last - value[least, figure]) / (most - least)
				guess = show(last + (slope > 0 ? slope : 0) * (goal - most))
			} else if (figure ~ /, (s|GiB)$/ || figure == "parts") guess = show(last * goal / most)
			printf "%-34s", figure
			for (s = 1; s <= sizes; s++) printf "%14s", show(value[size[s], figure])
			printf "%16s\n", guess
		}
	}' "$work/figures"; fi

export TMPDIR="$work"
for figure in ${others[@]+"${others[@]}"}; do
	say "$figure"
	printf '\n%s\n' "$figure"
	if ! cargo test --quiet --release --test "$figure" -- --ignored --nocapture --test-threads 1 >"$work/words" 2>&1; then
		say "$figure failed: $(cat "$work/words")"
		exit 1
	fi
	grep -Ev '^(running|test |$)|^\.+$' "$work/words"
done
