#!/bin/bash
# Fuzzes every parser of bytes that come from elsewhere: repository objects, an NBD server's and a QEMU's answers.
# Leaks are not looked for: threads that are just ending look like some.
# Needs a nightly compiler and cargo-fuzz (cargo install cargo-fuzz); a crash, a hang of 10 s or an allocation of 256 MiB ends it.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"

usage() {
    echo "usage: scripts/fuzz.sh [-t SECONDS a target, 600] [TARGET...]"
    exit 2
}
seconds=600
while getopts t:h option; do
    case $option in
        t) seconds=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))

cargo +nightly fuzz --version > /dev/null 2>&1 || {
    echo "cargo-fuzz or a nightly compiler is missing: rustup toolchain install nightly && cargo install cargo-fuzz" >&2
    exit 1
}
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    mapfile -t targets < <(cargo +nightly fuzz list)
fi
for target in "${targets[@]}"; do
    echo "== $target, $seconds s"
    log=target/$target.log
    if ! cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
        -malloc_limit_mb=256 -detect_leaks=0 -print_final_stats=1 > "$log" 2>&1; then
        tail -40 "$log" >&2
        echo "$target failed: the input is under fuzz/artifacts/$target" >&2
        exit 1
    fi
    grep '^stat::' "$log"
done
