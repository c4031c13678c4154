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
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || skip "that needs root"
    as_root=(sudo -n)
    echo "make: the tests use ${packages[*]}, which is not installed; calling sudo, which does not ask for a password here"
    "${as_root[@]}" true 2>/dev/null || skip "that needs root, and sudo asks for a password"
fi

# In one process of root's: what it has begun it ends, also where whoever called it is gone.
"${as_root[@]}" bash -s -- "${packages[@]}" <<'ROOT'
set -u
# invoke-rc.d asks this file whether a package may start its service; 101 means no. One that is there stays as it is.
policy=${POLICY_RC_D:-/usr/sbin/policy-rc.d}
boot=/proc/sys/kernel/random/boot_id
if [ ! -e "$policy" ]; then
    # Whoever is killed cannot remove it. So another process does, as soon as nobody has this pipe open: neither we nor
    # an apt-get that outlives us. Where that one is killed too, the file removes itself when it is next asked.
    exec 9> >(trap '' INT TERM HUP; exec setsid sh -c 'cat >/dev/null; rm -f "$0"' "$policy" >/dev/null 2>&1)
    keeper=$!
    printf '#!/bin/sh\n# Put here for the length of one apt-get by airflow-dicom-get.\n%s && exit 101\nrm -f "$0"\n' \
        "grep -qs '^State:.[^ZX]' /proc/$keeper/status && grep -qs $(cat $boot) $boot" |
        sh -C -c 'umask 022 && cat >"$0" && chmod 755 "$0"' "$policy" || exit 11
    trap 'rm -f "$policy"; kill -KILL "$keeper" 2>/dev/null' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
fi
"$policy" "$1" start </dev/null >/dev/null 2>&1
[ $? -eq 101 ] || exit 12

echo "make: installing $* for the tests (no service is started)"
log=$(mktemp)
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 "$@" </dev/null >>"$log" 2>&1
}
if ! apt install --no-install-recommends "$@"; then
    apt update && apt install --no-install-recommends "$@" || {
        tail -n 5 "$log" >&2
        rm -f "$log"
        exit 13
    }
fi
rm -f "$log"
for package; do
    # Those without a service of that name, as dcmtk, are passed over.
    update-rc.d "$package" disable </dev/null >/dev/null 2>&1
done
exit 0
ROOT
case $? in
    11) skip "policy-rc.d cannot be written" ;;
    12) skip "the policy-rc.d of this machine lets services start" ;;
    13) skip "apt-get failed" ;;
esac
exit 0
