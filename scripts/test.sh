#!/usr/bin/env bash
# The one gate: everything that must hold before a change goes in. CI runs exactly this.
#
#   scripts/test.sh          all of it
#
# Installs what is missing (Debian 12 or 13, Ubuntu; as root or with sudo), then: format, lints, documentation, shell
# scripts, every test, and freezes under concurrent writers, each point checked for being one instant. A test that cannot
# run here is a failure. Guests run under TCG: KVM is not needed.
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=scripts/lib/packages.sh
. scripts/lib/packages.sh

# Measurements, makers of golden files and plots, and what replays a history, run by hand.
BENCHES='^(image::speed::[a-z]+|against_(nbdcopy|hashing_alone)|figures|increments|metadata_of_data|a_second_vm|marking(_many_points)?|twenty_guests_share_one_host|make(_encrypted)?|replay|plots)$'
LOG=target/test.log
CORES=$(nproc)

begun=$SECONDS
step() { printf '\n== %s  (%d s)\n' "$*" $((SECONDS - begun)); }
fail() {
	printf '\nFAILED: %s\n' "$*" >&2
	exit 1
}

step "packages"
need_packages rust-check qemu guest test libvirt || fail "packages are missing"
for tool in cargo qemu-system-x86_64 qemu-img qemu-storage-daemon nbdcopy fio shellcheck; do
	command -v "$tool" >/dev/null || fail "$tool is not there"
done

step "format"
cargo fmt --all --check

step "lints"
cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
# Without libvirt it must build, too.
cargo clippy --quiet --locked --no-default-features -- -D warnings
cargo clippy --quiet --locked --workspace --all-targets --features fault-injection -- -D warnings

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --quiet --locked --workspace --no-deps --document-private-items

step "shell scripts"
shellcheck -x scripts/*.sh scripts/lib/*.sh .ci/run

step "tests"
mkdir -p target
# At most one guest a core: a guest that is starved of CPU by others tests nothing but patience.
if ! cargo test --locked --workspace --features fault-injection -- --test-threads "$CORES" --show-output 2>&1 |
	tee "$LOG" | grep --line-buffered -E '^(test |error|     Running|   Doc-tests)'; then
	sed -n '/^error/,$p; /^failures:/,/^test result/p' "$LOG" | tail -n 200
	fail "tests; all their words are in $LOG"
fi
grep -q '^test result: ok' "$LOG" || fail "no test ran"
if grep -nE '(^|[^A-Za-z])SKIP' "$LOG"; then fail "a test did not run"; fi
ignored=$(sed -n 's/^test \(.*\) \.\.\. ignored.*/\1/p' "$LOG" | grep -vE "$BENCHES" || true)
[ -z "$ignored" ] || fail "ignored tests that are no benches: $ignored"

step "freezes under concurrent writers"
# Points are checked here, on a machine that is busy with making them.
export FORERUN_NO_LOAD_CONTROL=1
cargo build --quiet --locked --workspace --bins --features fault-injection
# The rig's own freezer proves the rig, the product's points prove the product. Half of the product's points follow a live
# pass. Writers through exports need the VM's NBD server, so there the rig freezes itself.
target/debug/rig freeze-exact --via guest --starve no,yes --iothreads yes --points 8
target/debug/rig freeze-exact --via exports --starve no --run 4 --rate 500 --points 8
target/debug/rig freeze-exact --via guest --starve no --points 8 --with-forerun target/debug/forerun

printf '\nOK: everything passed in %d s\n' $((SECONDS - begun))
