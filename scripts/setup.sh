#!/usr/bin/env bash
# Make the virtual environment that the Makefile's targets run in, if it is missing or out of date.
#
# Usage: setup.sh VENV PYTHON EXTRAS [EXPECT]
#
# EXPECT says what the first call costs: packages, megabytes, minutes.
# A stamp inside the environment holds a digest of everything it was made from; where it still fits, this script
# does nothing. An environment that works is brought up to date in place, never thrown away.
set -euo pipefail
cd -P "$(dirname "$0")/.."

venv=$1 python=$2 extras=$3 expect=${4:-a few minutes}
[[ $venv = /* ]] || venv=$PWD/$venv

fail() {
    printf 'make: %s\n' "$@" >&2
    exit 1
}

command -v git >/dev/null || fail "git is missing. On Debian or Ubuntu: sudo apt-get install git"
command -v "$python" >/dev/null ||
    fail "$python is missing. On Debian or Ubuntu: sudo apt-get install python3 python3-venv"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    fail "$python does not run. Name another interpreter: make PYTHON=/usr/bin/python3 ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is Python $version, and 3.11 or newer is needed." \
        "Name a newer interpreter: make PYTHON=python3.12 ... (Debian and Ubuntu packages: python3.12 python3.12-venv)"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python cannot make virtual environments: its venv package is missing." \
        "On Debian or Ubuntu: sudo apt-get install python3-venv (for an interpreter beside the system's: python$version-venv)"

# The absolute path is part of it: scripts inside an environment name their interpreter by it.
wanted=$({ echo "$venv" "$version" "$extras"; cat pyproject.toml constraints.txt; } | sha256sum | cut -d' ' -f1)
stamp=$venv/.made-from
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

fits() {
    [ "$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ] &&
        grep -qF "$venv" "$venv/bin/activate" 2>/dev/null
}
if [ -e "$venv" ] && ! fits; then
    [ -f "$venv/pyvenv.cfg" ] || fail "$venv exists and is no virtual environment: move it away, or name another: make VENV=..."
    echo "make: $venv was created by another Python or in another folder: creating it again"
    "$python" -m venv --clear "$venv"
elif [ ! -e "$venv" ]; then
    echo "make: creating ${venv#"$PWD"/} with Python $version"
    "$python" -m venv "$venv"
fi

# What pip says, in a few lines: a minute of silence looks like one that hangs. Its errors go through as they are.
tell() {
    local line fetched=0
    while IFS= read -r line; do
        case $line in
        Collecting\ *) ((++fetched % 25)) || echo "make:   $fetched packages fetched" ;;
        Installing\ collected\ packages*) echo "make:   unpacking and compiling them, the longest step" ;;
        esac
    done
}

echo "make: installing the package with [$extras] into ${venv#"$PWD"/}; the first time: $expect"
SECONDS=0
install() {
    PYTHONUNBUFFERED=1 "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
        --constraint constraints.txt --editable ".[$extras]" | tell
}
# pip repeats a request that fails, but not a download that breaks off; what it has fetched it keeps.
install || { echo "make: pip has failed, see above; once more" && install; } ||
    fail "pip has failed twice, see above. If the connection broke off, call make again: what was fetched is kept."
"$venv/bin/python" -m pip --disable-pip-version-check check >/dev/null ||
    fail "the installed packages contradict each other; see: $venv/bin/python -m pip check"
echo "$wanted" >"$stamp"
echo "make: ${venv#"$PWD"/} is ready after $SECONDS s; later calls use it as it is"
