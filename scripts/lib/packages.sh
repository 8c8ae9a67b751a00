# shellcheck shell=bash
# Installs what the tests need on Debian 12, Debian 13 and Ubuntu. Source it, then:
#
#   need_packages rust-check qemu guest test libvirt   # groups; quick when all is there; the demo needs `demo` too
#   fetch_guest_kernel DIR                     # DIR/vmlinuz and DIR/modules, never installed as a package
#   fetch_guest_agent DIR                      # DIR/root/... with qemu-ga and its libraries
#   fetch_guest_fio DIR                        # DIR/root/... with fio and its libraries
#   fetch_guest_system DIR                     # DIR/root.qcow2: a small system with systemd and qemu-ga
#
# Groups: rust-check (a compiler that is new enough), qemu (system emulator and image tools),
# guest (what a test guest is built from), test (load and check tools), demo (to read reports), bench (what measures), peers (other tools to measure beside),
# libvirt (its development files, for every build with the feature `libvirt`, and a daemon for its tests).
#
# Debian 12's own QEMU (7.2) cannot be mixed with image tools from backports, so on Debian 12 both come from
# backports, and libvirt with them. The archive's host is taken from the machine's own package sources: a mirror stays a mirror.

PACKAGES_RUST_MIN="1.88"

packages_say() { printf 'packages: %s\n' "$*" >&2; }

packages_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo -n "$@"
	else
		packages_say "this step needs root: $*"
		return 1
	fi
}

packages_installed() { [ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$1" 2>/dev/null)" = "ii " ]; }

# The first archive URI of the machine's own sources, in either format of apt.
packages_archive_uri() {
	local uri
	uri=$(sed -n 's/^URIs:[[:space:]]*\([^[:space:]]*\).*/\1/p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -n 1)
	if [ -z "$uri" ]; then
		uri=$(sed -n 's/^deb[[:space:]]\{1,\}\(\[[^]]*\][[:space:]]*\)\{0,1\}\([^[:space:]]*\).*/\2/p' \
			/etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | head -n 1)
	fi
	[ -n "$uri" ] && printf '%s\n' "$uri"
}

packages_codename() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release; }

packages_apt() {
	packages_root env DEBIAN_FRONTEND=noninteractive \
		apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@" >&2
}

# Makes the backports of Debian 12 known to apt, once.
packages_backports() {
	local uri keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	if apt-cache policy | grep -q 'n=bookworm-backports'; then return 0; fi
	uri=$(packages_archive_uri) || {
		packages_say "no Debian archive in /etc/apt; add bookworm-backports by hand"
		return 1
	}
	printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: %s\n' "$uri" "$keyring" |
		packages_root tee /etc/apt/sources.list.d/forerun-backports.sources >/dev/null || return 1
	packages_apt update
}

# Installs the given packages, those of QEMU from backports on Debian 12.
packages_install() {
	local missing=() stock=() backports=() libvirt=() package
	for package in "$@"; do
		packages_installed "$package" || missing+=("$package")
	done
	[ ${#missing[@]} -eq 0 ] && return 0
	packages_say "installing ${missing[*]}"
	for package in "${missing[@]}"; do
		case "$(packages_codename):$package" in
		bookworm:qemu-system-* | bookworm:qemu-utils | bookworm:qemu-block-extra) backports+=("$package") ;;
		# One version of all of them; by name, so that what they depend on stays of the release where it can.
		bookworm:libvirt*) libvirt+=("$package/bookworm-backports") ;;
		*) stock+=("$package") ;;
		esac
	done
	packages_apt update || packages_say "apt-get update failed; trying with the lists at hand"
	if [ ${#backports[@]} -gt 0 ]; then
		packages_backports || return 1
		# Both at once: the emulator and the image tools share libraries of one version.
		packages_apt install -y --no-install-recommends -t bookworm-backports qemu-system-x86 qemu-utils || return 1
	fi
	if [ ${#libvirt[@]} -gt 0 ]; then
		packages_backports || return 1
		packages_apt install -y --no-install-recommends "${libvirt[@]}" || return 1
	fi
	if [ ${#stock[@]} -gt 0 ]; then
		packages_apt install -y --no-install-recommends "${stock[@]}" || return 1
	fi
}

packages_rust_check() {
	local have
	have=$(rustc --version 2>/dev/null | awk '{print $2}')
	if [ -z "$have" ] || [ "$(printf '%s\n%s\n' "$PACKAGES_RUST_MIN" "${have%%-*}" | sort -V | head -n 1)" != "$PACKAGES_RUST_MIN" ]; then
		packages_say "rustc $PACKAGES_RUST_MIN or newer is needed (found: ${have:-none}); install it with: rustup toolchain install stable"
		return 1
	fi
}

# need_packages GROUP...
need_packages() {
	local group list=()
	for group in "$@"; do
		case "$group" in
		rust-check) packages_rust_check || return 1 ;;
		qemu) list+=(qemu-system-x86 qemu-utils) ;;
		guest) list+=(busybox-static cpio xz-utils e2fsprogs mmdebstrap) ;;
		test) list+=(libnbd-bin fio shellcheck) ;;
		demo) list+=(jq) ;;
		libvirt)
			list+=(libvirt0 libvirt-dev libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu pkg-config)
			list+=(ovmf swtpm swtpm-tools)
			# In Debian 12's backports and later these are packages of their own.
			if [ "$(packages_codename)" = bookworm ]; then
				list+=(libvirt-common libvirt-daemon-common libvirt-daemon-log)
			fi
			# Where it is not a package of its own the daemon has it.
			if grep -q '^ID=debian' /etc/os-release || apt-cache show libvirt-daemon-driver-secret >/dev/null 2>&1; then
				list+=(libvirt-daemon-driver-secret)
			fi
			;;
		bench) list+=(time jq openssl) ;;
		peers) list+=(virtnbdbackup python3 python3-pip) ;;
		*)
			packages_say "unknown group $group"
			return 2
			;;
		esac
	done
	if [ ${#list[@]} -gt 0 ]; then packages_install "${list[@]}"; fi
}

# Downloads the packages in "$@" into the current directory.
packages_download() {
	apt-get -qq download "$@" >&2 && return 0
	packages_apt update && apt-get -qq download "$@" >&2
}

# fetch_guest_kernel DIR: a small stock kernel for test guests, unpacked only.
fetch_guest_kernel() {
	local dir=$1 meta=linux-image-cloud-amd64 package work
	if [ -e "$dir/vmlinuz" ] && [ -d "$dir/modules" ]; then return 0; fi
	# Ubuntu has no "cloud" flavour of that name; its virtual kernel is the like.
	apt-cache show "$meta" >/dev/null 2>&1 || meta=linux-image-virtual
	package=$(apt-cache depends "$meta" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
	[ -n "$package" ] || {
		packages_say "no kernel package found behind $meta"
		return 1
	}
	mkdir -p "$dir" && work=$(mktemp -d "$dir/download.XXXXXX") || return 1
	(
		set -e
		cd "$work"
		modules=""
		case "$package" in *-generic) modules="linux-modules-${package#linux-image-}" ;; esac
		# shellcheck disable=SC2086 # empty on Debian, where one package holds both
		packages_download "$package" $modules
		for deb in *.deb; do dpkg-deb -x "$deb" root; done
		cp root/boot/vmlinuz-* ../vmlinuz.new
		rm -rf ../modules
		if [ -d root/lib/modules ]; then mv root/lib/modules/* ../modules; else mv root/usr/lib/modules/* ../modules; fi
		mv ../vmlinuz.new ../vmlinuz
	)
	local status=$?
	rm -rf "$work"
	[ $status -eq 0 ] || packages_say "the guest kernel could not be fetched into $dir"
	return $status
}

# fetch_guest_agent DIR: qemu-ga and the libraries it needs, unpacked under DIR/root, for the guests' initramfs.
fetch_guest_agent() {
	local dir=$1 work library
	if [ -x "$dir/root/usr/sbin/qemu-ga" ] && [ -e "$dir/root/complete" ]; then return 0; fi
	mkdir -p "$dir" && work=$(mktemp -d "$dir/download.XXXXXX") || return 1
	(
		set -e
		cd "$work"
		mapfile -t needs < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
			--no-replaces --no-enhances --no-pre-depends qemu-guest-agent | grep -E '^lib(glib2|numa|udev|uring|pcre|cap|selinux)' | sort -u)
		packages_download qemu-guest-agent "${needs[@]}"
		for deb in *.deb; do dpkg-deb -x "$deb" all; done
		agent=all/usr/sbin/qemu-ga
		[ -x "$agent" ] || agent=all/usr/bin/qemu-ga
		mkdir -p root/usr/sbin root/lib64 root/lib/x86_64-linux-gnu
		cp "$agent" root/usr/sbin/qemu-ga
		paths=$(find "$PWD/all" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
		# Libraries of the unpacked packages first, the C library from this machine.
		while read -r library; do
			case "$library" in
			*/ld-linux-*) cp -L "$library" root/lib64/ ;;
			*) cp -L "$library" root/lib/x86_64-linux-gnu/ ;;
			esac
		done < <(LD_LIBRARY_PATH=$paths ldd "$agent" | grep -o '/[^ ]*')
		touch root/complete
		rm -rf ../root
		mv root ../root
	)
	local status=$?
	rm -rf "$work"
	[ $status -eq 0 ] || packages_say "the guest agent could not be fetched into $dir"
	return $status
}

# fetch_guest_fio DIR: this machine's fio and the libraries that it needs, under DIR/root, for the guests' initramfs.
fetch_guest_fio() {
	local dir=$1 library fio
	if [ -e "$dir/root/complete" ]; then return 0; fi
	fio=$(command -v fio) || {
		packages_say "fio is not installed"
		return 1
	}
	rm -rf "$dir/root"
	mkdir -p "$dir/root/usr/sbin" "$dir/root/lib64" "$dir/root/lib/x86_64-linux-gnu" || return 1
	cp "$fio" "$dir/root/usr/sbin/fio" || return 1
	while read -r library; do
		case "$library" in
		*/ld-linux-*) cp -L "$library" "$dir/root/lib64/" || return 1 ;;
		*) cp -L "$library" "$dir/root/lib/x86_64-linux-gnu/" || return 1 ;;
		esac
	done < <(ldd "$fio" | grep -o '/[^ ]*')
	touch "$dir/root/complete"
}

# fetch_guest_system DIR: DIR/root.qcow2, the root of a guest with systemd and qemu-ga, from the machine's own release and
# archive. As root.
fetch_guest_system() {
	local dir=$1 work uri suite components=main
	if [ -e "$dir/root.qcow2" ]; then return 0; fi
	if ! uri=$(packages_archive_uri); then
		packages_say "no archive in /etc/apt for the guest system"
		return 1
	fi
	suite=$(packages_codename)
	# Where Ubuntu has the agent.
	if grep -q '^ID=ubuntu' /etc/os-release; then components="main universe"; fi
	mkdir -p "$dir" && work=$(mktemp -d "$dir/download.XXXXXX") || return 1
	(
		set -e
		cd "$work"
		packages_root mmdebstrap --quiet --mode=root --format=directory --variant=essential \
			--include=systemd,systemd-sysv,udev,qemu-guest-agent,mount \
			--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
			--dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/i18n/*' \
			"$suite" root "deb $uri $suite $components" >&2
		truncate -s 384M root.raw
		packages_root mkfs.ext4 -q -F -d root root.raw
		qemu-img convert -O qcow2 root.raw root.qcow2
		mv root.qcow2 ../root.qcow2
	)
	local status=$?
	packages_root rm -rf --one-file-system "$work"
	[ $status -eq 0 ] || packages_say "the guest system could not be made in $dir"
	return $status
}
