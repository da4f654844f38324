#!/bin/sh
# Makes .venv beside this file with everything Octavo needs, then runs what it was asked to run.
#
#   ./setup.sh                      only set up
#   ./setup.sh run quickstart       set up, then `octavo run quickstart` (any other verb likewise)
#   ./setup.sh test [PYTEST ARGS]   set up with the developers' packages, then run the tests
#
# Options, before the verb:
#   --extras data,fast,gguf,rag,track   optional parts as well (`all` for every one)
#   --dev                           the developers' packages as well (tests, lint, types)
#   --cpu | --cuda                  the build of torch; without it: CUDA where nvidia-smi works, else CPU
#
# Environment: PYTHON names the Python to use; TORCH_SPEC the torch to install (for example torch==2.13.0);
# with TORCH_SPEC or PIP_FIND_LINKS set, torch comes from pip's own sources and no other index is asked.
# The choice of torch and the extras hold for later calls. A second call finds nothing to do and starts at once;
# an interrupted call goes on where it was.
set -eu

TORCH_VERSION=2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
KNOWN_EXTRAS="all data dev fast gguf rag track"

root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
venv=$root/.venv
stamp=$venv/octavo-setup

refuse() { # exit code, message
    printf '%s\n' "$2" >&2
    exit "$1"
}

usage() {
    sed -n '2,/^set -eu/{/^#/s/^# \{0,1\}//p;}' "$0"
}

case $(uname -s) in
MINGW* | MSYS* | CYGWIN* | Windows*)
    refuse 6 "error[RESOURCE]: native Windows is not supported. Fix: open WSL (https://learn.microsoft.com/windows/wsl/install) and run this command there."
    ;;
esac

build=auto
extras=""
while [ $# -gt 0 ]; do
    case $1 in
    --extras)
        [ $# -gt 1 ] || refuse 2 "error[CONFIG]: --extras needs names. Fix: ./setup.sh --extras data,track."
        extras="$extras,$2"
        shift
        ;;
    --extras=*) extras="$extras,${1#--extras=}" ;;
    --dev) extras="$extras,dev" ;;
    --cpu) build=cpu ;;
    --cuda) build=cuda ;;
    -h | --help)
        usage
        exit 0
        ;;
    -*) refuse 2 "error[CONFIG]: no such option: $1. Fix: see ./setup.sh --help." ;;
    *) break ;;
    esac
    shift
done
[ "${1:-}" != test ] || extras="$extras,dev"

# One name a line, sorted, each once.
extras=$(printf '%s' "$extras" | tr ',' '\n' | sort -u | sed '/^$/d')
for name in $extras; do
    case " $KNOWN_EXTRAS " in
    *" $name "*) ;;
    *) refuse 2 "error[CONFIG]: there is no extra '$name'. Fix: use one of: $KNOWN_EXTRAS." ;;
    esac
done

good_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
        if good_python "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    found=$(python3 --version 2>&1 || python --version 2>&1) || found="no Python at all"
    refuse 6 "error[RESOURCE]: Octavo needs Python 3.11 or newer, found: $found. Fix: install Python 3.11 or newer, or set PYTHON=/path/to/python3."
}

pick_torch() { # sets asked, torch_spec, torch_index, torch_why
    asked=${TORCH_SPEC:-$build}
    # A choice made once holds for later calls that make none.
    [ "$asked" != auto ] || [ ! -f "$stamp" ] || asked=$(sed -n 2p "$stamp")
    torch_index=""
    torch_spec="torch==$TORCH_VERSION"
    torch_why="as asked"
    picked=$asked
    if [ "$picked" = auto ]; then
        if [ "$(uname -s)" != Linux ]; then
            picked=cuda torch_why="the build for $(uname -s)"
        elif nvidia-smi >/dev/null 2>&1; then
            picked=cuda torch_why="CUDA build: an NVIDIA driver answers"
        else
            picked=cpu torch_why="CPU build: no NVIDIA driver answers"
        fi
    fi
    case $picked in
    cpu)
        if [ "$(uname -s)" = Linux ]; then
            torch_spec="$torch_spec+cpu"
            [ -n "${PIP_FIND_LINKS:-}" ] || torch_index=$TORCH_CPU_INDEX
        fi
        ;;
    cuda) ;;
    *) torch_spec=$picked torch_why="from TORCH_SPEC" ;;
    esac
}

# What the environment depends on: when any of it changes, pip looks again.
fingerprint() {
    "$venv/bin/python" - "$root" "$torch_spec" 2>/dev/null <<'PYTHON'
import hashlib, pathlib, sys
root, torch_spec = sys.argv[1:]
facts = [sys.version, root, torch_spec, pathlib.Path(root, "pyproject.toml").read_text("utf-8")]
print(hashlib.sha256("\0".join(facts).encode()).hexdigest())
PYTHON
}

# The stamp: the fingerprint, the torch that was asked for, then one extra a line.
up_to_date() {
    [ -f "$stamp" ] && [ -x "$venv/bin/octavo" ] || return 1
    now=$(fingerprint) && [ "$(head -n 1 "$stamp")" = "$now" ] || return 1
    for name in $extras; do
        tail -n +3 "$stamp" | grep -qx "$name" || return 1
    done
}

make_venv() {
    if [ -x "$venv/bin/python" ] && good_python "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python=$(find_python)
    "$python" -m venv --clear "$venv" || refuse 6 "error[RESOURCE]: '$python -m venv' failed. Fix: install the venv module (on Debian and Ubuntu: sudo apt install python3-venv) and run this again."
}

enough_disk() { # gigabytes
    free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$1" ] || refuse 6 "error[RESOURCE]: $free GB free at $root, the packages need about $1 GB. Fix: free some space and run this again."
}

pip_install() {
    quiet=--quiet
    [ ! -t 1 ] || quiet=--progress-bar=on
    PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install "$quiet" "$@" </dev/null
}

install_packages() {
    if [ -f "$stamp" ]; then # what an earlier call has installed stays asked for
        extras=$( (printf '%s\n' "$extras" && tail -n +3 "$stamp") | sort -u | sed '/^$/d')
    fi
    extra_list=$(printf '%s' "$extras" | tr '\n' ',')
    version=$("$venv/bin/python" -c 'import platform; print(platform.python_version())')
    printf 'octavo setup: Python %s in %s\n' "$version" "$venv"
    printf 'octavo setup: %s (%s)\n' "$torch_spec" "$torch_why"
    printf 'octavo setup: extras: %s\n' "${extra_list:-none, the core only (optional parts: ./setup.sh --extras all)}"

    present=$("$venv/bin/python" -c "import importlib.metadata as m; print(m.version('torch'))" 2>/dev/null) || present=""
    needed=3 again=""
    case $picked,$present in
    cuda,*+cpu) needed=9 again=--force-reinstall ;; # to pip a +cpu version satisfies the plain one
    cuda,) [ "$(uname -s)" != Linux ] || needed=9 ;;
    *,?*) needed=1 ;;
    esac
    enough_disk "$needed"

    # Without its dependencies, so that torch's own index is asked for torch alone.
    pip_install --no-deps $again ${torch_index:+--index-url "$torch_index"} "$torch_spec" ||
        refuse 6 "error[RESOURCE]: $torch_spec could not be installed${torch_index:+ from $torch_index}. Fix: check the connection and run this again, or set TORCH_SPEC to a torch that pip can find. Kept: what was installed so far."
    pip_install --editable "$root${extra_list:+[$extra_list]}" ||
        refuse 6 "error[RESOURCE]: the packages could not be installed. Fix: check the connection and run this again. Kept: what was installed so far."

    { fingerprint && printf '%s\n' "$asked" "$extras"; } >"$stamp.new"
    mv "$stamp.new" "$stamp"
    printf 'octavo setup: done\n'
}

pick_torch
up_to_date || {
    make_venv
    install_packages
}

case ${1:-} in
'')
    printf 'Ready. Start with: %s/bin/octavo quickstart\n' "$venv"
    ;;
test)
    shift
    cd "$root"
    # One torch thread in each of two processes: tests are small, so more threads only get in each other's way.
    OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -n 2 "$@"
    ;;
*)
    exec "$venv/bin/octavo" "$@"
    ;;
esac
