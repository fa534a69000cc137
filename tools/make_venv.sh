#!/bin/sh
# This file is part of coadd_deepprior.
#
# Use of this source code is governed by a 3-clause BSD-style
# license that can be found in the LICENSE file.

# Make, update or repair the virtual environment .venv of this source tree: see `make setup`.
# PYTHON names the interpreter to use; without it the first suitable one on PATH or of pyenv is taken.

cd "$(dirname "$0")/.." || exit 1

venv=.venv
unfinished=$venv/.unfinished # holds the process that is at work; left behind by an interrupted one
log=$venv/pip.log
needed_gib=10 # most of it are the CUDA libraries of torch, first packed and then unpacked

say() {
    echo "setup: $*"
}

fail() {
    echo "setup: $*" >&2
    exit 1
}

suitable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 12) <= sys.version_info < (3, 15))' >/dev/null 2>&1
}

find_python() {
    if [ -n "$PYTHON" ]; then
        suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.12, 3.13 or 3.14 with venv and" \
            "ensurepip: set PYTHON to one that is, or unset it to have one looked for."
        python=$PYTHON
        return
    fi
    for python in python3.13 python3.12 python3.14 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[234]*/bin/python; do
        suitable "$python" && return
    done
    fail "no Python 3.12, 3.13 or 3.14 with venv and ensurepip is on PATH or in pyenv: install one" \
        "('apt install python3 python3-venv', 'pyenv install 3.13', ...) or set PYTHON=/path/to/python."
}

install_with_pip() {
    $venv/bin/python -m pip install $quiet --disable-pip-version-check --log $log -e '.[test,doc]' 2>>$log &&
        return
    if grep -q 'No space left on device' $log; then
        fail "the disk is full: free about $needed_gib GiB in $PWD and in \$TMPDIR, then run" \
            "'make setup' again; pip's log is $PWD/$log."
    elif grep -qE 'NewConnectionError|NameResolutionError|Retrying \(Retry|ReadTimeoutError' $log; then
        [ -n "$quiet" ] && rm $unfinished # pip downloads everything before it changes anything
        fail "pip cannot reach the package index: check the network and proxy settings, then run" \
            "'make setup' again; pip's log is $PWD/$log."
    fi
    fail "pip failed with '$(grep -o 'ERROR: .*' $log | tail -n 1)'; its log is $PWD/$log."
}

if [ -e $unfinished ]; then
    other=$(cat $unfinished)
    if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then
        fail "process $other is already making $venv: wait for it, or remove $PWD/$venv if it is something" \
            "else, and run 'make setup' again."
    fi
    say "an earlier set-up did not finish: starting again"
    rm -rf $venv
fi

if suitable $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1; then
    quiet=--quiet
    say "updating $venv"
    echo $$ >$unfinished || fail "cannot write to $PWD/$venv."
else
    quiet=
    find_python
    say "using $("$python" -c 'import sys; print("Python", sys.version.split()[0], "at", sys.executable)')"
    free_gib=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free_gib" -ge $needed_gib ] || fail "the installation needs about $needed_gib GiB and $PWD has" \
        "$free_gib GiB free: free some space and run 'make setup' again."
    rm -rf $venv
    mkdir $venv && echo $$ >$unfinished || fail "cannot write to $PWD."
    say "making $venv"
    "$python" -m venv $venv >$log 2>&1 || fail "'$python -m venv' failed; its output is in $PWD/$log."
    say "installing the package and what it depends on (6.5 GB, some minutes)"
fi

: >$log
install_with_pip
rm $unfinished
touch $venv/.stamp
say "$PWD/$venv is ready"
