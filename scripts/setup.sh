#!/bin/sh
# All that the project needs on a fresh Debian 12 or 13: Debian packages, and .venv with the project in it.
# Says what it installs. Run it through `make setup`, which leaves it out when nothing changed.
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }

# What the command says is shown only if it fails.
quietly() {
    if ! output=$("$@" 2>&1); then
        echo "$output" >&2
        say "failed: $*" >&2
        exit 1
    fi
}

# A program (or a file) that must be there, and the Debian package that has it.
needed='
/usr/bin/python3        python3
runc                    runc
redis-server            redis-server
redis-cli               redis-tools
ip                      iproute2
tc                      iproute2
/usr/sbin/sshd          openssh-server
ssh                     openssh-client
ssh-keygen              openssh-client
unshare                 util-linux
nsenter                 util-linux
mount                   mount
find                    findutils
gcc                     gcc
/usr/include/stdio.h    libc6-dev
/usr/include/linux/fs.h linux-libc-dev
'

find_python() {
    for candidate in python3.14 python3.13 python3.12 python3.11 python3 /usr/bin/python3; do
        # ensurepip: Debian keeps it in a package of its own.
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

missing=$(echo "$needed" | while read -r program package; do
    [ -z "$program" ] || command -v "$program" >/dev/null 2>&1 || [ -e "$program" ] || echo "$package"
done | sort -u)
python=$(find_python)
if [ -z "$python" ]; then
    missing="$missing python3 python3-venv"
fi
missing=$(echo $missing) # one line

if [ -n "$missing" ]; then
    say "installing Debian packages: $missing"
    if [ "$(id -u)" -eq 0 ]; then
        as_root=
    elif command -v sudo >/dev/null 2>&1; then
        as_root=sudo
    else
        say "that needs root: run 'apt-get install $missing' as root, then again" >&2
        exit 1
    fi
    # The services that come with them (redis, sshd) are not to be started on this machine.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' | $as_root tee $policy >/dev/null
        $as_root chmod 0755 $policy
        trap '$as_root rm -f $policy' EXIT
    fi
    quietly $as_root apt-get -q update
    # shellcheck disable=SC2086 -- a list of words
    quietly $as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $missing
    python=$(find_python)
fi
if [ -z "$python" ]; then
    say "no Python 3.11 or later with venv and ensurepip; Debian 12 and 13 have one in python3-venv" >&2
    exit 1
fi

if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "making .venv with $python ($("$python" -V))"
    rm -rf .venv
    "$python" -m venv .venv
fi
say "installing the project and its tools into .venv (pip install -e .[dev])"
quietly .venv/bin/python -m pip install --disable-pip-version-check -e '.[dev]'
say "done"
