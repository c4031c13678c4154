#!/usr/bin/env bash
# See to it that the real servers of the tests are there: DCMTK's dcmqrscp and Orthanc, what mounts a file system that
# forgets (fuse3) and what makes system calls fail (strace), or those that are named.
#
# Usage: peers.sh [PROGRAM=PACKAGE ...]
#
# Installs Debian's packages where that is allowed (root, or sudo without a password). The packaged servers start
# as services, Orthanc one that accepts studies from anyone: here they are neither started nor left to start at the
# next boot. Never fails: the tests skip what is missing.
set -u
# Debian keeps PostgreSQL's server off the path.
export PATH="$PATH:/usr/sbin:/usr/local/sbin:$(printf '%s:' /usr/lib/postgresql/*/bin)"

[ $# -gt 0 ] || set -- dcmqrscp=dcmtk Orthanc=orthanc fusermount3=fuse3 strace=strace
packages=()
for pair; do
    command -v "${pair%%=*}" >/dev/null || packages+=("${pair#*=}")
done
[ ${#packages[@]} -eq 0 ] && exit 0

skip() {
    echo "make: ${packages[*]} not installed ($1): their tests are skipped. To have them: sudo apt-get install ${packages[*]}"
    exit 0
}

command -v apt-get >/dev/null || skip "no apt-get here"
if [ "$(id -u)" -eq 0 ]; then
    as_root=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root=(sudo -n)
else
    skip "that needs root"
fi

# invoke-rc.d asks this file whether a package may start its service; 101 means no. One that is there stays as it is.
policy=/usr/sbin/policy-rc.d
mark="put here for the length of one apt-get by airflow-dicom-get, process $$"
put_back() {
    if grep -qsF "$mark" "$policy"; then "${as_root[@]}" rm -f "$policy"; fi
}
trap put_back EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\n# %s\nexit 101\n' "$mark" |
        "${as_root[@]}" sh -C -c 'umask 022 && cat >"$0" && chmod 755 "$0"' "$policy" || skip "cannot write $policy"
fi
"${as_root[@]}" "$policy" "${packages[0]}" start >/dev/null 2>&1
[ $? -eq 101 ] || skip "the $policy of this machine lets services start"

echo "make: installing ${packages[*]} for the tests (no service is started)"
log=$(mktemp)
apt() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 "$@" </dev/null >>"$log" 2>&1
}
if ! apt install --no-install-recommends "${packages[@]}"; then
    apt update && apt install --no-install-recommends "${packages[@]}" || {
        tail -n 5 "$log" >&2
        rm -f "$log"
        skip "apt-get failed"
    }
fi
rm -f "$log"
for package in "${packages[@]}"; do
    # Those without a service of that name, as dcmtk, are passed over.
    "${as_root[@]}" update-rc.d "$package" disable >/dev/null 2>&1
done
exit 0
